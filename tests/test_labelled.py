"""Labelled texts: tables and bases of tasks, splits and shifts, and what is said of wrong rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from itrain.data import LabelError, LabelledDataModule
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.tasks import TaskError
from itrain.tasks.gender import Gender
from itrain.tasks.hierarchical_equality import HierarchicalEquality
from itrain.tasks.labelled import UNLABELLED, LabelledBases
from itrain.tasks.labelled_texts import LabelledTexts

SPLITS = ("train", "validation", "test")
NAMES = ("Lisa", "Mary", "Sarah", "Laura", "John", "David", "Mark", "Paul")


@pytest.fixture(scope="module")
def network(embedded):
    return HookedNetwork(embedded.model)


def rows(splits: Sequence[str] = SPLITS) -> list[dict[str, Any]]:
    """A row for each name and split, labelled by gender."""
    verbs = ("walked", "jumped", "waited", "whispered")
    return [
        {"text": f"{name} {verb} because", "label": "female" if number < 4 else "male", "split": split}
        for split, verb in zip(splits, verbs, strict=False)
        for number, name in enumerate(NAMES)
    ]


def write(path: Path, found: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in found))
    return str(path)


def bound(task: Any, embedded: Any) -> Any:
    task.bind(embedded.tokenizer)
    return task


def module(task: Any, embedded: Any, network: Any, **settings: Any) -> Any:
    data = LabelledDataModule(task=bound(task, embedded), network=network, **settings)
    data.setup("fit")
    return data


def test_a_table_gives_its_splits_and_its_shifts(tmp_path: Path, embedded, network) -> None:
    found = rows((*SPLITS, "whispering"))
    data = module(LabelledTexts(texts=write(tmp_path / "a.jsonl", found), positive="female"), embedded, network)
    assert data.concepts == ["label=female"] and [len(data.datasets[split]) for split in SPLITS] == [8, 8, 16]  # type: ignore[index]
    test = data.datasets["test"].examples
    assert test.sets == ("test", "whispering") and test.of.tolist() == [0] * 8 + [1] * 8
    assert test.labels[:, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0] * 2
    part = test.take(torch.tensor([9, 2]))
    assert part.inputs.texts == ["Mary whispered because", "Sarah waited because"] and part.of.tolist() == [1, 0]


def test_shifts_may_be_files_of_their_own(tmp_path: Path, embedded, network) -> None:
    files = {name: write(tmp_path / f"{name}.jsonl", [row for row in rows((*SPLITS, "x")) if row["split"] == name])
             for name in (*SPLITS, "x")}  # fmt: skip
    task = LabelledTexts(texts={split: files[split] for split in SPLITS}, shifts={"other verb": files["x"]})
    assert module(task, embedded, network).datasets["test"].examples.sets == ("test", "other verb")


def test_rows_without_splits_are_divided_and_keep_groups_together(tmp_path: Path, embedded) -> None:
    found = [{"text": f"{n} {v} because", "label": n < "L", "name": n} for n in NAMES for v in ("walked", "jumped")]
    task = bound(LabelledTexts(texts=write(tmp_path / "a.jsonl", found), group="name"), embedded)
    names = [{setting["text"].split()[0] for setting in task.settings(split)} for split in SPLITS]
    assert set.union(*names) == set(NAMES) and sum(map(len, names)) == len(NAMES)
    assert [*map(len, names)] == [5, 2, 1] and task.concepts == ["label"]


def test_labels_of_several_columns_lists_and_unknown_ones(tmp_path: Path) -> None:
    found = [
        {"text": "a", "kind": "x", "toxic": "1", "tags": ["p", "q"]},
        {"text": "b", "kind": "y", "toxic": "", "tags": []},
        {"text": "c", "kind": "z", "toxic": "0", "tags": None},
    ]
    task = LabelledTexts(texts=write(tmp_path / "a.jsonl", found), label=["kind", "toxic", "tags"])
    assert task.concepts == ["kind=x", "kind=y", "kind=z", "toxic", "tags=p", "tags=q"]
    labels = {setting["text"]: task.labels(setting) for split in SPLITS for setting in task.settings(split)}
    assert labels["a"] == [1, 0, 0, 1, 1, 1] and labels["b"] == [0, 1, 0, UNLABELLED, 0, 0]
    assert labels["c"] == [0, 0, 1, 0, UNLABELLED, UNLABELLED]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ""}, r"line 3, column 'text': '' is no text"),
        ({"text": 7}, r"line 3, column 'text': '7' is no text"),
        ({"split": None}, r"line 3, column 'split': it names no split"),
        ({"split": "test", "text": "Lisa walked because"}, r"line 3: its text is in test and, at .* line 1, in train"),
        ({"text": "Lisa frobnicated because"}, r"line 3, column 'text': 'frobnicated' is not in the model's vocab"),
        ({"text": [{"role": "user", "content": "Lisa"}]}, r"line 3, column 'text': chat messages need a tokenizer"),
    ],
)
def test_a_wrong_row_is_named_with_its_column(tmp_path: Path, embedded, change: Any, message: str) -> None:
    found = rows()
    found[2] = {**found[2], **change}
    with pytest.raises(TaskError, match=message):
        bound(LabelledTexts(texts=write(tmp_path / "a.jsonl", found)), embedded)


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"line 1 has no column 'lable'.*did you mean 'label'"):
        LabelledTexts(texts=write(tmp_path / "a.jsonl", rows()), label="lable")
    with pytest.raises(TaskError, match=r"no row has the label 'femal', did you mean 'female'"):
        LabelledTexts(texts=write(tmp_path / "a.jsonl", rows()), positive="femal")
    with pytest.raises(TaskError, match=r"set task\.texts"):
        LabelledTexts()


def test_chat_messages_go_through_the_tokenizers_own_template(tmp_path: Path) -> None:
    base: Any = load_embedded()
    base.tokenizer.chat_template = "{{ eos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    found = [{**row, "text": [{"role": "user", "content": row["text"]}]} for row in rows()]
    task = bound(LabelledTexts(texts=write(tmp_path / "a.jsonl", found)), base)
    ids = task.inputs(task.settings("train")).arguments["input_ids"]
    start = base.tokenizer.eos_token_id
    assert (ids[:, 0] == start).all() and (ids == start).sum() == len(ids)  # one at the start, not two


def test_bases_of_a_task_are_texts_and_no_text_is_in_two_sets(embedded, network) -> None:
    task = bound(Gender(templates="simple"), embedded)
    counts = {"train_texts": 64, "validation_texts": 32, "test_texts": 32}
    data = module(task, embedded, network, shifts={"discourse": Gender()}, positive={"gender": "male"}, **counts)
    assert data.concepts == ["gender=male"]
    texts = [text for dataset in data.datasets.values() for text in dataset.examples.inputs.texts]
    assert len(texts) == 64 + 32 + 2 * 32 == len(set(texts))
    test = data.datasets["test"].examples
    for text, label in zip(test.inputs.texts, test.labels[:, 0].tolist(), strict=True):
        settings = (each for name in test.sets for each in data.task.settings(name))
        setting = next(each for each in settings if data.task.identity(each) == text)
        assert label == (setting["task"].causal_model.run(setting["base"])["gender"] == "male")
    again = module(task, embedded, network, shifts={"discourse": Gender()}, positive={"gender": "male"}, **counts)
    assert [text for dataset in again.datasets.values() for text in dataset.examples.inputs.texts] == texts


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path, embedded, network) -> None:
    found = [{**row, "label": "male"} if row["split"] == "test" else row for row in rows()]
    with pytest.raises(LabelError, match="the test split has no text without the concept 'label=male'"):
        module(LabelledTexts(texts=write(tmp_path / "a.jsonl", found)), embedded, network)
    with pytest.raises(LabelError, match="the validation split of LabelledTexts is empty"):
        module(LabelledTexts(texts=write(tmp_path / "b.jsonl", rows(("train", "test")))), embedded, network)
    with pytest.raises(LabelError, match=r"set them there \(task.positive\)"):
        module(LabelledTexts(texts=write(tmp_path / "c.jsonl", rows())), embedded, network, positive={"label": "male"})
    with pytest.raises(LabelError, match="HierarchicalEquality is no task in text"):
        LabelledDataModule(task=HierarchicalEquality(), network=network)
    with pytest.raises(TaskError, match="'gender' is never 'femal'"):
        LabelledBases(task=Gender(), positive={"gender": "femal"})
