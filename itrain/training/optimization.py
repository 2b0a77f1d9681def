"""The optimizer and schedule that the training modules share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isinf
from typing import Any

import lightning
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerFactory = Callable[[Iterable[dict[str, Any]]], Optimizer]
"""Builds an optimizer from groups of parameters, as :class:`torch.optim.Optimizer` takes them."""


def at_rest(weights: Iterable[Tensor]) -> Tensor | float:
    """0, as a function of weights that a step does not use.

    Processes wait for a gradient of each weight from every one, and optimizers leave out weights that have none.
    """
    return sum((each.nan_to_num(0.0, 0.0, 0.0).sum() * 0 for each in weights), 0.0)


def total_steps(trainer: lightning.Trainer) -> int:
    """The number of optimizer steps of a fit, which its schedules need to know.

    Raises:
        ValueError: it is not known in advance.
    """
    if isinf(trainer.estimated_stepping_batches):
        raise ValueError(
            "schedules need to know the number of steps: set max_epochs or max_steps, also beside max_time"
        )
    return int(trainer.estimated_stepping_batches)


def with_linear_schedule(optimizer: Optimizer, trainer: lightning.Trainer, warmup: float) -> dict[str, Any]:
    """The optimizer with a learning rate that rises linearly over the share ``warmup`` of all steps, then falls to 0.

    lr_t = lr * min((t + 1) / W, (T - t) / (T - W)) for step t of T, with W = warmup * T.

    Raises:
        ValueError: ``warmup`` is not in [0, 1), or no group of parameters has a learning rate.
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup is a share of all steps, from 0 to below 1; got {warmup}")
    if all(group["lr"] == 0 for group in optimizer.param_groups):
        raise ValueError("a learning rate of 0 trains nothing; set training.optimizer.lr=<rate>")
    total = total_steps(trainer)
    rise = warmup * total

    def scale(step: int) -> float:
        return min((step + 1) / rise if rise else 1.0, max(total - step, 0) / (total - rise))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, scale), "interval": "step"}}
