"""The trainer of a run, with its callbacks, its loggers and its checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from hydra.utils import get_object, instantiate
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig

from itrain.owned import additions, refuse_owned
from itrain.reports.progress import FitProgress
from itrain.reports.silence import silence_others
from itrain.sharding import ShardedStrategy
from itrain.training.safeguards import safeguard

CHECKPOINTS = "checkpoints"
_LEAST = {
    "gradient_clip_val": 0,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
}


class RunError(ValueError):
    """The run cannot start or go on; the message says why."""


def make_trainer(cfg: DictConfig, folder: Path) -> lightning.Trainer:
    """The trainer of a run: the configured callbacks beside the run's own checkpoint and progress bar."""
    factory = trainer_factory(cfg)
    given = {**factory.keywords, "callbacks": None}
    callbacks = list_callbacks(factory.keywords.get("callbacks"))
    if given.get("enable_checkpointing") is not False:
        own = {"dirpath": folder / CHECKPOINTS, "filename": "last", "save_top_k": 1}
        callbacks.append(ModelCheckpoint(**own, enable_version_counter=False))
    if given.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
        callbacks.append(FitProgress())
    known: dict[str, Callable[[], Any]] = {
        "default_root_dir": lambda: folder,
        "callbacks": lambda: callbacks,
        "logger": lambda: _loggers(cfg, folder),
        "enable_model_summary": lambda: False,
    }
    trainer = factory(**additions("trainer", given, known))
    safeguard(trainer, folder / CHECKPOINTS / "last.ckpt")
    return trainer


def trainer_factory(cfg: DictConfig) -> partial[lightning.Trainer]:
    """The configured trainer, without what a run adds.

    Raises:
        ValueError: a number is out of range that Lightning takes without a word.
    """
    silence_others()  # a trainer says what it has found as soon as it is made
    factory = instantiate(cfg.trainer, _convert_="all")
    for name, least in _LEAST.items():
        if (value := factory.keywords.get(name)) is not None and value < least:
            raise RunError(f"trainer.{name}={value}: give {least} or more, or null")
    if factory.keywords.get("val_check_interval") == 0:
        raise RunError("trainer.val_check_interval=0: give a number of steps or a share of an epoch, or null")
    refuse_owned("trainer", factory.keywords)
    sharded = isinstance(factory.keywords.get("strategy"), ShardedStrategy)
    if sharded and factory.keywords.get("accelerator") in ("gpu", "cuda") and not CUDAAccelerator.is_available():
        raise RunError(
            "trainer=fsdp shards a model over GPUs, and there is none here; on the CPU's processes: trainer=fsdp_cpu"
        )
    return factory


def list_callbacks(callbacks: Any) -> list[lightning.Callback]:
    """The configured callbacks, which are one, a list, or a mapping by name in which null leaves one out."""
    given = callbacks.values() if isinstance(callbacks, Mapping) else callbacks
    return [each for each in (given if isinstance(given, Iterable) else [given]) if each is not None]


def make_logger(cfg: DictConfig, folder: Path) -> Logger | None:
    """The configured logger, beside the result files; it writes to the run's folder unless it names another."""
    if cfg.logger is None:
        return None
    asked = inspect.signature(get_object(cfg.logger._target_)).parameters
    known = {"save_dir": lambda: str(folder)} if "save_dir" in asked else {}
    return instantiate(cfg.logger, **additions("logger", cfg.logger, known), _convert_="all")


def _loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    other = make_logger(cfg, folder)
    return [CSVLogger(folder, name="", version=""), *([] if other is None else [other])]
