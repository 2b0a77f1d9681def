"""Cause, isolate and disentangle over several attributes: by hand, by an independent average, over processes."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from math import isnan
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from itrain.data import CounterfactualDataModule, collate
from itrain.interventions.controls import FullVector
from itrain.metrics import Disentanglement, disentangled, disentangled_pair
from itrain.networks.hooks import HookedNetwork
from itrain.tasks.base import Question
from itrain.tasks.entity_attributes import EntityAttributes
from itrain.training.alignment import AlignmentSearch

ASKED = (
    Question("city", "Country", "%s is in"),
    Question("city", "Country", "%s lies in"),
    Question("city", "Language", "in %s they speak"),
    Question("city", "Language", "%s speaks"),
    Question("city", "Timezone", "%s has the time of"),
    Question("verb", "Country", "to %s is of"),
    Question("verb", "Tense", "%s:"),
)


def test_prompts_are_averaged_before_attributes_and_these_before_types() -> None:
    right, pairs = torch.tensor([3, 0, 1, 2, 9, 1, 1]), torch.tensor([4, 1, 2, 2, 10, 2, 4])
    found = disentangled(right, pairs, ASKED, ["Country"])
    assert found.cause == pytest.approx(((3 / 4 + 0) / 2 + 1 / 2) / 2)
    city = ((1 / 2 + 1) / 2 + 9 / 10) / 2
    assert found.isolate == pytest.approx((city + 1 / 4) / 2)
    assert found.disentangle == pytest.approx((found.cause + found.isolate) / 2)


def test_a_prompt_without_pairs_counts_for_nothing_and_none_is_nan() -> None:
    right, pairs = torch.tensor([3, 0, 1, 0, 0, 0, 0]), torch.tensor([4, 0, 2, 0, 0, 0, 0])
    found = disentangled(right, pairs, ASKED, ["Country"])
    assert tuple(found) == (0.75, 0.5)
    assert isnan(disentangled(right, pairs, ASKED, ["Tense"]).cause)


def examples(seed: int, count: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {
        "logits": torch.randn(count, 5, generator=made, dtype=torch.float64),
        "label": torch.randint(0, 3, (count,), generator=made),
        "contrast": torch.randint(3, 5, (count,), generator=made),
        "group": torch.randint(0, 2, (count,), generator=made),
        "question": torch.randint(0, len(ASKED), (count,), generator=made),
    }


GROUPS = (("Country",), ("Language",))


def reference(batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """RAVEL's own nesting of means, over the accuracies of single prompts."""
    right = (batch["logits"].argmax(1) == batch["label"]).double().numpy()
    group, question = batch["group"].numpy(), batch["question"].numpy()

    def accuracy(variable: int, attributes: Any) -> float:
        types = []
        for kind in ("city", "verb"):
            of_type = []
            for attribute in sorted({each.attribute for each in ASKED if each.entity_type == kind}):
                prompts = [n for n, each in enumerate(ASKED) if each[:2] == (kind, attribute)]
                cells = [right[(group == variable) & (question == prompt)] for prompt in prompts]
                if attributes(attribute) and any(map(len, cells)):
                    of_type.append(np.mean([each.mean() for each in cells if len(each)]))
            types += [np.mean(of_type)] if of_type else []
        return float(np.mean(types))

    found = {}
    for number, (variable,) in enumerate(GROUPS):
        cause = accuracy(number, lambda attribute, variable=variable: attribute == variable)
        isolate = accuracy(number, lambda attribute, variable=variable: attribute != variable)
        found |= {f"{variable}/cause": cause, f"{variable}/isolate": isolate}
        found[f"{variable}/disentangle"] = 0.5 * (cause + isolate)
    means = {name: float(np.mean([found[f"{group}/{name}"] for (group,) in GROUPS])) for name in ("cause", "isolate")}
    return found | means | {"disentangle": 0.5 * (means["cause"] + means["isolate"])}


def test_the_metric_agrees_with_nested_means_at_fp64() -> None:
    batch = examples(0, 400)
    metric = Disentanglement(groups=GROUPS, asked=ASKED, rule="argmax")
    metric.update(**batch)
    found = metric.compute()
    expected = reference(batch)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, abs=1e-15), name


