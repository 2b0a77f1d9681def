"""Callbacks that training modules add to a fit, so that Trainer.fit alone is a whole fit."""

from __future__ import annotations

import os
import random
import signal
import threading
from types import FrameType
from typing import Any

import lightning
import numpy
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from itrain.data.splits import SplitDataModule
from itrain.interventions.masking import Gate
from itrain.stops import Stopped, current
from itrain.training.building import require_meant
from itrain.training.optimization import total_steps


class FirstStepError(RuntimeError):
    """The first step shows that a fit cannot learn."""


class FitCallback(lightning.Callback):
    """A callback for one module: trainers keep callbacks when another module follows.

    Args:
        module: the training whose fits it serves.
    """

    def __init__(self, module: lightning.LightningModule) -> None:
        self.module = module


class Preparation(FitCallback):
    """Fits the module's closed-form statistics and prepares the network, before anything else in a fit.

    The fit then ends if the module has no trained weights, such as a difference of means. A test, a validation or a
    prediction fits statistics that are not known yet.

    Raises:
        ValueError: the trainer was not given all training data that statistics need.
    """

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if pl_module is not self.module:
            return
        modes = {module: module.training for module in pl_module.network.modules()}
        pl_module.train()
        for module, mode in modes.items():
            module.training = mode
        if (data := data_of(trainer)) is not None:
            pl_module.prepare(data, uses=epochs_of(trainer))
        elif not pl_module.finds_edits:
            require_meant(pl_module.trained_parts, None)
        if data is None and pl_module.fits_activations:
            assert trainer.estimated_stepping_batches, "asking for their number loads the batches"
            if pl_module.lacks_statistics_of(loader := trainer.train_dataloader):
                if trainer.world_size > 1:
                    raise ValueError(_NO_DATA.format(type(pl_module).__name__))
                pl_module.fit_activations(map(trainer.precision_plugin.convert_input, loader or ()))
                pl_module.fitted_to = loader
        if not any(parameter.requires_grad for parameter in pl_module.parameters()):
            trainer.should_stop = True

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._require_statistics(trainer, pl_module)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._require_statistics(trainer, pl_module)

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._require_statistics(trainer, pl_module)

    def _require_statistics(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if pl_module is not self.module or not pl_module.fits_activations:
            return
        unknown = (each.is_floating_point() and bool(each.isnan().any()) for each in pl_module.exported.buffers())
        if not any(unknown):
            return
        if (data := data_of(trainer)) is None:
            raise ValueError(_NO_DATA.format(type(pl_module).__name__))
        # Evaluation runs in inference mode, whose tensors cannot take part in a later backward pass.
        with torch.inference_mode(False):
            pl_module.prepare(data)


_NO_DATA = (
    "{} learns statistics of all training data, the same in every process: give the trainer a data module, "
    "datamodule=CounterfactualDataModule(...), or call fit_activations(batches) first"
)


def epochs_of(trainer: lightning.Trainer) -> int | None:
    """The number of epochs of a fit; None: not known in advance."""
    return trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None


def data_of(trainer: lightning.Trainer) -> SplitDataModule | None:
    """The trainer's data module, if it is one of splits."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, SplitDataModule) else None


class Schedules(FitCallback):
    """Moves scheduled values from their start, at the first step, to exactly their end, at the last.

    progress = t / (T - 1) at step t of T. A resumed fit begins at the learning rate of its own schedule at that step,
    not at the checkpoint's, which is 0 after a finished run. Random numbers are those of the step: see
    :class:`Randomness`.
    """

    def __init__(self, module: lightning.LightningModule) -> None:
        super().__init__(module)
        self.randomness = Randomness(module)

    def state_dict(self) -> dict[str, Any]:
        return self.randomness.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.randomness.saved = dict(state_dict)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if pl_module is not self.module:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler) and len(set(callback.scheduling.values())) > 1:
                raise ValueError(
                    "schedules need to know the number of steps, which GradientAccumulationScheduler changes during "
                    "the fit; use accumulate_grad_batches=<n>"
                )
        self.randomness.begin()
        # Processes that split a model's blocks draw alike.
        self.share = (trainer.distributed_sampler_kwargs or {}).get("rank", 0)
        self.last = total_steps(trainer) - 1
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            if isinstance(scheduler, LambdaLR):
                groups = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
                for group, rate, scale in groups:
                    group["lr"] = rate * scale(scheduler.last_epoch)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module is self.module:
            pl_module.anneal(min(trainer.global_step / self.last, 1.0) if self.last > 0 else 1.0)
            self.randomness.step(trainer.current_epoch, batch_idx, self.share, pl_module.device)


class Termination(lightning.Callback):
    """Has SIGTERM end a script that calls a trainer as it ends other programs: with code 143, a second one at once.

    Lightning ends the step and then the process, with exit code 0; in the last batch of a test it forgets the signal.
    Where a command of itrain runs, or somebody else handles SIGTERM, it is left to them.
    """

    alone = False

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        self.alone = in_main and current() is None and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._end_by_second()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._end_by_second()

    def on_test_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._end_by_second()

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._end_by_second()

    def _end_by_second(self) -> None:
        """Put a handler over Lightning's, which takes both away at the end."""
        handler = signal.getsignal(signal.SIGTERM)
        if self.alone and callable(handler) and not isinstance(handler, _Twice):
            signal.signal(signal.SIGTERM, _Twice(handler))

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self.alone and trainer.received_sigterm and isinstance(exception, SystemExit):
            stopped = Stopped(signal.SIGTERM)
            exception.code = stopped.code
            rank_zero_warn(f"{stopped} at step {trainer.global_step}; {_kept(trainer)}")

    def teardown(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        if self.alone and trainer.received_sigterm:
            raise SystemExit  # in the last batch of a test


class _Twice:
    """A handler of SIGTERM that ends the process when the signal comes again."""

    def __init__(self, handler: Any) -> None:
        self.handler, self.came = handler, False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.came:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.came = True
        self.handler(signum, frame)


def _kept(trainer: lightning.Trainer) -> str:
    """Which checkpoint a fit goes on from, after it was stopped."""
    known = [path for each in trainer.checkpoint_callbacks for path in _paths_of(each) if os.path.exists(path)]
    if known:
        return f"its newest checkpoint is '{max(known, key=os.path.getmtime)}': trainer.fit(..., ckpt_path=...) goes on"
    return "nothing was saved: the callback ModelCheckpoint keeps checkpoints"


def _paths_of(callback: Any) -> list[str]:
    return [path for name in ("last_model_path", "best_model_path") if (path := getattr(callback, name, ""))]


class Randomness:
    """Makes torch's random numbers of a training step a function of the seed, the epoch, the batch and the process.

    A fit that is resumed, at an epoch's end or within one, then draws what it would have drawn: dropout, for example.
    Whatever else draws numbers between two steps, such as a loader's workers, changes nothing. The seed is torch's at
    the start of the fit. It is kept in checkpoints, with the seeds of random gates and with the states of Python's and
    numpy's generators, from which nothing here draws.

    Args:
        module: the training whose fits it serves.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.seed = 0
        self.saved: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain data."""
        version, numbers, gauss = random.getstate()
        legacy: Any = numpy.random.get_state()
        kind, keys, *rest = legacy
        return {
            "seed": self.seed,
            "gates": {name: each.seed for name, each in _random_gates(self.module)},
            "python": [version, list(numbers), gauss],
            "numpy": [kind, keys.tolist(), *rest],
        }

    def begin(self) -> None:
        """Begin a fit, from what a checkpoint has kept if there is one."""
        saved, self.saved = self.saved, {}
        self.seed = saved.get("seed", torch.initial_seed())
        if not saved:
            return
        for name, gate in _random_gates(self.module):
            gate.seed = saved["gates"].get(name, gate.seed)
        version, numbers, gauss = saved["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, *rest = saved["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))

    def step(self, epoch: int, batch: int, rank: int, device: torch.device) -> None:
        """Seed torch's generators for a training step."""
        number = (((self.seed * 1_000_003 + epoch) * 1_000_003 + batch) * 1_000_003 + rank) % 2**63
        # Not torch.manual_seed, which on a machine without an accelerator takes longer than a small model's block.
        torch.default_generator.manual_seed(number)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(number)


def _random_gates(module: nn.Module) -> list[tuple[str, Gate]]:
    return [(name, each) for name, each in module.named_modules() if isinstance(each, Gate) and each.seed is not None]
