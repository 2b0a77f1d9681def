"""Strict training keeps answers as they are where what is aligned with no variable is resampled, and says how far."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from itrain.data import CounterfactualBatch
from itrain.interventions.blocks import FixedBlocks
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.metrics import UNUSED, StrictAccuracy, strict_accuracy
from itrain.placements import Placement
from itrain.sites import Site
from itrain.training.iit import InterchangeInterventionTraining
from itrain.training.strict import Outside
from tests.test_iit import HIDDEN, SITE, data_for, fit, fp64, training
from tests.test_interchange import QUIET

TOP = "module:top.output"
NODES = [SITE, TOP]
REST = Placement(write=SITE)


def resampled(model: Any, batch: CounterfactualBatch, node: str) -> Tensor:
    """The answers with a node as in each pair's first source, written for one pair at a time."""
    found = []
    for row in range(len(batch)):
        first = sorted(batch.groups[int(batch.group[row])])[0]  # left before right
        base, source = (each.arguments["input"][row] for each in (batch.base, batch.sources[first]))
        hidden, other = model.hidden(base), model.hidden(source)
        if node == "rest":
            hidden = torch.cat([hidden[:5], other[5:]])  # left has 3 neurons, and right 2
        top = model.top(other if node == "top" else hidden)
        found.append(model.head(torch.tanh(top)))
    return torch.stack(found)


def entropy(logits: Tensor, label: Tensor) -> Tensor:
    return logits.logsumexp(1) - logits[torch.arange(len(label)), label]


# --- what is resampled


@pytest.mark.parametrize("kind", [FixedBlocks, FullRotationDAS])
def test_what_is_outside_comes_from_the_source_and_the_blocks_from_the_base(kind: Any) -> None:
    torch.manual_seed(0)
    blocks = kind(HIDDEN, blocks={"left": 3, "right": 2}).double()
    base, source = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    rotation = blocks.featurizer.encode(torch.eye(HIDDEN, dtype=torch.float64))[0].detach().T
    kept = torch.diag((torch.arange(HIDDEN) < 5).double())
    expected = (
        base @ rotation.T @ kept @ rotation + source @ rotation.T @ (torch.eye(HIDDEN).double() - kept) @ rotation
    )
    new = Outside(HIDDEN, edits=[blocks])(base, source)
    torch.testing.assert_close(new, expected, atol=1e-12, rtol=0)
    one_by_one = Outside(HIDDEN, edits=[blocks.edit_for("left"), blocks.edit_for("right")])
    torch.testing.assert_close(one_by_one(base, source), new, atol=1e-12, rtol=0)


@pytest.mark.parametrize("node", ["rest", "top"])
def test_the_strict_loss_is_that_of_the_formula(node: str) -> None:
    module, batch = fp64(strict_weight=0.5, strict_sites=NODES, siit_sampling="all")
    nodes = module.resampling.nodes(module.trained)
    chosen = {at: each for at, each in nodes.items() if (at == REST) == (node == "rest")}
    assert len(chosen) == 1 and len(nodes) == 2
    expected = resampled(module.network.model, batch, node)
    torch.testing.assert_close(module.resampling.answers(batch, chosen), expected, atol=1e-12, rtol=0)


def test_the_strict_weight_counts_once() -> None:
    """A weight inside the loss and again in the step is its square."""
    module, batch = fp64(task_weight=0.0, interchange_weights=0.0, strict_weight=0.5)
    losses = entropy(resampled(module.network.model, batch, "rest"), batch.base_label)
    torch.testing.assert_close(module.terms(batch)["strict"][1], losses, atol=1e-12, rtol=0)
    torch.testing.assert_close(module.training_step(batch, 0), 0.5 * losses.mean(), atol=1e-12, rtol=0)


def test_strict_gradients_flow_through_the_sources_unless_they_are_detached() -> None:
    found = {}
    for detach in (False, True):
        module, batch = fp64(task_weight=0.0, interchange_weights=0.0, strict_weight=1.0, detach_source=detach)
        module.training_step(batch, 0).backward()
        model: Any = module.network.model
        found[detach] = model.hidden[0].weight.grad
    assert bool(found[False][5:].any()) and not bool(found[True][5:].any()), "of the neurons that are resampled"


def test_a_step_draws_its_nodes_by_its_number_alone() -> None:
    def draws(sampling: Any) -> list[list[str]]:
        module = training(strict_sites=[*NODES, "module:act.output"], siit_sampling=sampling, strict_weight=1.0)
        return [[str(each) for each in module.resampling.drawn(step)] for step in range(64)]

    assert {len(each) for each in draws("individual")} == {1}
    assert len({each[0] for each in draws("individual")}) == 3
    assert {len(each) for each in draws("all")} == {3}
    assert {len(each) for each in draws("sample_all")} == {0, 1, 2, 3}
    assert draws("sample_all") == draws("sample_all")


def test_a_step_that_draws_no_node_has_the_answers_of_the_bases() -> None:
    module, batch = fp64(strict_weight=1.0, siit_sampling="sample_all")
    assert torch.equal(module.resampling.answers(batch, {}), module.network(batch.base))
    fit(training(strict_weight=1.0, siit_sampling="sample_all"), epochs=1)


