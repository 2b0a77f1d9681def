"""What tests of sharded runs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
from torch import Tensor


class GlobalLosses(lightning.Callback):
    """Writes the loss of each step, over all processes, to ``losses.json`` in the run's folder."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_before_backward(self, trainer: lightning.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.losses.append(float(trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            Path(trainer.default_root_dir, "losses.json").write_text(json.dumps(self.losses))
