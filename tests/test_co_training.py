"""Co-training of what pairs may be: other objectives, answers of several tokens, variables at sites of their own."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from itrain.data import CounterfactualDataModule, collate
from itrain.interventions.blocks import FixedBlocks
from itrain.interventions.das import DAS
from itrain.networks.hooks import HookedNetwork
from itrain.objectives.cross_entropy import CrossEntropy
from itrain.objectives.distributions import KL
from itrain.tasks.base import Pair
from itrain.training.iit import InterchangeInterventionTraining
from tests.test_iit import HIDDEN, SITE, by_hand, data_for, fp64, training
from tests.test_interchange import QUIET, spelled

# --- objectives


def test_objectives_take_the_place_of_the_cross_entropy_of_counterfactual_answers() -> None:
    objectives = {"kl": partial(KL, target="base", weight=0.25), "ce": partial(CrossEntropy, weight=2.0)}
    weights = {"left": 2.0, "right": 1.0}
    module, batch = fp64(interchange_weights=weights, objectives=objectives)
    losses = by_hand(module.network.model, batch, detach=False)
    of_pairs = torch.tensor([weights.get("+".join(batch.groups[group]), 0.0) for group in batch.group.tolist()])
    found = torch.log_softmax(module.interchange(batch, module.trained), 1)
    unedited = torch.log_softmax(module.network(batch.base), 1)
    kl = (unedited.exp() * (unedited - found)).sum(1)
    logged: dict[str, Tensor] = {}
    module.log_dict = lambda found, **settings: logged.update(found)  # type: ignore[method-assign]
    expected = (losses["task"] + of_pairs * (2 * losses["interchange"] + 0.25 * kl)).mean()
    torch.testing.assert_close(module.training_step(batch, 0), expected, atol=1e-12, rtol=0)
    assert set(logged) == {"train/task_loss", "train/kl_loss", "train/ce_loss"}
    with pytest.raises(ValueError, match="objectives: 'task' names another term"):
        training(objectives={"task": CrossEntropy})


# --- answers of several tokens


def co_trained(network: HookedNetwork, **settings: Any) -> InterchangeInterventionTraining:
    return InterchangeInterventionTraining(
        network=HookedNetwork(network.model.requires_grad_(True), trainable=True),
        sites="layer1.block_output@name",
        intervention=partial(FixedBlocks, blocks={"gender": 16}),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        **settings,
    )


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_each_run_is_asked_for_its_own_answer_of_several_tokens(side: str) -> None:
    """An answer's second token follows its own first one, not that of the counterfactual answer."""
    network, task = spelled(side)
    module = co_trained(network, source_weight=1.0, strict_weight=1.0)
    names = [("John", "Mary"), ("Mary", "John"), ("John", "James"), ("Sarah", "James")]
    pairs = [Pair(base={"name": base}, sources={"gender": {"name": source}}) for base, source in names]
    batch = collate(task, pairs)

    def entropy(name: str) -> float:
        """Of a name's own answer, token after token."""
        setting = {"name": name}
        ids, tokens = task.inputs([setting]).arguments["input_ids"][0].tolist(), task.label(ANSWERS[name])
        found = []
        for token in [tokens] if isinstance(tokens, int) else tokens:
            found.append(-torch.log_softmax(network.model(torch.tensor([ids])).logits[0, -1], 0)[token])
            ids.append(token)
        return float(torch.stack(found).mean())

    expected = [torch.tensor([entropy(pair[place]) for pair in names]) for place in (0, 1)]
    torch.testing.assert_close(module.task_loss(batch), expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(module.source_loss(batch), expected[1], atol=1e-4, rtol=1e-4)
    some = batch.take(torch.tensor([2, 0]))
    torch.testing.assert_close(module.task_loss(some), expected[0][[2, 0]], atol=1e-4, rtol=1e-4)
    # The strict loss where what is resampled is that of the base itself: nothing changes.
    same = collate(task, [Pair(base={"name": name}, sources={"gender": {"name": name}}) for name, _ in names])
    torch.testing.assert_close(module.strict_loss(same), expected[0], atol=1e-4, rtol=1e-4)


ANSWERS = {"John": "he was", "James": "he was", "Sarah": "she", "Mary": "she"}


def test_answers_of_several_tokens_are_co_trained_and_scored() -> None:
    network, task = spelled()
    module = co_trained(network, strict_weight=0.1, source_weight=0.1)
    data = CounterfactualDataModule(
        task=task, network=module.network, train_pairs=48, validation_pairs=8, test_pairs=16, batch_size=8
    )
    runner = lightning.Trainer(max_epochs=3, limit_val_batches=0, **QUIET)
    before = runner.test(module, data, verbose=False)[0]
    runner.fit(module, data)
    after = runner.test(module, data, verbose=False)[0]
    assert before["test/task_accuracy"] == 1 and before["test/iia_changing_argmax"] < 0.5
    assert after["test/iia_changing_argmax"] > 0.9 and after["test/task_accuracy"] == 1
    assert {"test/strict_accuracy", "test/odds"} <= set(after)


# --- variables at sites of their own


def test_variables_are_put_at_sites_of_their_own() -> None:
    """Each at a layer of its own, by its own kind of intervention; a pair may interchange both."""
    places = {
        "left": {"site": SITE, "intervention": partial(FixedBlocks, blocks=3)},
        "right": {"site": "module:top.output", "intervention": partial(DAS, rank=3)},
    }
    model = training().network.model
    module = InterchangeInterventionTraining(
        network=HookedNetwork(model, trainable=True),
        sites=places,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        hidden_sizes=[HIDDEN, HIDDEN],
    )
    runner = lightning.Trainer(max_epochs=12, limit_val_batches=0, **QUIET)
    data = data_for(module)
    before = runner.test(module, data, verbose=False)[0]
    runner.fit(module, data)
    after = runner.test(module, data, verbose=False)[0]
    for group in ("left", "right", "left+right"):
        assert before[f"test/{group}/iia_changing_argmax"] < 0.8
        assert after[f"test/{group}/iia_changing_argmax"] > 0.95
    assert after["test/task_accuracy"] == 1
    # What is right passes through the rest of the lower site, which is no node that strictness could resample.
    assert after["test/strict_accuracy"] < 0.8