def test_a_site_of_one_variable_of_its_intervention_leaves_the_block_of_the_other() -> None:
    """Each variable at a site of its own, by an intervention with blocks for both."""
    places = [Placement(write=SITE, variables=("left",)), Placement(write=Site.parse(TOP), variables=("right",))]
    module = InterchangeInterventionTraining(
        network=training().network,
        sites=places,
        intervention=partial(FixedBlocks, blocks={"left": 4, "right": 4}),
        hidden_sizes=[HIDDEN, HIDDEN],
    )
    base, source = torch.zeros(1, HIDDEN), torch.ones(1, HIDDEN)
    nodes = module.resampling.nodes(module.trained)
    swapped = {str(at.write): each(base, source)[0].tolist() for at, each in nodes.items()}
    assert swapped == {str(SITE): [0.0] * 4 + [1.0] * 4, TOP: [1.0] * 4 + [0.0] * 4}


def test_there_is_no_node_where_nothing_is_left() -> None:
    for intervention in (FullVector, partial(FixedBlocks, blocks={"left": 4, "right": 4})):
        assert not training(intervention=intervention).resampling.nodes(training(intervention=intervention).trained)
        with pytest.raises(ValueError, match="strict_weight: nothing can be resampled"):
            training(intervention=intervention, strict_weight=1.0)
    assert training(intervention=FullVector, strict_weight=1.0, strict_sites=[TOP])
    places = [Placement(write=SITE, variables=(name,)) for name in ("left", "right")]
    shared = InterchangeInterventionTraining(
        network=training().network, sites=places, intervention=partial(DAS, rank=4), hidden_sizes=[8, 8], shared=True
    )
    assert len(shared.resampling.nodes(shared.trained)) == 1, "one subspace of 4 in 8, for both variables"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strict_sites": [SITE], "intervention": FullVector}, f"the interventions at '{SITE}' leave none"),
        ({"strict_sites": [TOP, TOP]}, "is listed twice"),
        ({"siit_sampling": "each"}, "siit_sampling: 'each' is none of individual, sample_all, all"),
        ({"siit_sampling": "all"}, "siit_sampling=all has no effect: strict_weight is 0"),
        ({"strict_weight": -1.0}, "strict_weight"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training(**settings)


def test_a_node_that_the_model_lacks_is_refused_before_the_fit() -> None:
    assert set(training(strict_sites=[TOP]).resampling.nodes({})) == {Placement(write=Site.parse(TOP))}
    module = training(strict_sites=["module:nowhere.output"])
    with pytest.raises(ValueError, match="nowhere"):
        lightning.Trainer(max_epochs=1, **QUIET).fit(module, data_for(module))


# --- strict accuracy


def test_strict_accuracy_is_the_mean_over_nodes_however_pairs_are_batched() -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(3, 40, 5), torch.randint(5, (40,))
    by_hand = sum(int(logits[node, row].argmax() == label[row]) for node in range(3) for row in range(40)) / 120
    assert float(strict_accuracy(list(logits), label)) == pytest.approx(by_hand)
    metric = StrictAccuracy()
    for rows in (slice(0, 7), slice(7, 40)):
        for node in logits:
            metric.update(node[rows], label[rows])
    assert float(metric.compute()) == pytest.approx(by_hand)


def test_bases_whose_answer_is_not_known_do_not_count() -> None:
    module, batch = fp64()
    known = torch.arange(24) < 6
    right = module.network(batch.base).argmax(1)
    batch = replace(batch, base_label=torch.where(known, right.roll(1), UNUSED))
    module.begin("validation")
    module.score("validation", batch)
    found = module.figures("validation")
    assert float(found["validation/task_accuracy"]) == pytest.approx(float((right == right.roll(1))[:6].float().mean()))
    (node,) = module.resampling.nodes(module.trained).items()
    answers = module.resampling.answers(batch, dict([node]))
    expected = (answers.argmax(1) == batch.base_label)[:6].double().mean()
    assert float(found["validation/strict_accuracy"]) == pytest.approx(float(expected))


def test_figures_of_a_test_are_those_of_each_node_alone() -> None:
    module, batch = fp64(strict_sites=NODES)
    batch = replace(batch, base_label=batch.base_label.roll(3))  # some right, some wrong
    module.begin("validation")
    for rows in (torch.arange(10), torch.arange(10, 24)):
        module.score("validation", batch.take(rows))
    found = module.figures("validation")["validation/strict_accuracy"]
    answers = [resampled(module.network.model, batch, node) for node in ("rest", "top")]
    torch.testing.assert_close(found, strict_accuracy(answers, batch.base_label))
    assert "test/strict_accuracy" not in module.figures("test"), "each once"


def test_strict_training_raises_strict_accuracy_and_keeps_the_task() -> None:
    """Trained on the task alone, a network uses the neurons of no block as much as those of blocks."""
    found = {}
    for weight in (0.0, 1.0):
        module = training(strict_weight=weight, interchange_weights=0.0)
        data = data_for(module)
        runner = lightning.Trainer(max_epochs=6, limit_val_batches=0, **QUIET)
        runner.fit(module, data)
        found[weight] = runner.test(module, data, verbose=False)[0]
    assert found[0.0]["test/strict_accuracy"] < 0.9 and found[1.0]["test/strict_accuracy"] > 0.98
    assert found[1.0]["test/task_accuracy"] == 1
