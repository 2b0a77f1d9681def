"""Public schemas' files that a stranger wrote: each fault is one line that names file, row and column, soon."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from itrain import tiny_world
from itrain.tasks import TaskError, rows, unpacking
from itrain.tasks.axbench import AxBench, AxBenchTexts
from itrain.tasks.labelled_texts import LabelledTexts
from itrain.tasks.mib import MIBAddition, MIBIndirectObject, MIBMultipleChoice, MIBRavel, MIBTask
from itrain.tasks.rows import read_rows

ESCAPE = "\x1b]0;x\x07"


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(TaskError) as caught:
        act()
    said = str(caught.value)
    assert said.isprintable() and len(said) < 600
    return said


def jsonl(file: Path, written: list[dict[str, Any]]) -> str:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return str(file)


# --- MIB

SUM = {"prompt": "12 + 34 =", "operand1": 12, "operand2": 34, "label": "46"}
CHOICE = {"prompt": "Q\nA. x\nB. y\n", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": 0}
NAMES = {"prompt": "Ann and Bob met, Bob gave to", "choices": ["Ann", "Bob"], "answerKey": 0}
CITY = {
    "prompt": "Paris is in", "template": "%s is in", "entity": "Paris", "attribute": "Continent",
    "Continent": "Europe", "Country": "France", "Language": "French",
}  # fmt: skip

WRONG: list[tuple[type[MIBTask], dict[str, Any], dict[str, Any], str]] = [
    (MIBAddition, SUM, {"prompt": 5}, r"line 2, column 'prompt': '5' is a int; write text"),
    (MIBAddition, SUM, {"operand1": f"12{ESCAPE}"}, r"column 'operand1': '12\\x1b]0;x\\x07' is a str; write a whole"),
    (MIBAddition, SUM, {"operand1": 10**300}, r"label is '46', and '10+\.\.\.' \+ '34' = "),
    (MIBAddition, SUM, {"label": True}, "column 'label': 'True' is a bool; write text or a whole number"),
    (MIBAddition, SUM, {"random_counterfactual": "x"}, "the cell of 'random_counterfactual' is 'x'; write an object"),
    (MIBAddition, SUM, {"random_counterfactual": {}}, "has no column 'prompt' of 'random_counterfactual'"),
    (MIBMultipleChoice, CHOICE, {"choices": {"label": "AB"}}, "choices has 'AB' as its label, and no list of texts"),
    (MIBMultipleChoice, CHOICE, {"choices": {}}, "choices has 'None' as its label"),
    (MIBMultipleChoice, CHOICE, {"answerKey": -1}, "answerKey is '-1', and there are 2 choices, counted from 0"),
    (MIBMultipleChoice, CHOICE, {"answerKey": True}, "column 'answerKey': 'True' is a bool"),
    (MIBIndirectObject, NAMES, {"choices": ["Ann", "Bob"] + ["x" * 100] * 20000}, "; write the two names"),
    (MIBIndirectObject, NAMES, {"choices": ["", ""]}, "; write the two names"),
    (MIBIndirectObject, NAMES, {"answerKey": 7}, "answerKey is '7'; it is 0 or 1"),
    (MIBRavel, CITY, {"Country": ["a"]}, r"column 'Country': '\['a'\]' is a list; write text or null"),
    (MIBRavel, CITY, {"Country": 5}, "column 'Country': '5' is a int; write text or null"),
    (MIBRavel, CITY, {"entity": ""}, "the prompt lacks its entity"),
]


@pytest.mark.parametrize(("kind", "row", "change", "message"), WRONG)
def test_a_wrong_cell_of_mib_is_named(
    kind: type[MIBTask], row: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = row | {f"{each}_counterfactual": row for each in kind.types}
    for split in ("train", "validation", "test"):
        jsonl(tmp_path / f"{split}.jsonl", [good, good | change])
    said = refusal(lambda: kind(source=str(tmp_path)))
    assert re.search(message, said), said


def test_rows_of_which_the_baselines_use_none_are_named(tmp_path: Path) -> None:
    many = CHOICE | {"choices": {"label": list("ABCDE")}}
    row = many | {f"{each}_counterfactual": many for each in MIBMultipleChoice.types}
    for split in ("train", "validation", "test"):
        jsonl(tmp_path / f"{split}.jsonl", [row])
    assert "rows that the published baselines use" in refusal(lambda: MIBMultipleChoice(source=str(tmp_path)))


# --- AxBench


@pytest.mark.parametrize("column", ["input", "output", "output_concept", "concept_genre", "category", "concept_id"])
@pytest.mark.parametrize("value", [["a"], {"a": 1}, "missing"])
def test_a_wrong_cell_of_axbench_is_named(column: str, value: Any, tmp_path: Path) -> None:
    found = tiny_world.concept_rows()
    train = [dict(row) for row in found["train"]]
    train[3] = {**train[3], column: value}
    if value == "missing":
        del train[3][column]
    jsonl(tmp_path / "train_data.jsonl", train)
    jsonl(tmp_path / "latent_eval_data.jsonl", [dict(row) for row in found["test"]])
    for kind in (AxBench, AxBenchTexts):
        said = refusal(lambda kind=kind: kind(source=str(tmp_path), concept=1))
        assert f"train_data.jsonl' line 4{' has no' if value == 'missing' else ','} column '{column}'" in said


# --- labelled texts

TEXTS = [
    {"text": f"{split} {number}", "label": number % 2, "split": split}
    for split in ("train", "validation", "test")
    for number in range(4)
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, "column 'text': ' ' is no text"),
        ({"text": {"a": ESCAPE}}, "is no text; write one"),
        ({"label": {"a": 1}}, "column 'label': '{'a': 1}' is no class; write a number, or a short text without '/'"),
        ({"label": [[1]]}, "column 'label': '[1]' is no class"),
        ({"label": ESCAPE}, r"column 'label': '\x1b]0;x\x07' is no class"),
        ({"label": "x" * 10**5}, "xxx...' is no class"),
        ({"label": "a/b"}, "column 'label': 'a/b' is no class"),
        ({"split": "../x"}, "column 'split': '../x' is no name; use letters"),
        ({"split": "test/shift"}, "is no name"),
        ({"split": f"test{ESCAPE}"}, "is no name"),
    ],
)
def test_a_wrong_cell_of_labelled_texts_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", [*TEXTS[:1], TEXTS[1] | change, *TEXTS[2:]])
    said = refusal(lambda: LabelledTexts(texts=file))
    assert "t.jsonl' line 2, column" in said and message in said


def test_true_and_false_are_labels(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", [row | {"label": bool(row["label"])} for row in TEXTS])
    assert LabelledTexts(texts=file).concepts == ["label"]


# --- files that hold more than anybody reads


def test_a_parquet_file_does_not_unpack_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand times the same text, which the file has once."""
    monkeypatch.setattr(unpacking, "AT_ONCE", 2**20)
    monkeypatch.setattr(unpacking, "MOST", 2**23)
    text = pyarrow.array(["x" * 2**19])
    for name, column in {
        "kept": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), text),
        "nested": pyarrow.array([["x" * 2**19]] * 40),
    }.items():
        file = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.table({"text": column}), file, compression="zstd")
        assert file.stat().st_size < 2**16
        assert refusal(lambda file=file: read_rows(str(file))).endswith("take fewer of them")
        assert len(read_rows(str(file), limit=3)[""]) == 3
    numbers = pyarrow.array([[0] * 2**21])
    parquet.write_table(pyarrow.table({"text": numbers}), tmp_path / "row.parquet")
    assert "take fewer" in refusal(lambda: read_rows(str(tmp_path / "row.parquet")))


def test_a_line_is_read_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_ROW", 2**20)
    file = jsonl(tmp_path / "t.jsonl", [{"text": "x"}, {"text": "x" * 2**20}])
    assert "t.jsonl' line 2 has more than 1 MiB; leave it out" in refusal(lambda: read_rows(file))