def test_processes_with_uneven_batches_find_what_one_finds() -> None:
    batch = examples(1, 101)
    whole = Disentanglement(groups=GROUPS, asked=ASKED, rule="pairwise")
    whole.update(**batch)
    parts = [deepcopy(whole) for _ in range(3)]
    for part, rows in zip(parts, (slice(0, 1), slice(1, 60), slice(60, 101)), strict=True):
        part.reset()
        part.update(**{name: value[rows] for name, value in batch.items()})
    for name in ("right", "pairs"):
        setattr(parts[0], name, sum(getattr(part, name) for part in parts))
    assert {name: float(value) for name, value in parts[0].compute().items()} == {
        name: float(value) for name, value in whole.compute().items()
    }


def test_the_score_of_two_attributes_is_their_mean_disentangle() -> None:
    asked = (Question("city", "Country", "%s is in"), Question("city", "Language", "%s speaks"))
    metric = Disentanglement(groups=GROUPS, asked=asked, rule="argmax")
    batch = examples(2, 64)
    batch["question"] %= 2
    metric.update(**batch)
    right, pairs = metric.right.double(), metric.pairs.double()
    (cause_a, isolate_ab), (isolate_ba, cause_b) = (right / pairs).tolist()
    score = disentangled_pair(cause_a, cause_b, isolate_ab, isolate_ba)
    assert float(metric.compute()["disentangle"]) == pytest.approx(score, abs=1e-15)


def test_pairs_that_never_isolate_have_no_such_figures() -> None:
    metric = Disentanglement(groups=[("Country",)], asked=ASKED[:2], rule="argmax")
    batch = examples(3, 8)
    metric.update(**batch | {"group": torch.zeros(8).long(), "question": torch.zeros(8).long()})
    assert metric.compute() == {}


def test_a_set_of_all_attributes_has_a_cause_and_leaves_the_means_to_the_others() -> None:
    metric, alone = (
        Disentanglement(groups=groups, asked=ASKED[:4], rule="argmax")
        for groups in ([("Country",), ("Country", "Language")], [("Country",)])
    )
    batch = examples(4, 90)
    batch["question"] %= 4
    metric.update(**batch)
    first = batch["group"] == 0
    alone.update(**{name: value[first] for name, value in batch.items()})
    found = metric.compute()
    assert {name: found[name] for name in ("cause", "isolate", "disentangle")} == alone.compute()
    assert 0 < found["Country+Language/cause"] < 1 and not any(map(isnan, found.values()))
    own = {f"Country/{name}" for name in alone.compute()}
    assert found.keys() == {*alone.compute(), *own, "Country+Language/cause"}


def test_a_test_has_the_averages_of_all_variables_and_of_each(embedded) -> None:
    """Of the full vector, which swaps every attribute: cause is about 1, isolate about 0."""
    task = EntityAttributes(entities="atlas")
    task.bind(embedded.tokenizer)
    module = AlignmentSearch(
        network=HookedNetwork(embedded.model),
        sites="layer1.block_output@entity",
        intervention=partial(FullVector),
        hidden_sizes=[embedded.model.config.hidden_size],
    )
    batch = collate(task, [task.sample(Random(seed), "test") for seed in range(160)])
    module.scores.begin("validation")
    for rows in torch.arange(160).split(61):
        module.scores.score("validation", batch.take(rows))
    found = module.scores.compute()
    for place in ("validation", *(f"validation/{name}" for name in task.variables)):
        cause, isolate, both = (
            float(found[f"{place}/{name}_averaged_argmax"]) for name in ("cause", "isolate", "disentangle")
        )
        assert cause > 0.9 and isolate < 0.35
        assert both == pytest.approx((cause + isolate) / 2)
    assert found["validation/isolate_argmax"] != found["validation/isolate_averaged_argmax"]


def test_what_pairs_must_know_and_what_asks_nothing_pass_through_the_filter(embedded) -> None:
    """A source without an answer is not asked; a setting that the model gets wrong, though nothing runs it, is."""
    task = EntityAttributes(entities="atlas")
    task.bind(embedded.tokenizer)
    data = CounterfactualDataModule(task=task, network=HookedNetwork(embedded.model))
    pair = task.sample(Random(0), "test")
    assert data._right([pair], "test") == [True]
    wrong = {**pair.base, "answer": "wood"}
    answers = {"wrong": ["wood"], "none": [None]}
    run = task.causal_model.run
    for kind, expected in (("wrong", False), ("none", True)):
        task.causal_model.run = lambda setting, *held, kind=kind: (  # type: ignore[method-assign]
            {**run(pair.base), "answer": answers[kind][0]} if setting is wrong else run(setting, *held)
        )
        known = type(pair)(base=pair.base, sources=pair.sources, isolates=pair.isolates, known=[wrong])
        assert data._right([known], "test") == [expected], kind
    task.causal_model.run = run  # type: ignore[method-assign]
