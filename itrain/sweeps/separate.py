"""Fits of a sweep that share no run: of trainings of their own objective, such as ReFT, and of co-training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning
from hydra.utils import instantiate
from omegaconf import DictConfig

from itrain.opening import Opened, base_model_of
from itrain.results.columns import DIVERGED, RANDOM_MODEL, TEST
from itrain.sweeps.grid import Fit, Grid
from itrain.sweeps.rows import Figures, described, make_trainer, of_data, set_beside
from itrain.training.callbacks import epochs_of
from itrain.training.finite import NotFiniteError


@dataclass(frozen=True, kw_only=True)
class SeparateJob:
    """The interventions of one layer or module, fitted one after the other by the configuration's training.

    A training that trains the model itself gets a model that is loaded anew for each fit. A random model is no control
    of such a fit, which may teach it all that a trained one knows.
    """

    name: str
    fits: Sequence[Fit]

    def run(self, cfg: DictConfig, opened: Opened, grid: Grid) -> list[dict[str, Any]]:
        for setting in ("control_task", "patience"):
            if getattr(grid, setting):
                raise ValueError(
                    f"sweep.{setting} is for fits that are trained side by side, which those of "
                    f"{cfg.training._target_.rpartition('.')[2]} are not; leave it out"
                )
        rows = []
        for fit in self.fits:
            start = time.perf_counter()
            found = {fit.name: _fitted(cfg, opened, grid, fit)}
            if grid.random_model and not _trains_model(cfg):
                set_beside(found, {fit.name: _fitted(cfg, opened.random_twin, grid, fit)}, RANDOM_MODEL)
            shared = {"seconds": time.perf_counter() - start, **of_data(opened.data)}
            rows.append({**described(fit, grid, cfg), **found[fit.name], **shared})
        return rows


def _fitted(cfg: DictConfig, opened: Opened, grid: Grid, fit: Fit) -> Figures:
    """The figures of one fit, or that it has diverged."""
    intervention: Any = grid.methods[fit.method]
    if fit.rank is not None:
        intervention = partial(intervention, rank=fit.rank)
    trainer = make_trainer(cfg)
    # Each fit starts as it would alone.
    lightning.seed_everything(fit.seed, verbose=False)
    if _trains_model(cfg):
        base_model = base_model_of(cfg, opened.mesh)
        opened = replace(opened, base_model=base_model, network=opened.open_network(base_model))
        opened.network.to(trainer.strategy.root_device)
    module = opened.module(instantiate(cfg.training, _convert_="all"), fit.sites, intervention=intervention)
    try:
        if any(parameter.requires_grad for parameter in module.parameters()):
            trainer.fit(module, datamodule=opened.data)
        else:
            module.prepare(opened.data, uses=epochs_of(trainer))
        (figures,) = trainer.test(module, datamodule=opened.data, verbose=False)
    except NotFiniteError:
        return {DIVERGED: 1.0}
    return {key.removeprefix(f"{TEST}/"): value for key, value in figures.items()}


def _trains_model(cfg: DictConfig) -> bool:
    return instantiate(cfg.training, _convert_="all").func.trains_model
