"""Co-training of what pairs may be: other objectives, answers of several tokens, variables at sites of their own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from itrain.objectives.cross_entropy import CrossEntropy
from itrain.objectives.distributions import KL
from tests.test_iit import by_hand, fp64, training

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
