"""Attributes of entities: labels, pairs of both kinds, and splits."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from itrain.data import CounterfactualDataModule
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.tasks.base import Pair
from itrain.tasks.entity_attributes import EntityAttributes

SPLITS = ("train", "validation", "test")


def drawn(task: EntityAttributes, split: str = "train", count: int = 600) -> list[Pair]:
    random = Random(0)
    return [task.sample(random, split) for _ in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("entities", ["things", "atlas", "geography"])
def test_a_cause_pair_takes_the_value_of_the_source_and_an_isolate_pair_stays(entities: Any) -> None:
    task = EntityAttributes(entities=entities)
    kinds = set()
    for pair in drawn(task):
        ((variable, source),) = pair.sources.items()
        run, other = task.causal_model.run(pair.base), task.causal_model.run(source)
        new = task.causal_model.interchange(pair.base, pair.sources)["answer"]
        assert run[variable] != other[variable]
        assert run["asked"] == other["asked"] and (run["asked"] != variable) == pair.isolates
        assert new == (run["answer"] if pair.isolates else other[variable])
        assert run["answer"] == task.facts[pair.base["entity"]][run["asked"]]
        kinds.add((variable, pair.isolates))
    assert len(kinds) == 6, "each attribute in pairs of both kinds"


def test_the_attributes_that_are_interchanged_can_be_chosen() -> None:
    task = EntityAttributes(attributes=["material"], isolating=0.0)
    assert task.variables == ("material",)
    assert all(set(pair.sources) == {"material"} and not pair.isolates for pair in drawn(task))
    assert len(task.outputs) == 18, "the base may be asked for the others too"


def test_entities_are_unseen_where_entities_are_split() -> None:
    task = EntityAttributes(splits="entity")
    seen = {
        split: {setting["entity"] for pair in drawn(task, split) for setting in (pair.base, *pair.sources.values())}
        for split in SPLITS
    }
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    assert sum(map(len, seen.values())) == len(task.facts)


def test_templates_are_unseen_where_contexts_are_split() -> None:
    task = EntityAttributes(splits="context")
    seen = {
        split: {setting["template"] for pair in drawn(task, split) for setting in (pair.base, *pair.sources.values())}
        for split in SPLITS
    }
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert [len(templates) for templates in seen.values()] == [3, 3, 3]


@pytest.mark.parametrize("entities", ["things", "atlas", "geography"])
def test_the_embedded_model_knows_them_and_the_batch_says_which_pairs_isolate(entities: Any) -> None:
    base_model, task = load_embedded(), EntityAttributes(entities=entities)
    task.bind(base_model.tokenizer)
    data = CounterfactualDataModule(
        task=task, network=HookedNetwork(base_model.model), train_pairs=64, validation_pairs=32, test_pairs=64
    )
    data.setup("fit")
    assert data.model_accuracy["train"] > 0.95
    batch = data.datasets["test"].examples
    assert set(batch.base.spans) == {"entity"}
    assert 0 < int(batch.isolates.sum()) < 64
    assert (batch.changes == ~batch.isolates).all()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"entities": "planets"}, "entities: 'planets' is none of things, atlas, geography, landmarks"),
        ({"entities": "landmarks"}, "isolating: landmarks have one attribute, city; set isolating to 0"),
        ({"splits": "word"}, "splits: 'word' is none of entity, context"),
        ({"attributes": ["weight"]}, "attributes: 'weight' is none of color, material, place"),
    ],
)
def test_unknown_choices_are_refused(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EntityAttributes(**argument)
