"""Rows of a sweep: what is known of a fit besides its figures, and the quiet trainer that finds these."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import lightning
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from itrain.data.pairs import CounterfactualDataModule
from itrain.data.splits import SplitDataModule
from itrain.owned import refuse_in_sweeps
from itrain.results.columns import DATA, DIVERGED, FEATURES, MAJORITY_LABEL
from itrain.sweeps.grid import Fit, Grid
from itrain.trainers import trainer_factory
from itrain.training.safeguards import safeguard

OF_EXAMPLES = (
    *("pairs_changing", "pairs_preserving", "majority_accuracy", "examples", "positives", "negatives"),
    FEATURES,
)
"""Figures that depend on the examples and the site alone, not on the model's weights."""

_PLAIN = {"intervention": "full_vector", "training": "probing"}
"""By group, the choice that has the fewest settings, with which a command names a class."""

Figures = dict[str, Any]
"""The figures of one fit, as in its row."""


def make_trainer(cfg: DictConfig, *callbacks: lightning.Callback) -> lightning.Trainer:
    """The trainer of a fit of a sweep, which shows no progress and writes nothing."""
    factory = trainer_factory(cfg)
    refuse_in_sweeps(factory.keywords)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = factory(**quiet, callbacks=list(callbacks), logger=False)
    safeguard(trainer)
    return trainer


def of_data(data: SplitDataModule) -> dict[str, float]:
    """The figures about the test data itself: how many of its pairs are different ones, and its most frequent label."""
    found = {figure: value for figure, value in data.figures().items() if figure.startswith(DATA)}
    if not isinstance(data, CounterfactualDataModule):
        return found
    pairs = data.datasets["test"].examples
    _, counts = pairs.counterfactual_label[pairs.changes].unique(dim=0, return_counts=True)
    return {**found, MAJORITY_LABEL: float(counts.max() / counts.sum())}


def set_beside(found: dict[str, Figures], again: Mapping[str, Figures], prefix: str) -> None:
    """Add to each row the figures of the same fit to something else: a random model, or a control task."""
    for name, figures in again.items():
        found[name] |= {
            f"{prefix}{figure}": value
            for figure, value in figures.items()
            if isinstance(value, float) and not figure.endswith(OF_EXAMPLES) and DIVERGED not in found[name]
        }


def identity(fit: Fit, grid: Grid) -> dict[str, Any]:
    """The columns of a row that tell its fit from others."""
    component, layer, position = fit.place
    # One kind in a column: numbers, unless modules are named by their paths.
    site = {"component": component, "layer": layer if grid.names_modules else fit.site.layer, "position": position}
    site["window"] = grid.width(fit.site.component)
    return {"method": fit.label, **site, "rank": fit.rank, "seed": fit.seed}


def described(fit: Fit, grid: Grid, cfg: DictConfig) -> dict[str, Any]:
    """The columns of a row besides its figures, among them the command that repeats the fit alone."""
    left = ("sweep", "seed=", "logger")
    own = fit.group == "training" and cfg.sweep.methods[fit.method]._target_ == cfg.training._target_
    if fit.group == "training" and not (own and grid.named):  # What was typed is of the sweep's own training.
        left += ("training",)
    command = ["python", "-m", "itrain", "fit"]
    command += [word for word in grid.words if not word.lstrip("+~").startswith(left)]
    sites = str(fit.site) if len(fit.sites) == 1 else f"[{','.join(map(str, fit.sites))}]"
    choice = [] if own and grid.named else _choice(fit, grid, cfg)
    command += [*choice, f"site={sites}", f"seed={fit.seed}"]
    command += [] if fit.rank is None else [f"intervention.rank={fit.rank}"]
    return {**identity(fit, grid), "command": shlex.join(command)}


def _choice(fit: Fit, grid: Grid, cfg: DictConfig) -> list[str]:
    """The words that choose a fit's method: its name, or the class and all settings of a method of one's own."""
    if grid.named:
        return [f"{fit.group}={fit.method}"]
    node = OmegaConf.to_container(cfg.sweep.methods[fit.method], resolve=True)
    assert isinstance(node, dict)
    settings = [f"{fit.group}.{key}={_written(value)}" for key, value in node.items() if key != "_partial_"]
    return [f"{fit.group}={_PLAIN[fit.group]}", *settings]


def _written(value: Any) -> str:
    """A value in Hydra's syntax."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, str):
        return QuotedString(text=value, quote=Quote.single).with_quotes()
    return json.dumps(value)
