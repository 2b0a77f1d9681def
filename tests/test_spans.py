"""Spans of listed texts: by text, by occurrence, by characters; what is not there is refused with both texts."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from itrain.causal_model import CausalModel
from itrain.tasks import TaskError
from itrain.tasks.base import ListedTask, Pair, Split
from itrain.tasks.spans import all_characters, characters

TEXT = "the cat saw the {dog}"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("cat", (4, 7)),
        (["the", 1], (0, 3)),
        (["the", 2], (12, 15)),
        ([4, 7], (4, 7)),
        ((16, 21), (16, 21)),
        ("{dog}", (16, 21)),
    ],
)
def test_spans_are_found_by_text_occurrence_and_characters(said: Any, found: tuple[int, int]) -> None:
    assert characters(TEXT, said) == found


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("bird", "there is no 'bird' in 'the cat saw the {dog}'"),
        ("the", "'the' stands 2 times in 'the cat saw the {dog}'; write [\"the\", 1] for the first"),
        (["the", 3], "there is no 'the' number 3 in 'the cat saw the {dog}', which has it 2 times"),
        (["the", 0], "number 0"),
        ([4, 40], "[4, 40] is no part of 'the cat saw the {dog}', which has 21 characters"),
        ([-1, 4], "is no part of"),
        ([3, 4], "is only space"),
        ("", "its text is empty"),
        (7, "not '7'"),
        ([True, 3], "a span is a text that stands in it once"),
        ({"text": "cat"}, "a span is"),
    ],
)
def test_a_span_that_is_not_there_is_refused(said: Any, message: str) -> None:
    with pytest.raises(TaskError) as error:
        characters(TEXT, said)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["last", "all", "first2", "3", "The cat", "a.first", '"cat"'])
def test_a_span_cannot_have_the_name_of_another_position(name: str) -> None:
    with pytest.raises(TaskError, match="the span"):
        all_characters(TEXT, {name: "cat"})


class Listed(ListedTask):
    """Two texts with braces."""

    variables = ("animal",)

    def __init__(self) -> None:
        texts = ["the {cat} ran because", "the {dog} ran because"]
        self.settings = [
            {"prompt": text, "answer": "it", "animal": text[5:8], "spans": all_characters(text, {"word": [4, 9]})}
            for text in texts
        ]
        names = ("prompt", "answer", "animal", "spans")
        self.causal_model = CausalModel(
            inputs={name: [each[name] for each in self.settings] for name in names}, mechanisms={}, output="answer"
        )

    @property
    def outputs(self) -> Sequence[str]:
        return ["it", "she"]

    def pairs(self, split: Split) -> Sequence[Pair]:
        base, source = self.settings
        return [Pair(base=base, sources={"animal": source}, output="she")]


def test_braces_of_a_listed_text_are_text() -> None:
    from itrain.models import load_embedded

    task = Listed()
    task.bind(load_embedded().tokenizer)
    assert task.template(task.settings[0]).format_map({}) == "the {cat} ran because"
    with pytest.raises(TaskError, match="not in the model's vocabulary"):
        task.inputs(task.settings)
    assert task._render(task.sample(Random(0), "train").base) == ("the {cat} ran because", {"word": (4, 9)})


class Misspelt(Listed):
    """A pair whose source has a word that the model does not know, and where it stands."""

    before = 1

    def __init__(self) -> None:
        super().__init__()
        self.causal_model.inputs["prompt"] = ["Mary walked because"]

    def pairs(self, split: Split) -> Sequence[Pair]:
        base, source = ({**each, "prompt": "Mary walked because", "spans": {}} for each in self.settings)
        wrong = {**source, "prompt": "Mary wlked because"}
        pairs = [Pair(base=base, sources={"animal": source}, output="she", place="'f.jsonl' line 1")] * self.before
        return [*pairs, Pair(base=base, sources={"animal": wrong}, output="she", place="'f.jsonl' line 57")]


@pytest.mark.parametrize("before", [1, 40])
def test_a_pair_at_fault_is_named_by_its_place(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from itrain.data import CounterfactualDataModule
    from itrain.models import load_embedded
    from itrain.networks.hooks import HookedNetwork

    monkeypatch.setattr(Misspelt, "before", before)
    base, task = load_embedded(), Misspelt()
    task.bind(base.tokenizer)
    with pytest.raises(TaskError, match=r"'f\.jsonl' line 57: .*'wlked', which is not in the model's vocabulary"):
        CounterfactualDataModule(task=task, network=HookedNetwork(base.model), keep="all").setup("fit")


def test_every_listed_pair_is_checked_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from itrain.models import load_embedded
    from itrain.tasks.contract import check_task

    task = Misspelt()
    task.bind(load_embedded().tokenizer)
    (pair, _) = task.pairs("train")
    wrong = Pair(base=pair.base, sources=pair.sources, output="they", place="'f.jsonl' line 57")
    monkeypatch.setattr(Misspelt, "pairs", lambda self, split: [pair] * 40 + [wrong])
    with pytest.raises(TaskError, match=r"outputs lacks 'they', .* for 'f\.jsonl' line 57"):
        check_task(task)
