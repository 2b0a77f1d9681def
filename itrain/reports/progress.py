"""A fit's progress: a line of a terminal that fits into 80 letters, or a line a minute in the log of a job."""

from __future__ import annotations

import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
    ProcessingSpeedColumn,
)
from rich import get_console
from rich.progress import ProgressColumn, Task, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

NARROW, SHORT = 100, 20
"""The width of a terminal below which the bar is short, and of that bar."""
PAUSE = 60.0
"""Seconds between two lines in a log."""


class Batches(BatchesProcessedColumn):
    """Batches done, of all."""

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)


class Speed(ProcessingSpeedColumn):
    """Batches a second; nothing while that is not known."""

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.3g} it/s", style=self.style)


class FitProgress(RichProgressBar):
    """Lightning's progress bar with fewer columns: what is done, the time left, the speed and the loss.

    A log keeps no line that is drawn anew, so that without a terminal the fit writes a line a minute.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said = time.monotonic()
        """When the fit has last written to a log."""

    def configure_columns(self, trainer: lightning.Trainer) -> list[ProgressColumn]:
        description, bar, *_ = super().configure_columns(trainer)
        assert isinstance(bar, CustomBarColumn)
        bar.bar_width = SHORT if get_console().width < NARROW else bar.bar_width
        left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
        return [description, bar, Batches(self.theme.batch_progress), left, Speed(self.theme.time)]

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        # The version of a logger's run is no figure of the fit.
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if time.monotonic() - self.said > PAUSE:
            self.said = time.monotonic()
            self._say(trainer, pl_module)

    def _say(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        console = get_console()
        if self.is_disabled or console.is_terminal or console.is_jupyter:
            return
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.get_metrics(trainer, pl_module).items())
        done = f"{trainer.current_epoch}, step {trainer.global_step}"
        console.print(f"epoch {done}: {figures}", soft_wrap=True, highlight=False)
