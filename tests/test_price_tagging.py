"""Price tagging: labels, balance and splits."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from itrain.data import CounterfactualDataModule
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.tasks.base import Pair
from itrain.tasks.price_tagging import PriceTagging


def drawn(task: PriceTagging, split: str = "train", count: int = 4000) -> list[Pair]:
    random = Random(0)
    return [task.sample(random, split) for _ in range(count)]  # type: ignore[arg-type]


def answers(task: PriceTagging, pair: Pair) -> tuple[str, str]:
    return task.causal_model.run(pair.base)["answer"], task.causal_model.interchange(pair.base, pair.sources)["answer"]


@pytest.mark.parametrize(("low", "high", "price", "answer"), [(3, 9, 3, "Yes"), (3, 9, 9, "Yes"), (3, 9, 2, "No")])
def test_both_bounds_are_part_of_the_range(low: int, high: int, price: int, answer: str) -> None:
    assert PriceTagging().causal_model.run({"low": low, "high": high, "price": price})["answer"] == answer


@pytest.mark.parametrize("variable", ["above", "below"])
def test_no_constant_answer_does_better_than_half(variable: str) -> None:
    """Labels that change do so both ways equally often, and base and counterfactual labels are balanced."""
    task = PriceTagging(variable=variable)  # type: ignore[arg-type]
    counts = Counter(answers(task, pair) for pair in drawn(task))
    for before in ("Yes", "No"):
        for after in ("Yes", "No"):
            assert counts[before, after] / 4000 == pytest.approx(0.25, abs=0.03)


def test_both_variables_of_a_source_vary_where_the_label_allows() -> None:
    task = PriceTagging(variable="below")
    runs = Counter(
        (task.causal_model.run(pair.sources["below"])["below"], task.causal_model.run(pair.sources["below"])["above"])
        for pair in drawn(task)
    )
    assert runs.keys() == {(True, True), (True, False), (False, True)}
    assert min(runs.values()) > 600


def test_splits_have_no_question_in_common() -> None:
    task, seen = PriceTagging(), []
    for split in ("train", "validation", "test"):
        pairs = drawn(task, split)
        seen.append({tuple(question.values()) for pair in pairs for question in (pair.base, *pair.sources.values())})
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_the_embedded_model_answers_and_the_numbers_are_named() -> None:
    base_model, task = load_embedded(), PriceTagging()
    task.bind(base_model.tokenizer)
    data = CounterfactualDataModule(
        task=task, network=HookedNetwork(base_model.model), train_pairs=64, validation_pairs=32, test_pairs=32
    )
    data.setup("fit")
    assert data.model_accuracy["train"] > 0.95
    base = data.datasets["test"].examples.base
    assert set(base.spans) == {"low", "high", "price"}
    words = base.texts[0].split()
    assert words[int(base.spans["price"][0, 0]) - 1] == words[-3]


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(ValueError, match="variable: 'between' is none of above, below"):
        PriceTagging(variable="between")  # type: ignore[arg-type]
