"""Abilities: what a test says of a trained model besides its task, and how much of it was trained."""

from __future__ import annotations

from typing import Any

import lightning
import torch

from itrain.training.base import Training
from itrain.training.callbacks import data_of


class Abilities(lightning.Callback):
    """Adds to a test what the task measures of the model itself, such as ``test/transfer``, and ``test/trained_share``.

    The task says what it measures by ``abilities(model)``, which gives figures by name. The share is that of the
    parameters that are trained, those of interventions among them, in those of the model as it was without adapters.
    A run tests a model that it trains before the fit too, under ``before/``.

    Raises:
        ValueError: the trainer's data have no task with abilities.
    """

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        task: Any = getattr(data_of(trainer), "task", None)
        if not hasattr(task, "abilities"):
            raise ValueError(
                f"callback {type(self).__name__}: {type(task).__name__} measures no abilities; give the task a method "
                "abilities(model) that returns figures by name, or leave the callback out"
            )
        assert isinstance(pl_module, Training), "data modules of splits serve trainings"
        found = dict(task.abilities(pl_module.network.model)) | {"trained_share": trained_share(pl_module)}
        device = pl_module.device
        figures = {f"test/{name}": torch.tensor(value, device=device) for name, value in found.items()}
        pl_module.log_dict(figures, sync_dist=True)


def trained_share(module: Training) -> float:
    """The trained parameters, counted by those of the model as it was before adapters were added."""
    trained = sum(each.numel() for each in module.parameters() if each.requires_grad)
    added = sum(each.numel() for name, each in module.network.named_parameters() if ".lora_" in name)
    return trained / (sum(each.numel() for each in module.network.parameters()) - added)
