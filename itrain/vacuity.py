"""The vacuity control of a run: what the same fit finds where there is nothing to find, and with a weaker map.

A map that is free enough aligns any algorithm with any network whose activations hold the information (Sutter et al.
2025, "The Non-Linear Representation Dilemma"). So its fit is repeated on a false variable, on a randomly initialised
model, and with less capacity down to a linear map, and their figures stand beside its own.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import lightning
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig

from itrain.data.splits import SplitDataModule
from itrain.interventions.featurizers import Featurizer
from itrain.models import ModelError
from itrain.placements import Placement
from itrain.results.columns import TEST
from itrain.results.vacuity import (
    ANSWERS,
    CHECKED,
    FALSE_VARIABLE,
    LABELS,
    LABELS_BY_HEART,
    LINEAR,
    MODEL,
    VACUITY,
    VACUOUS,
    is_vacuous,
)
from itrain.sites import Site
from itrain.tasks.base import Task
from itrain.trainers import RunError, list_callbacks, trainer_factory
from itrain.training.alignment import AlignmentSearch
from itrain.training.base import Training
from itrain.training.divergence import is_nonlinear

Change = Callable[[Any], Any]
"""Changes what builds an intervention."""


class Control(NamedTuple):
    """A fit that is to find nothing, or less."""

    name: str
    false_task: bool = False
    """Whether it is fitted to variables that the model need not have."""
    random_model: bool = False
    """Whether it is fitted to a randomly initialised model."""
    change: Change = lambda factory: factory
    """How the intervention's factory is changed."""


Build = Callable[[Control], tuple[Training, SplitDataModule]]
"""Builds the run's training for a control, untrained, and its data."""


def planned(cfg: DictConfig, task: Task, module: Training, trainer: lightning.Trainer) -> list[Control]:
    """The controls of a run: those of a non-linear map, or of any map where the key ``vacuity`` says so.

    Raises:
        RunError: controls are asked for, and there can be none.
    """
    asked = cfg.get("vacuity")
    if asked is False or (asked is None and not _is_nonlinear(module)):
        return []
    trains = isinstance(module, AlignmentSearch) and any(each.requires_grad for each in module.exported.parameters())
    if trains and trainer.world_size == 1:
        return list(_controls(task, module))
    if asked:
        raise RunError("vacuity=true: controls are fitted beside AlignmentSearch, in one process; leave it out")
    return []


def unchecked(module: Training) -> dict[str, float]:
    """The figure that says of a non-linear map that it has no controls yet."""
    return {CHECKED: 0.0} if _is_nonlinear(module) else {}


def check(
    cfg: DictConfig, controls: Sequence[Control], build: Build, task: Task, results: Mapping[str, float]
) -> dict[str, float]:
    """Fit the controls one after another; return their figures, and whether one of them aligns as well as the run's.

    Args:
        cfg: the run's configuration.
        controls: those that were planned.
        build: builds each of them.
        task: the run's task.
        results: the run's figures.
    """
    found: dict[str, float] = {CHECKED: 1.0, ANSWERS: float(len(task.outputs))}
    for control in controls:
        try:
            module, data = build(control)
        except ModelError as error:
            warnings.warn(f"vacuity: no control with a {control.name.replace('_', ' ')}: {error}", stacklevel=2)
            continue
        trainer = _trainer(cfg)
        trainer.fit(module, datamodule=data)
        (figures,) = trainer.test(module, datamodule=data, verbose=False)
        found |= _at(f"{VACUITY}/{control.name}", figures)
        if control.name == LABELS:
            seen = data.loader(data.datasets["train"], data.eval_batch_size)
            (figures,) = trainer.test(module, dataloaders=seen, verbose=False)
            found |= _at(f"{VACUITY}/{LABELS_BY_HEART}", figures)
    return found | {VACUOUS: float(is_vacuous({**results, **found}))}


def _controls(task: Task, module: Training) -> Iterator[Control]:
    yield Control(LABELS if task.false_task() is None else FALSE_VARIABLE, false_task=True)
    yield Control(MODEL, random_model=True)
    parts = [part for each in module.trained_parts.values() for part in each.modules()]
    if any(isinstance(each, Featurizer) and each.linear is not None for each in parts):
        yield Control(LINEAR, change=_linear)
    for name in dict.fromkeys(each.capacity for each in parts if isinstance(each, Featurizer) and each.capacity):
        most = max(getattr(each, name) for each in parts if getattr(each, "capacity", None) == name)
        for value in lower(most):
            yield Control(f"{name}_{value}", change=partial(_weakened, name=name, value=value))


def lower(most: int) -> Sequence[int]:
    """The capacities below the given one that are tried: about a tenth and a third of it."""
    return sorted({max(1, most // 10), max(1, most // 3)} - {most})


def sites_changed(sites: Sequence[Placement | Site], change: Change) -> list[Placement | Site]:
    """The sites, with the interventions that some have of their own changed."""
    return [
        replace(each, intervention=change(each.intervention))
        if isinstance(each, Placement) and each.intervention is not None
        else each
        for each in sites
    ]


def _weakened(factory: Any, *, name: str, value: int) -> Any:
    """The factory with the capacity, where its class has one of this name, or that of a factory given to it."""
    given = getattr(factory, "keywords", {})
    changed = {key: _weakened(each, name=name, value=value) for key, each in given.items() if callable(each)}
    if getattr(getattr(factory, "func", factory), "capacity", None) == name:
        changed[name] = min(value, given.get(name, value))
    return partial(factory, **changed) if changed else factory


def _linear(factory: Any) -> Any:
    """The factory of the linear map of the same use, where its class has one, or that of a factory given to it."""
    made, given = getattr(factory, "func", factory), getattr(factory, "keywords", {})
    changed = {key: _linear(each) for key, each in given.items() if callable(each)}
    if (other := getattr(made, "linear", None)) is None:
        return partial(factory, **changed) if changed else factory
    asked = inspect.signature(other).parameters
    return partial(other, **{key: each for key, each in {**given, **changed}.items() if key in asked})


def _is_nonlinear(module: Training) -> bool:
    return any(is_nonlinear(each) for each in module.trained_parts.values())


def _at(place: str, figures: Mapping[str, float]) -> dict[str, float]:
    """The figures of a test, but those of its own controls and groups of variables, at another place."""
    shown = {key.removeprefix(f"{TEST}/"): value for key, value in figures.items() if key.count("/") == 1}
    return {f"{place}/{key}": value for key, value in shown.items() if key.startswith(("iia", "pairs"))}


def _trainer(cfg: DictConfig) -> lightning.Trainer:
    """The trainer of a control, which shows nothing, writes nothing, and ends with the last weights."""
    factory = trainer_factory(cfg)
    callbacks = [each for each in list_callbacks(factory.keywords.get("callbacks")) if not isinstance(each, Checkpoint)]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return factory(**quiet, callbacks=callbacks, logger=False)
