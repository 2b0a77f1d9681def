"""Chats of a table in the tokenizer's own template, and the look at each row that a check of tables takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from itrain.data.counterfactual import collate
from itrain.models import load_embedded
from itrain.tasks import TaskError
from itrain.tasks.examining import examine_table
from itrain.tasks.gender import Gender
from itrain.tasks.table import table
from tests.listed import one_row, three, write_csv, write_jsonl

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{{ message.content }}{% if not loop.last %} . {% endif %}{% endfor %}"
    "{% if add_generation_prompt %} because\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The embedded model's, with a chat template that begins a text by itself."""
    made: Any = copy.deepcopy(load_embedded().tokenizer)
    made.chat_template = TEMPLATE
    return made


def said(*texts: str, last: str = "user") -> list[dict[str, str]]:
    roles = ["user"] * (len(texts) - 1) + [last]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_a_chat_has_one_beginning_and_its_spans(write: Callable[..., str], tokenizer: Any, tmp_path: Path) -> None:
    rows = three()
    for row in rows:
        row["base"], row["source"] = said("Paul ran", row["base"][:-8]), said("Paul ran", row["source"][:-8])
        row["base_spans"] = {"last_name": row["base"][1]["content"].split()[0]}
    task = table(pairs=write(tmp_path / ("p.csv" if write is write_csv else "p.jsonl"), rows))
    task.bind(tokenizer)
    pairs = task.pairs("train")
    assert pairs is not None
    batch = collate(task, pairs)
    ids = batch.base.arguments["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]).split() == ["Paul", "ran", ".", "Lisa", "walked", "because"]
    start, stop = batch.base.spans["last_name"][0].tolist()
    assert tokenizer.decode(ids[start:stop]).strip() == "Lisa"


def test_a_chat_that_ends_with_the_assistant_goes_on(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {
            **row,
            "base": said("Paul ran", row["base"], last="assistant"),
            "source": said("Paul ran", row["source"], last="assistant"),
        }
        for row in three()
    ]
    task = table(pairs=write_jsonl(tmp_path / "p.jsonl", rows))
    task.bind(tokenizer)
    pairs = task.pairs("train")
    assert pairs is not None and pairs[0].base["prompt"].endswith("Paul ran . Lisa walked because")


def test_what_a_template_refuses_is_told_by_row(tokenizer: Any, tmp_path: Path) -> None:
    task = table(pairs=write_jsonl(tmp_path / "p.jsonl", three(base=[{"role": "system", "content": "x"}])))
    with pytest.raises(TaskError, match=r"line 2, base: the tokenizer.s chat template refuses .* no system messages"):
        task.bind(tokenizer)


def test_each_row_is_shown_or_its_fault(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        *three(spans={"verb": "walked"}),
        one_row(base="Emma walked because", label="zzyzx", split="train"),
        one_row(base="Sarah wlked because", split="train"),
        one_row(base="Laura walked because", base_label=None, split="train"),
        one_row(base="Julia walked because", base_spans={"x": "y"}, split="train"),
    ]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    found = {each.place.rpartition(" ")[2]: each for each in examine_table(tokenizer, {"pairs": file})}
    assert found["2"].split == "validation" and found["2"].lines == {
        "base": "<|endoftext|> | Mary | walked | because -> she",
        "base spans": "@verb walked",
        "source": "<|endoftext|> | John | walked | because -> he",
        "source spans": "@verb walked",
        "label": "he",
    }
    assert {number: each.fault.partition("p.jsonl' ")[2][:22] for number, each in found.items() if each.fault} == {
        "4": "line 4, label: the ans",
        "5": "line 5, base: the prom",
        "6": "line 6: there is no 'b",
        "7": "line 7, base_spans.x, ",
    }


def test_what_is_wrong_with_the_whole_table_comes_last(tokenizer: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", three(split="train"))
    *rows, whole = examine_table(tokenizer, {"pairs": file})
    assert [bool(each.lines) for each in rows] == [True] * 3
    assert whole.place == "" and "no validation rows" in whole.fault
    (only,) = examine_table(tokenizer, {"pairs": "no.jsonl"})
    assert only.fault == "there is no file 'no.jsonl'"


def test_the_rows_of_a_task_are_shown_too(tokenizer: Any, tmp_path: Path) -> None:
    common = {"template": "{name} {verb} {connective}", "connective": "because", "other": "Mary", "other_verb": "ran"}
    rows = [
        {"base": {**common, "name": name, "verb": "ran"}, "source": {**common, "name": "John", "verb": "ran"}}
        for name in ("Mary", "Mry", "Lisa", "Anna")
    ]
    found = list(examine_table(tokenizer, {"pairs": write_jsonl(tmp_path / "p.jsonl", rows), "of": Gender()}))
    faults = [each.fault for each in found if each.fault]
    assert len(found) == 4 and len(faults) == 1 and "'Mry' is none of the" in faults[0]
    assert any("@name Mary" in (each.lines or {}).get("base spans", "") for each in found)
