"""Callbacks that every fit has."""

from __future__ import annotations

from typing import Any

import lightning
from torch import nn


class FirstStepError(RuntimeError):
    """The first step shows that a fit cannot learn."""


class Annealing(lightning.Callback):
    """Moves what schedules rule from its start, at the first step, to exactly its end at the last one.

    progress = t / (T - 1) at step t of T.
    """

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        last = int(trainer.estimated_stepping_batches) - 1
        pl_module.anneal(trainer.global_step / last if last else 1.0)  # type: ignore[operator]


class Curves(lightning.Callback):
    """Keeps the figures of each of a cohort's validations, for a run whose figures no logger writes."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.epochs.append({"epoch": trainer.current_epoch, **pl_module.found})  # type: ignore[dict-item]

    def of(self, name: str) -> list[dict[str, float]]:
        """The epochs of one member of a cohort."""
        place = f"{name}/"
        return [
            {key.removeprefix(place): value for key, value in epoch.items() if key == "epoch" or key.startswith(place)}
            for epoch in self.epochs
        ]


class FirstStepCheck(lightning.Callback):
    """Ends a fit at its first backward pass if some trained module got no gradient.

    An edit that the answer cannot see gives a finite loss and numbers that look like a result: the last block at a
    token that no later one reads, or a site above the answer.

    Raises:
        FirstStepError: naming the site.
    """

    def __init__(self) -> None:
        self.done = False

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.done:
            return
        self.done = True
        for name, part in pl_module.trained_parts.items():  # type: ignore[union-attr]
            if not _has_gradient(part):
                raise FirstStepError(
                    f"site '{name}': nothing that {type(part).__name__} does there reaches the label (no gradient "
                    "at the first step); choose a lower layer, or in the upper ones the answer's own token, 'last'"
                )


def _has_gradient(part: nn.Module) -> bool:
    trainable = [parameter for parameter in part.parameters() if parameter.requires_grad]
    return not trainable or any(p.grad is not None and bool(p.grad.count_nonzero()) for p in trainable)
