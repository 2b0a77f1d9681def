"""Jobs of a sweep: the fits that are made together, and the rows that they leave."""

from __future__ import annotations

import inspect
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import lightning
from hydra.utils import instantiate
from omegaconf import DictConfig

from itrain.architectures import blocks
from itrain.experiment import Opened
from itrain.sweeps.grid import Fit, Grid, is_training
from itrain.training.alignment import AlignmentSearch
from itrain.training.callbacks import Annealing, Curves
from itrain.training.cohort import Cohort
from itrain.training.interchange import count_features
from itrain.training.tracing import CausalTracing


@dataclass(frozen=True, kw_only=True)
class CohortJob:
    """The interventions of one layer, trained side by side."""

    name: str
    fits: Sequence[Fit]

    def run(self, cfg: DictConfig, opened: Opened, grid: Grid) -> list[dict[str, Any]]:
        start = time.perf_counter()
        members = {fit.name: _member(cfg, opened, grid, fit) for fit in self.fits}
        for member in members.values():
            member.fit_activations(opened.data.train_dataloader())
        first = next(iter(members.values()))
        references = first.references() if isinstance(first, CausalTracing) else {}
        cohort = Cohort(
            members={**members, **references}, optimizer=first.optimizer, warmup=first.warmup, patience=grid.patience
        )
        cohort.expect(opened.data.edited(), opened.data.read())
        curves, learning = Curves(), list(cohort.learning)
        trainer = make_trainer(cfg, curves)
        if learning:
            trainer.fit(cohort, datamodule=opened.data)
        (figures,) = trainer.test(cohort, datamodule=opened.data, verbose=False)
        seconds = (time.perf_counter() - start) / len(members)
        beside = {key.replace("/test/", "/"): figures[key] for key in figures if key.split("/")[0] in references}
        rows = []
        for fit in self.fits:
            place = f"{fit.name}/test/"
            mine = {key.removeprefix(place): value for key, value in figures.items() if key.startswith(place)}
            curve = {"curve": curves.of(fit.name)} if fit.name in learning else {}
            rows.append({**_described(fit, grid), **mine, **beside, "seconds": seconds, **curve})
        return rows


@dataclass(frozen=True, kw_only=True)
class ProbeJob:
    """The probes of all sites, trained on one reading of the model."""

    name: str
    fits: Sequence[Fit]

    def run(self, cfg: DictConfig, opened: Opened, grid: Grid) -> list[dict[str, Any]]:
        start = time.perf_counter()
        lightning.seed_everything(self.fits[0].seed, verbose=False)
        training: Any = grid.methods[self.fits[0].method]
        probes = opened.module(training, [fit.site for fit in self.fits])
        probes.fit_activations(opened.data.train_dataloader())
        trainer = make_trainer(cfg)
        trainer.fit(probes, datamodule=opened.data)
        (figures,) = trainer.test(probes, datamodule=opened.data, verbose=False)
        seconds = (time.perf_counter() - start) / len(self.fits)
        rows = []
        for fit in self.fits:
            # Of several variables, the mean.
            mine: dict[str, list[float]] = {}
            for key, value in figures.items():
                if key.endswith(f" {fit.site}"):
                    mine.setdefault(key.split("/")[1], []).append(value)
            means = {figure: sum(values) / len(values) for figure, values in mine.items()}
            rows.append({**_described(fit, grid), **means, "seconds": seconds})
        return rows


def jobs_of(grid: Grid, seed: int, opened: Opened) -> Iterator[CohortJob | ProbeJob]:
    sites, count = grid.sites(opened), len(blocks(opened.network.model))
    for layer in dict.fromkeys(site.layer for site in sites):
        fits = [
            Fit(
                group="intervention",
                method=method,
                site=site,
                sites=grid.together(site, count),
                rank=rank,
                seed=seed,
            )
            for method, factory in grid.methods.items()
            if not is_training(factory)
            for site in sites
            if site.layer == layer
            for rank in (grid.ranks if "rank" in inspect.signature(factory).parameters else [None])
        ]
        if fits:
            yield CohortJob(name=f"seed{seed} layer{layer}", fits=fits)
    for method, factory in grid.methods.items():
        if is_training(factory):
            fits = [
                Fit(group="training", method=method, site=site, sites=[site], rank=None, seed=seed) for site in sites
            ]
            yield ProbeJob(name=f"seed{seed} {method}", fits=fits)


def _member(cfg: DictConfig, opened: Opened, grid: Grid, fit: Fit) -> AlignmentSearch | CausalTracing:
    intervention: Any = grid.methods[fit.method]
    if fit.rank is not None:
        intervention = partial(intervention, rank=fit.rank)
    # Each fit starts as it would alone.
    lightning.seed_everything(fit.seed, verbose=False)
    training = instantiate(cfg.training, _convert_="all")
    if training.func not in (AlignmentSearch, CausalTracing):
        raise ValueError(f"training: a sweep is of AlignmentSearch or CausalTracing, not of {training.func.__name__}")
    sizes = count_features(opened.network, fit.sites, opened.data.example())
    return training(network=opened.network, sites=fit.sites, intervention=intervention, hidden_sizes=sizes)


def make_trainer(cfg: DictConfig, *callbacks: lightning.Callback) -> lightning.Trainer:
    if cfg.trainer.get("devices", 1) not in (1, "1") or cfg.trainer.get("strategy", "auto") != "auto":
        raise ValueError("trainer: a sweep runs on one device; start one for each part of the layers to use more")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    node = {**{str(key): value for key, value in cfg.trainer.items()}, **quiet}
    return instantiate(node, _convert_="all")(callbacks=[Annealing(), *callbacks], logger=False)


def _described(fit: Fit, grid: Grid) -> dict[str, Any]:
    """What a row says of a fit besides its figures, among it the command that makes it alone."""
    kept = (word for word in grid.words if not word.startswith(("sweep", "seed=", "logger")))
    command = ["python", "-m", "itrain", "fit", *kept]
    sites = str(fit.site) if len(fit.sites) == 1 else f"[{','.join(map(str, fit.sites))}]"
    command += [f"{fit.group}={fit.method}", f"site={sites}", f"seed={fit.seed}"]
    command += [] if fit.rank is None else [f"intervention.rank={fit.rank}"]
    site = {key: value for key, value in asdict(fit.site).items() if value is not None}
    site["window"] = grid.width(fit.site.component)
    return {"method": fit.method, **site, "rank": fit.rank, "seed": fit.seed, "command": shlex.join(command)}
