"""Held-out pairs are held out: none is trained on and tested, none is counted twice, and what is short is said."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from itrain.causal_model import CausalModel
from itrain.data import CounterfactualDataModule, PairError
from itrain.data.answered import Answered
from itrain.models import load_embedded
from itrain.models.twin import with_random_weights
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.tasks.base import Pair, Split
from itrain.tasks.gender import Gender
from itrain.training.probing import ProbeTraining
from tests.test_task_contract import LETTERS, Alike, data


def identities(made: CounterfactualDataModule, split: Split) -> list[tuple[float, ...]]:
    examples = made.datasets[split].examples
    rows = torch.cat([examples.base.arguments["letters"], examples.sources["same"].arguments["letters"]], 1)
    return [tuple(row) for row in rows.tolist()]


class Few(Alike):
    """64 settings, and 4096 pairs of them."""

    causal_model = CausalModel(
        inputs={"w": LETTERS, "x": LETTERS, "y": [0]},
        mechanisms={"same": lambda w, x: w == x, "answer": lambda same: same},
        output="answer",
    )


def test_no_pair_of_a_task_that_ignores_its_split_is_trained_on_and_tested() -> None:
    made = data(Few(), train_pairs=2000, validation_pairs=200, test_pairs=200)
    train, validation, test = (identities(made, split) for split in ("train", "validation", "test"))
    assert len(set(train)) < len(train), "training pairs are as the task samples them"
    assert len(set(test)) == len(test) == 200 and len(set(validation)) == 200
    assert not set(train) & set(test) and not set(train) & set(validation) and not set(validation) & set(test)
    figures = made.figures()
    assert figures["data/pairs_distinct"] == 200 and figures["data/bases_distinct"] <= 64
    assert figures["data/bases_trained_on"] == 200
    assert made.describe()["note"] == "200 of the test bases are bases of training pairs too, with other sources"


def test_probes_are_not_tested_on_bases_that_they_are_trained_on() -> None:
    made = data(Few(), train_pairs=500, test_pairs=40)
    module = ProbeTraining(network=made.network, sites="module:read.output", classes={"same": 2}, hidden_sizes=[3])
    with pytest.raises(
        ValueError, match=r"\d+ of the 40 test bases of Few are trained on; let sample\(\) draw each split"
    ):
        module.prepare(made)


def test_what_a_model_does_not_see_makes_no_other_pair() -> None:
    """Settings may differ in words that their template has no place for."""
    task = Gender(templates="simple", verbs=["walked"], connectives=["because"], male_names=None)
    task.bind(load_embedded().tokenizer)
    one, other = (task.sample(Random(seed), "test").base for seed in (1, 2))
    assert task.identity({**one, "other": other["other"]}) == task.identity(one) != task.identity(other)


def test_a_task_with_fewer_pairs_than_asked_gives_all_that_it_has_and_says_so() -> None:
    class Quarter(Few):
        """16 pairs in the test split, none of them in another."""

        def sample(self, random: Random, split: Split) -> Pair:
            letters = (0, 1) if split == "test" else range(2, 8)
            base, source = ({"w": random.choice(letters), "x": random.choice(letters), "y": 0} for _ in range(2))
            return Pair(base=base, sources={"same": source})

    made = data(Quarter(), test_pairs=64)
    assert len(made.datasets["test"]) == 16 and made.figures()["data/pairs_distinct"] == len(made.datasets["test"])
    assert " of 64: the task has no more" in made.describe()["pairs"]


def test_a_task_that_leaves_no_pair_out_is_refused_unless_it_says_so() -> None:
    class Tiny(Few):
        def setting(self, random: Random) -> dict[str, Any]:
            return {"w": random.choice((0, 1)), "x": 0, "y": 0}

    with pytest.raises(
        PairError, match=r"Tiny samples no validation pair that is in no earlier split.*exhaustive = True"
    ):
        data(Tiny(), train_pairs=200)
    known = type("Known", (Tiny,), {"exhaustive": True})()
    made = data(known, train_pairs=200)
    assert len(made.datasets["test"]) == 32 and made.figures()["data/pairs_distinct"] == 4
    assert made.describe()["note"] == "Known holds no pairs out: its test pairs are among those trained on"


# --- what is shown


def test_the_first_prompt_is_shown_with_tokens_answer_and_spans() -> None:
    base_model, task = load_embedded(), Gender(templates="simple")
    task.bind(base_model.tokenizer)
    made = CounterfactualDataModule(task=task, network=HookedNetwork(base_model.model), train_pairs=8)
    made.setup("fit")
    lines, first = made.describe(), made.datasets["train"].examples
    words = first.base.texts[0].split()
    (answer,) = base_model.tokenizer.convert_ids_to_tokens(first.base_label[:1].tolist())
    assert lines["prompt"] == f"<|endoftext|> | {' | '.join(words)} -> {answer}"
    assert lines["spans"] == f"@connective {words[2]}, @name {words[0]}, @verb {words[1]}"
    assert "prompt" not in data(Alike()).describe()


def test_a_base_model_that_cannot_do_the_task_is_said_to_be_why_pairs_are_few() -> None:
    """At chance, what the filter leaves is luck: the summary says so before anything is trained."""
    task = Gender(templates="simple")
    model = load_embedded()
    task.bind(model.tokenizer)
    twin = with_random_weights(model, seed=0)
    found = {}
    for name, each in {"trained": model, "random": twin}.items():
        network = make_network(each.model)
        made = CounterfactualDataModule(task=task, network=network, train_pairs=16, validation_pairs=8, test_pairs=400)
        made.setup("test")
        found[name] = made.describe()
    assert "chance" not in found["trained"] and "fails" not in found["trained"]["pairs"]
    assert "the model as it is does not do this task" in found["random"]["chance"]


@pytest.mark.parametrize(
    ("accuracy", "labels", "accused"),
    [
        (1.0, "aaab" * 2, False),  # too few inputs to tell apart
        (1.0, "a" * 199 + "b", False),  # nearly all have one label
        (0.75, "aaab" * 2, True),
        (0.3, "abcd" * 3, True),
        (0.52, "ab" * 100, True),
        (0.6, "ab" * 200, False),
        (0.85, "aaaab" * 100, False),
        (0.8, "aaaab" * 100, True),
    ],
)
def test_a_model_that_is_right_is_not_accused_where_inputs_are_few_or_alike(
    accuracy: float, labels: str, accused: bool
) -> None:
    assert bool(Answered.of(accuracy, list(labels)).warning) is accused
