"""What tests of sharded runs share: recipes, callbacks, and how they are started and compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, distributed

from tests.commands import only_run

ROOT = Path(__file__).parents[1]
PAIRS = ["data.train_pairs=77", "data.validation_pairs=33", "data.test_pairs=61", "data.eval_batch_size=32"]
EXAMPLES = ["data.train_examples=77", "data.validation_examples=33", "data.test_examples=41", "data.eval_batch_size=32"]
"""The last batch of each epoch has 13 examples, which two processes cannot divide evenly."""
LOSSES = ["+trainer.callbacks.losses._target_=tests.sharded.GlobalLosses", "trust=[tests]"]
STEPS = ["trainer.max_epochs=4", "data.batch_size=16", "trainer.enable_progress_bar=false", *LOSSES]
"""20 steps."""
# Adam would turn what is rounding alone, the gradient of a key's bias for example, into whole steps.
DESCENT = ["training.optimizer._target_=torch.optim.SGD", "training.optimizer.lr=0.03"]


class GlobalLosses(lightning.Callback):
    """Writes the loss of each step, over all processes, to ``losses.json`` in the run's folder."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_before_backward(self, trainer: lightning.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.losses.append(float(trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            Path(trainer.default_root_dir, "losses.json").write_text(json.dumps(self.losses))


class Killed(lightning.Callback):
    """Kills one process of several at its third step, as a machine without memory does."""

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3 and trainer.global_rank == int(os.environ["KILLED_RANK"]):
            Path(os.environ["KILLED"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)


def in_processes(verb: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as users do."""
    return subprocess.run(
        [sys.executable, "-m", "itrain", verb, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def fit(folder: str, *words: str, **environment: str) -> Path:
    """Run a fit that must succeed; return its folder."""
    done = in_processes("fit", *words, f"output={folder}", **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return only_run(Path(folder))


def saved(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def state(run: Path) -> dict[str, Tensor]:
    return {name: weight for name, weight in saved(run)["state_dict"].items() if weight.is_floating_point()}


def moments(run: Path) -> dict[str, Tensor]:
    """The means of gradients that Adam keeps, by the number of their parameter."""
    (optimizer,) = saved(run)["optimizer_states"]
    return {str(number): each["exp_avg"] for number, each in optimizer["state"].items()}


def figures(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.json").read_text())


def require_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, rel: float = 1e-5) -> None:
    """Refuse tensors that differ by more than this from those expected, each relative to its norm."""
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert type(found[name]) is Tensor, f"{name} is no plain tensor"
        ours, theirs = found[name].double().cpu(), each.double().cpu()
        assert (ours - theirs).norm() <= rel * theirs.norm(), name


@contextmanager
def in_a_group() -> Iterator[None]:
    """A process's group and variables end with it, which this one outlives."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        if distributed.is_initialized():
            distributed.destroy_process_group()
