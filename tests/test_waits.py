"""A step hands tensors to an accelerator without waiting for it, as far as that can be told without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from itrain.networks.replay.budget import Budget
from itrain.networks.replay.stores import TokenStore, keep, keep_reading
from itrain.sites import Site
from tests.models import HIDDEN, tiny_inputs
from tests.test_plain_lightning import built, words_of

ELSEWHERE = torch.device("meta")
"""Stands for the accelerator: a device that is not the CPU, on which nothing is computed."""
LENGTHS = (5, 5, 5)


class Copies(TorchFunctionMode):
    """Counts the tensors that are copied from the CPU to the other device, and those that are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.blocking = 0

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is Tensor.to and args[0].device.type == "cpu" and found.device == ELSEWHERE:
            self.all += 1
            self.blocking += not (kwargs or {}).get("non_blocking", False)
        return found


def test_what_is_kept_of_examples_is_chosen_without_a_wait() -> None:
    inputs = tiny_inputs(LENGTHS, answer=True)
    inputs.keys  # noqa: B018  (worked out where the batch is made)
    there, store = inputs.to(ELSEWHERE), TokenStore(Budget(1))
    with Copies() as copies:
        keep(store, there, *inputs.extent, [torch.zeros(3, 5, HIDDEN, device=ELSEWHERE)])
    assert store.used == sum(LENGTHS) and store.parts[0].device == ELSEWHERE
    assert copies.all and not copies.blocking


def test_what_is_read_is_kept_without_a_wait() -> None:
    site, inputs = Site.parse("layer0.block_output@last"), tiny_inputs(LENGTHS, answer=True)
    inputs.keys  # noqa: B018
    store = TokenStore(Budget(1))
    with Copies() as copies:
        keep_reading(store, inputs.to(ELSEWHERE), site, torch.zeros(3, 1, HIDDEN, device=ELSEWHERE))
    assert store.used == len(LENGTHS)
    assert copies.all > 4 and not copies.blocking


@pytest.mark.parametrize("bar", [False, True])
def test_the_loss_of_a_step_is_fetched_for_a_progress_bar_alone(bar: bool) -> None:
    module, data, _ = built(words_of("DAS"))
    trainer = lightning.Trainer(
        max_steps=1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bar,
    )
    trainer.fit(module, datamodule=data)
    assert ("train/loss" in trainer.progress_bar_metrics) == bar
    assert "train/loss" in trainer.callback_metrics
