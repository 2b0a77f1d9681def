"""Safeguards of a run's trainer: stops between two steps, and checkpoints that replace each other whole."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, BinaryIO

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from itrain import stops
from itrain.files import replacing


def safeguard(trainer: lightning.Trainer, checkpoint: Path | None = None) -> None:
    """Give a trainer its safeguards.

    Args:
        trainer: before it has run anything.
        checkpoint: where a fit that is stopped is kept; None: nowhere.
    """
    trainer.callbacks.append(BetweenSteps(checkpoint))  # type: ignore[attr-defined]
    # FSDP writes with several processes, and sets no other way of writing.
    if type(trainer.strategy._checkpoint_io) in (type(None), TorchCheckpointIO):
        trainer.strategy.checkpoint_io = WholeCheckpoints()
    stop = stops.current()
    if stop is not None:
        stop.processes.number = trainer.world_size
        stop.processes.launcher = trainer.strategy.launcher


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside the former one, which stays until the new one is whole.

    Lightning's own way is by a file in TMPDIR, which is copied over the former one where that is another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as beside, beside.open("wb") as file:
            _save(checkpoint, file)


def _forget_requeue(trainer: lightning.Trainer) -> None:
    """Remove what a requeue has kept of a fit that is over: Lightning would test that instead."""
    if trainer.is_global_zero:
        for file in Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"):
            file.unlink()
    trainer.strategy.barrier()


def _save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    """torch.save, with the system's own error where it cannot write."""
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        told: BaseException | None = error
        while told is not None and not isinstance(told, OSError):
            told = told.__context__
        raise (told or error) from None


class BetweenSteps(lightning.Callback):
    """Heeds signals between two steps, and tells the run's watch of each step.

    A fit in one process is kept as it stands then. Several processes do not stop at the same step, so that the
    checkpoint before counts. A fit's validation ends first, as its checkpoint comes after it.

    Args:
        checkpoint: where a fit that is stopped is kept; None: nowhere.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        self.checkpoint = checkpoint
        self._requeue: Any = None
        self._requeued: int | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._begin()
        handler = signal.getsignal(signal.SIGUSR1)
        # Lightning's, which would write a checkpoint from within a step.
        if trainer.world_size == 1 and type(handler).__module__.startswith("lightning."):
            self._requeue = handler
            signal.signal(signal.SIGUSR1, self._note)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._step(began=True)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._mark(ended=True)
        stop = stops.current()
        if stop is None or (stop.signum is None and self._requeued is None):
            return
        # Gradients are in no checkpoint, and an epoch's end has a checkpoint of its own.
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.is_last_batch:
            return
        if self._requeued is not None:
            requeued, self._requeued = self._requeued, None
            self._requeue(requeued, None)
        if stop.signum is not None and self.checkpoint is not None and trainer.world_size == 1:
            trainer.save_checkpoint(self.checkpoint)
        stop.step()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if "SLURM_JOB_ID" in os.environ:
            _forget_requeue(trainer)
        self._end()
        self._step()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._begin()

    def on_validation_batch_start(self, trainer: lightning.Trainer, *hook: Any) -> None:
        self._mark()

    def on_validation_batch_end(self, *hook: Any) -> None:
        self._mark(ended=True)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._begin()

    def on_test_batch_start(self, *hook: Any) -> None:
        self._step(began=True)

    def on_test_batch_end(self, *hook: Any) -> None:
        self._mark(ended=True)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._end()
        self._step()

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def _note(self, signum: int, frame: Any) -> None:
        self._requeued = signum

    def _begin(self) -> None:
        if stop := stops.current():
            # Lightning has put its own handler before: that one ends a run with exit code 0, and may wait for good.
            stop.install()
            stop.steps = True

    def _mark(self, *, ended: bool = False) -> None:
        if stop := stops.current():
            stop.processes.mark(ended=ended)

    def _step(self, *, began: bool = False) -> None:
        if stop := stops.current():
            stop.step()
            if began:
                stop.processes.mark()

    def _end(self) -> None:
        if stop := stops.current():
            stop.steps = False
            stop.processes.mark(ended=True)
