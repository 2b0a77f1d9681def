"""Progress: a line of a terminal that fits into 80 letters, or a line a minute in the log of a job."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
    ProcessingSpeedColumn,
)
from rich import get_console
from rich.console import Console
from rich.progress import ProgressColumn, Task, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

NARROW, SHORT = 100, 20
"""The width of a terminal below which the bar is short, and of that bar."""
PAUSE = 60.0
"""Seconds between two lines in a log."""


class SlowLog:
    """Says a line at most once a minute, where the output is a log, which keeps no line that is drawn anew."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    def say(self, console: Console, line: Callable[[], str]) -> None:
        """Print what ``line`` makes, if it is time to."""
        if time.monotonic() - self.said < PAUSE or console.is_terminal or console.is_jupyter:
            return
        self.said = time.monotonic()
        console.print(line(), soft_wrap=True, highlight=False, markup=False)


class Batches(BatchesProcessedColumn):
    """Batches done, of all."""

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)


class Speed(ProcessingSpeedColumn):
    """Batches a second; nothing while that is not known."""

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Task) -> Text:
        if task.speed is None:
            return Text("")
        return Text(f"{task.speed:.3g} it/s" if task.speed < 999.5 else f"{task.speed:.0f} it/s", style=self.style)


class FitProgress(RichProgressBar):
    """Lightning's progress bar with fewer columns: what is done, the time left, the speed and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.slow_log = SlowLog()

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
        if not self.is_enabled:
            return

        def line() -> str:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in self.get_metrics(trainer, pl_module).items())
            return f"epoch {trainer.current_epoch}, step {trainer.global_step}: {figures}"

        self.slow_log.say(get_console(), line)
