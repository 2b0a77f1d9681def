"""A user's table of pairs: what its columns mean, in every kind of file, and how each fault is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from itrain.data.counterfactual import collate
from itrain.models import BaseModel
from itrain.tasks import TaskError
from itrain.tasks.contract import check_task
from itrain.tasks.gender import Gender
from itrain.tasks.table import Table, table
from tests.listed import SIZES, gender_rows, one_row, three, write_csv, write_jsonl


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return gender_rows({"train": 12, "validation": 4, "test": 4})


def listed(file: str, embedded: BaseModel, **settings: Any) -> Any:
    task = table(pairs=file, **settings)
    task.bind(embedded.tokenizer)
    return task


def write_json(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text(json.dumps(rows))
    return str(file)


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> str:
    import pyarrow
    from pyarrow import parquet

    # A list of a text and a number has no type there.
    texts = [{**row, "base_spans": {"name": row["base_values"]["name"]}} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "source_spans": None} for row in texts]), file)
    return str(file)


# --- what a row means


@pytest.mark.parametrize(
    ("name", "write"),
    [("p.jsonl", write_jsonl), ("p.csv", write_csv), ("p.json", write_json), ("p.parquet", write_parquet)],
)
def test_every_kind_of_file_gives_the_same_batch(
    name: str, write: Callable[..., str], embedded: BaseModel, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    whole = listed(write_jsonl(tmp_path / "whole.jsonl", rows), embedded)
    task = listed(write(tmp_path / name, rows), embedded)
    check_task(task)
    assert [len(task.pairs(split)) for split in SIZES] == [12, 4, 4]
    for split in SIZES:
        ours, theirs = collate(task, task.pairs(split)), collate(whole, whole.pairs(split))
        assert (
            ours.base.texts == theirs.base.texts
            and ours.base.spans["name"].tolist() == theirs.base.spans["name"].tolist()
        )
        assert ours.counterfactual_label.tolist() == theirs.counterfactual_label.tolist()
        assert ours.variables["gender"].tolist() == theirs.variables["gender"].tolist()


def test_a_row_is_what_the_task_makes_of_its_pair(embedded: BaseModel, tmp_path: Path) -> None:
    """Texts, spans, labels and values are those of the task class, to the last token."""
    rows, task = gender_rows({"train": 20, "validation": 2, "test": 2}), Gender()
    task.bind(embedded.tokenizer)
    ours = listed(write_jsonl(tmp_path / "p.jsonl", rows), embedded, control="name")
    batch = collate(ours, ours.pairs("train"))
    words = {task.label(word): word for word in ("he", "she")}
    for number, row in enumerate(rows[:20]):
        assert batch.base.texts[number] == row["base"] and batch.sources["gender"].texts[number] == row["source"]
        assert words[int(batch.base_label[number])] == row["base_label"]
        assert words[int(batch.source_labels["gender"][number])] == row["source_label"]
        assert words[int(batch.counterfactual_label[number])] == row["label"]
        start, stop = batch.base.spans["name"][number].tolist()
        ids = batch.base.arguments["input_ids"][number, start:stop]
        assert embedded.tokenizer.decode(ids).strip() == row["base_values"]["name"]
        assert ours.values("gender")[int(batch.variables["gender"][number])] == row["base_values"]["gender"]
    assert batch.types is not None and len(batch.types.unique()) == len(
        {row["base_values"]["name"] for row in rows[:20]}
    )


def test_several_sources_have_labels_spans_and_values_of_their_own(embedded: BaseModel, tmp_path: Path) -> None:
    both = {
        "source": None,
        "source_label": None,
        "sources": {"gender": "John walked because", "verb": "Lisa jumped because"},
        "source_labels": {"gender": "he", "verb": "she"},
        "spans": {"end": "because"},
        "base_spans": {"name": "Mary"},
        "source_spans": {"gender": {"name": "John"}, "verb.name": "Lisa"},
        "base_values": {"gender": "female"},
        "source_values": {"gender": {"gender": "male"}, "verb": {"gender": "female"}},
    }
    verbs = ("slept", "sang", "ran")
    rows = [
        one_row(**{**row, **both, "base": f"Mary {verb} because"}) for row, verb in zip(three(), verbs, strict=True)
    ]
    task = listed(write_jsonl(tmp_path / "p.jsonl", rows), embedded)
    assert isinstance(task, Table) and sorted(task.variables) == ["gender", "verb"]
    (pair,) = task.pairs("train")
    assert {name: source["answer"] for name, source in pair.sources.items()} == {"gender": "he", "verb": "she"}
    assert {name: source["gender"] for name, source in pair.sources.items()} == {"gender": "male", "verb": "female"}
    batch = collate(task, [pair])
    assert {name: source.spans["name"].tolist() for name, source in batch.sources.items()} == {
        "gender": [[1, 2]],
        "verb": [[1, 2]],
    }
    assert batch.base.spans["end"].tolist() == [[3, 4]]


def test_columns_may_have_other_names(embedded: BaseModel, tmp_path: Path) -> None:
    rows = [
        {"prompt": row.pop("base"), "cf": {"prompt": row.pop("source")}, "base": "a note", **row} for row in three()
    ]
    for row in rows:
        del row["base"]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    task = listed(file, embedded, columns={"base": "prompt", "source": "cf.prompt"})
    assert [pair.base["prompt"] for pair in task.pairs("train")] == ["Lisa walked because"]
    swapped = write_jsonl(
        tmp_path / "q.jsonl", [{**row, "base": row["source"], "source": row["base"]} for row in three()]
    )
    task = listed(swapped, embedded, columns={"base": "source", "source": "base", "base_label": "base_label"})
    assert [pair.base["prompt"] for pair in task.pairs("train")] == ["Lisa walked because"]


def test_a_label_may_have_the_space_before_it(embedded: BaseModel, tmp_path: Path) -> None:
    rows = [{**row, "label": " he", "base_label": " she"} for row in three()]
    task = listed(write_jsonl(tmp_path / "p.jsonl", rows), embedded)
    assert task.outputs == ["he", "she"]


def test_a_csv_with_a_byte_order_mark_and_crlf_is_read(embedded: BaseModel, tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    write_csv(file, three())
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert [pair.place for pair in listed(str(file), embedded).pairs("test")] == [f"'{file}' line 4"]
    lines = tmp_path / "p.jsonl"
    write_jsonl(lines, three())
    lines.write_bytes(b"\xef\xbb\xbf" + lines.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert [pair.place for pair in listed(str(lines), embedded).pairs("test")] == [f"'{lines}' line 5"]


def test_the_rows_of_a_task_take_its_labels_and_its_texts(embedded: BaseModel, tmp_path: Path) -> None:
    """Numbers and texts of CSV alike; the causal model says the labels, and the row may repeat them."""
    common = {"template": "{name} {verb} {connective}", "connective": "because", "other": "Mary", "other_verb": "ran"}
    rows = [
        {
            "base": {**common, "name": "Mary", "verb": verb},
            "source": {**common, "name": "John", "verb": "walked"},
            "label": "he",
            "split": split,
        }
        for verb, split in zip(("walked", "jumped", "slept"), SIZES, strict=True)
    ]
    for write, name in ((write_jsonl, "p.jsonl"), (write_csv, "p.csv")):
        task = listed(write(tmp_path / name, rows), embedded, of=Gender(), control="verb")
        assert isinstance(task, Gender) and task.control == "verb"
        check_task(task)
        batch = collate(task, task.pairs("test"))
        assert batch.base.texts == ("Mary slept because",) and batch.sources["gender"].texts == ("John walked because",)
        assert task.label("he") == int(batch.counterfactual_label[0])
    assert Gender().pairs("test") is None, "the class is as it was"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base": {"name": "Jhn"}}, "line 2, base.name: 'Jhn' is none of the .* values of 'name'; did you mean 'John'"),
        ({"base": {"nam": "John"}}, "line 2, base: the task has no input 'nam', did you mean 'name'"),
        ({"base": {"verb": None}}, "line 2, base: there is no value for the input 'verb'"),
        ({"label": "she"}, "line 2, label is 'she', and the causal model of Gender gives 'he'"),
        (
            {"base_values": {"gender": "male"}},
            "base_values.gender is 'male', and the causal model of Gender gives 'female'",
        ),
        ({"spans": {"x": "Mary"}}, "line 2: the task has spans of its own; leave spans.x out"),
        ({"source": None, "sources": {"gendr": {"name": "x"}}}, "no variable 'gendr', did you mean 'gender'"),
    ],
)
def test_a_row_that_is_no_setting_of_the_task_is_named(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    common = {"template": "{name} {verb} {connective}", "connective": "because", "other": "Mary", "other_verb": "ran"}
    rows: list[dict[str, Any]] = [
        {
            "base": {**common, "name": "Mary", "verb": verb},
            "source": {**common, "name": "John", "verb": verb},
            "split": split,
        }
        for verb, split in zip(("walked", "jumped", "slept"), SIZES, strict=True)
    ]
    for name, value in changed.items():
        rows[1][name] = {**rows[1].get(name, {}), **value} if isinstance(value, dict) else value
    rows[1] = {name: value for name, value in rows[1].items() if value is not None}
    with pytest.raises(TaskError, match=message):
        table(pairs=write_jsonl(tmp_path / "p.jsonl", rows), of=Gender())


# --- what is wrong with a row

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a missing column": ({"base_label": None}, "line 2: there is no 'base_label'; it has base, source"),
    "a mistyped one": ({"base_label": None, "base_lable": "she"}, "no 'base_label', did you mean 'base_lable'"),
    "a mistyped optional one": ({"base_span": {"name": "Mary"}}, "line 2: there is no column 'base_span.name', did"),
    "an empty text": ({"base": " "}, "line 2, base is empty"),
    "an empty label": ({"label": ""}, "line 2, label is empty"),
    "a wrong type": ({"base": 2.5}, "line 2, base: '2.5' is a float; write text"),
    "a number of yes": ({"isolates": 1}, "line 2, isolates: '1' is neither true nor false"),
    "a list of values": ({"base_values": {"x": []}}, r"line 2, base_values.x: '\[\]' is a list"),
    "no object": ({"spans": "Mary"}, "line 2, spans: 'Mary' is no object"),
    "a label of no word": ({"label": "zzyzx"}, "line 2, label: the answer 'zzyzx' is no continuation"),
    "a base label": ({"base_label": "zzyzx"}, "line 2, base_label: the answer 'zzyzx'"),
    "a source label": ({"source": "Paul ran because", "source_label": "zzyzx"}, "source_label: the answer 'zzyzx'"),
    "an unknown word": ({"source": "John wlked because"}, "line 2, source: .*'wlked', which is not in the model's"),
    "a span not found": ({"spans": {"name": "Mary"}}, "spans.name, of its source: .*no 'Mary' in 'John walked"),
    "a span of the base": ({"base_spans": {"name": "Anna"}}, "base_spans.name, of its base: .*no 'Anna' in 'Mary"),
    "a span twice": ({"base": "Mary ran . Mary ran because", "base_spans": {"v": "ran"}}, "'ran' stands 2 times"),
    "two spans of a token": ({"base_spans": {"a": "Mary", "b": [0, 2]}}, "base: '@a' and '@b' are the same token"),
    "a reserved name": ({"base_spans": {"last": "Mary"}}, "'@last' already names tokens"),
    "both labels": ({"counterfactual_label": "he"}, "line 2 has both label and counterfactual_label"),
    "no source": ({"source": None}, "line 2: there is no 'source'"),
    "both sources": ({"sources": {"gender": "John walked because"}}, "line 2 has both source and sources"),
    "a variable without a source": ({"source_labels": {"gender": "he"}}, "source_labels.gender: the row has no use"),
    "a task's inputs": ({"base": {"name": "John"}}, "need task=<task> beside data.pairs"),
    "messages without roles": ({"base": [{"text": "x"}]}, r'line 2, base: message 0 is not \{"role"'),
    "messages of a plain model": ({"base": [{"role": "user", "content": "x"}]}, "line 2, base: .*no chat template"),
    "no split": ({"split": None}, "line 2: there is no 'split', and .*line 1 has one"),
    "an unknown split": ({"split": "eval"}, "line 2, split: 'eval' is no split"),
    "an empty split": ({"split": "train"}, r"the table has no validation rows, but train, test \(of the column split"),
    "a pair in two splits": ({"base": "Anna walked because"}, "line 2 of validation and .*line 3 of test are one pair"),
    "values of some": ({"base_values": {"gender": "female"}}, "base has a value 'gender', and .*line 1, base has"),
    "two answers": (
        {"base": "Lisa walked because", "split": "train", "label": "she"},
        "line 2, label is 'she', and .*line 1, label is 'he' for the same pair",
    ),
    "two labels of a text": ({"source_label": "she"}, "source_label is 'she', and .*line 1, source_label is"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_row_and_column(fault: str, embedded: BaseModel, tmp_path: Path) -> None:
    changed, message = FAULTS[fault]
    rows = three(**changed)
    if fault == "two answers":
        rows.append({**three()[1]})
    with pytest.raises(TaskError, match=message) as error:
        listed(write_jsonl(tmp_path / "p.jsonl", rows), embedded)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_all_rows_are_looked_at_and_counted(embedded: BaseModel, tmp_path: Path) -> None:
    rows = three()
    for row in rows:
        row["label"] = "zzyzx"
    with pytest.raises(TaskError, match=r"line 1, label: .*\(and 2 more rows\)"):
        listed(write_jsonl(tmp_path / "p.jsonl", rows), embedded)
    for row in rows:
        del row["base"]
    with pytest.raises(TaskError, match=r"line 1: there is no 'base'.*\(and 2 more rows\)"):
        table(pairs=write_jsonl(tmp_path / "p.jsonl", rows))


def test_an_empty_cell_of_a_csv_is_no_value(embedded: BaseModel, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "p.csv", [{**row, "spans": {"name": ""}} for row in three()])
    assert listed(file, embedded).pairs("train")[0].base["spans"] == {}
    with pytest.raises(TaskError, match="line 3, base_label is empty"):
        table(pairs=write_csv(tmp_path / "p.csv", three(base_label="")))


def test_texts_with_other_ends_are_refused_by_row(embedded: BaseModel, tmp_path: Path) -> None:
    """An answer that is another token there would never be found."""
    rows = three(base="Mary walked because she", base_label="walked")
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    assert listed(file, embedded).outputs == ["he", "she", "walked"]


def test_columns_that_nobody_reads_are_told_once(embedded: BaseModel, tmp_path: Path) -> None:
    rows = [{**row, "id": number, "note": "x"} for number, row in enumerate(three())]
    task = listed(write_jsonl(tmp_path / "p.jsonl", rows), embedded, disjoint=["id"])
    assert task.notes["unread"] == "columns note"
    again = listed(write_jsonl(tmp_path / "p.jsonl", [*rows, rows[0]]), embedded)
    assert again.notes["repeated"] == "1 rows list a pair again"
