"""Callbacks of a fit's life, which training modules bring along: Trainer.fit alone is a whole fit."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from itrain.data.splits import SplitDataModule


class FirstStepError(RuntimeError):
    """The first step shows that a fit cannot learn."""


class Preparation(lightning.Callback):
    """Has the module learn its closed-form statistics and make the network ready, before anything else of a fit.

    A module without trained weights, such as a difference of means, is then done. A test, a validation or a prediction
    of a module that was not fitted learns the statistics first.

    Raises:
        ValueError: statistics are asked for, and what the trainer was given does not hold all training data.
    """

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if (data := _data(trainer)) is not None:
            pl_module.prepare(data, uses=epochs_of(trainer))
        elif pl_module.fits_activations and not pl_module.fitted:
            if trainer.world_size > 1:
                raise ValueError(_NO_DATA.format(type(pl_module).__name__))
            assert trainer.estimated_stepping_batches, "asking for their number loads the batches"
            pl_module.fit_activations(trainer.train_dataloader)
            pl_module.fitted = True
        if not any(parameter.requires_grad for parameter in pl_module.parameters()):
            trainer.should_stop = True

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        _require_statistics(trainer, pl_module)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        _require_statistics(trainer, pl_module)

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        _require_statistics(trainer, pl_module)


_NO_DATA = (
    "{} learns statistics of all training data, the same in every process: give the trainer a data module, "
    "datamodule=CounterfactualDataModule(...), or call fit_activations(batches) first"
)


def epochs_of(trainer: lightning.Trainer) -> int | None:
    """How many epochs a fit goes on; None: that depends."""
    return trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None


def _data(trainer: lightning.Trainer) -> SplitDataModule | None:
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, SplitDataModule) else None


def _require_statistics(trainer: lightning.Trainer, pl_module: Any) -> None:
    if pl_module.fitted or not pl_module.fits_activations:
        return
    if (data := _data(trainer)) is None:
        raise ValueError(_NO_DATA.format(type(pl_module).__name__))
    # Evaluation runs in inference mode, whose tensors no later gradient may pass.
    with torch.inference_mode(False):
        pl_module.prepare(data)


class Schedules(lightning.Callback):
    """Moves what schedules rule from its start, at the first step, to exactly its end at the last one.

    progress = t / (T - 1) at step t of T. A fit that goes on from a checkpoint begins at the rate that its schedule has
    there, not at that of the checkpoint: a finished run's is 0.
    """

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            if isinstance(scheduler, LambdaLR):
                groups = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
                for group, rate, scale in groups:
                    group["lr"] = rate * scale(scheduler.last_epoch)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        last = int(trainer.estimated_stepping_batches) - 1
        pl_module.anneal(trainer.global_step / last if last > 0 else 1.0)


class FirstStepCheck(lightning.Callback):
    """Ends a fit at its first backward pass if some trained module got no gradient.

    An edit that the answer cannot see gives a finite loss and numbers that look like a result: the last block at a
    token that no later one reads, or a site above the answer.

    Raises:
        FirstStepError: naming the site.
    """

    def __init__(self) -> None:
        self.done = False

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self.done:
            return
        self.done = True
        for name, part in pl_module.trained_parts.items():
            if not _has_gradient(part):
                raise FirstStepError(
                    f"site '{name}': nothing that {type(part).__name__} does there reaches the label (no gradient "
                    "at the first step); choose a lower layer, or in the upper ones the answer's own token, 'last'"
                )


def _has_gradient(part: nn.Module) -> bool:
    trainable = [parameter for parameter in part.parameters() if parameter.requires_grad]
    return not trainable or any(p.grad is not None and bool(p.grad.count_nonzero()) for p in trainable)
