"""Jobs of a sweep: the fits that run together, and the rows that they write."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, TypeAlias

import lightning
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from itrain.data.splits import SplitDataModule
from itrain.opening import Opened
from itrain.results.columns import (
    CONTROL_TASK,
    DIVERGED,
    FALSE_VARIABLE,
    FEATURES,
    IIA,
    ODDS,
    ODDS_SELECTIVITY,
    RANDOM_MODEL,
    TEST,
    TOKENS,
)
from itrain.sites import Site
from itrain.sweeps.detectors import of_detectors
from itrain.sweeps.grid import Fit, Grid, detectors_of, is_training, layers_with, reads_only
from itrain.sweeps.rows import Figures, described, make_trainer, of_data, set_beside
from itrain.sweeps.separate import SeparateJob
from itrain.training.alignment import AlignmentSearch
from itrain.training.base import Training
from itrain.training.callbacks import epochs_of
from itrain.training.cohort import Cohort
from itrain.training.describing import can_describe, directions_of, in_a_row
from itrain.training.divergence import is_nonlinear
from itrain.training.finite import NotFiniteError
from itrain.training.monitoring import Monitoring
from itrain.training.probing import ProbeTraining
from itrain.training.tracing import CausalTracing


@dataclass(frozen=True, kw_only=True)
class CohortJob:
    """The interventions of one layer or module, trained side by side."""

    name: str
    fits: Sequence[Fit]

    def run(self, cfg: DictConfig, opened: Opened, grid: Grid) -> list[dict[str, Any]]:
        start = time.perf_counter()
        members = {fit.name: _member(cfg, opened, grid, fit) for fit in self.fits}
        from_model = [fit for fit in self.fits if _is_found(members[fit.name])]
        # Made before anything is trained: not every model can be initialised anew.
        twin = opened.random_twin if grid.random_model and from_model else None
        control = opened.control_twin if grid.control_task else None
        free = [fit for fit in from_model if _is_checked(cfg, members[fit.name])]
        found = _fitted(cfg, opened, grid, members)
        if twin is not None:
            again = {fit.name: _member(cfg, twin, grid, fit) for fit in from_model}
            set_beside(found, _fitted(cfg, twin, grid, again), RANDOM_MODEL)
        if free:
            again = {fit.name: _member(cfg, opened.false_twin, grid, fit) for fit in free}
            set_beside(found, _fitted(cfg, opened.false_twin, grid, again), FALSE_VARIABLE)
        if control is not None:
            again = {fit.name: _member(cfg, control, grid, fit) for fit in self.fits}
            set_beside(found, _fitted(cfg, control, grid, again), CONTROL_TASK)
            _set_selectivity(found)
        seconds = (time.perf_counter() - start) / len(members)
        sizes = {name: float(max(member.interchange.hidden_sizes)) for name, member in members.items()}
        shared = {"seconds": seconds, **of_data(opened.data)}
        tokens = _tokens(members, found, opened)
        return [
            {
                **described(fit, grid, cfg),
                **found[fit.name],
                FEATURES: sizes[fit.name],
                **tokens.get(fit.name, {}),
                **shared,
            }
            for fit in self.fits
        ]


@dataclass(frozen=True, kw_only=True)
class ProbeJob:
    """The probes or detectors of all sites, trained in one fit; or another training, in a fit for each site."""

    name: str
    fits: Sequence[Fit]

    def run(self, cfg: DictConfig, opened: Opened, grid: Grid) -> list[dict[str, Any]]:
        start = time.perf_counter()
        twin = opened.random_twin if grid.random_model else None
        found = self._fitted(cfg, opened, grid, self.fits)
        if twin is not None:
            set_beside(found, self._fitted(cfg, twin, grid, self.fits), RANDOM_MODEL)
        seconds = (time.perf_counter() - start) / len(self.fits)
        shared = {"seconds": seconds, **of_data(opened.data)}
        return [{**described(fit, grid, cfg), **found[fit.name], **shared} for fit in self.fits]

    def _fitted(self, cfg: DictConfig, opened: Opened, grid: Grid, fits: Sequence[Fit]) -> dict[str, Figures]:
        """The figures of each probe; one that diverges is left out, and the others are fitted again without it."""
        if len(fits) > 1 and not reads_only(grid.methods[fits[0].method]):
            return {name: row for fit in fits for name, row in self._fitted(cfg, opened, grid, [fit]).items()}
        try:
            return self._figures(cfg, opened, grid, fits)
        except NotFiniteError as error:
            # A place is a site, or a site and its variable.
            lost = [fit for fit in fits if any(f"{place} ".startswith(f"{fit.site} ") for place in error.places)]
        if not lost and len(_sites(fits)) > 1:  # What concerns all of a fit may come from one of its sites.
            alone = ([fit for fit in fits if fit.site == site] for site in _sites(fits))
            return {name: row for each in alone for name, row in self._fitted(cfg, opened, grid, each).items()}
        lost = lost or list(fits)
        rest = [fit for fit in fits if fit not in lost]
        found = self._fitted(cfg, opened, grid, rest) if rest else {}
        return found | {fit.name: {DIVERGED: 1.0} for fit in lost}

    def _figures(self, cfg: DictConfig, opened: Opened, grid: Grid, fits: Sequence[Fit]) -> dict[str, Figures]:
        """The figures of each probe, averaged over variables."""
        lightning.seed_everything(self.fits[0].seed, verbose=False)
        training: Any = grid.methods[self.fits[0].method]
        probes = opened.module(training, _sites(fits))
        trainer = make_trainer(cfg)
        trainer.fit(probes, datamodule=opened.data)
        (figures,) = trainer.test(probes, datamodule=opened.data, verbose=False)
        if isinstance(probes, Monitoring):
            return of_detectors(figures, fits, probes, _training_pairs(opened.data))
        if not isinstance(probes, ProbeTraining):
            return {fits[0].name: {key.removeprefix(f"{TEST}/"): value for key, value in figures.items()}}
        trained = probes.accuracies(_training_pairs(opened.data))
        found = {}
        for fit in fits:
            mine: dict[str, list[float]] = {}
            for key, value in figures.items():
                if key.endswith(f" {fit.site}"):
                    mine.setdefault(key.split("/")[1], []).append(value)
            means = {figure: fmean(values) for figure, values in mine.items()}
            on_training = fmean(value for name, value in trained.items() if name.endswith(f" {fit.site}"))
            found[fit.name] = {**means, "gap": on_training - means["probe_accuracy"]}
        return found


Job: TypeAlias = CohortJob | SeparateJob | ProbeJob
TOGETHER = (AlignmentSearch, CausalTracing)
"""The trainings of which several share a run of the model."""


def jobs_of(grid: Grid, seed: int, opened: Opened, training: type[Training] = AlignmentSearch) -> Iterator[Job]:
    """The jobs of one seed; ``training`` is the configuration's."""
    kind = CohortJob if training in TOGETHER else SeparateJob
    sites, model = grid.all_sites(opened), opened.network.model
    having = {site.component: [] if site.layer is None else layers_with(model, site.component) for site in sites}
    for layer in dict.fromkeys(map(_layer, sites)):
        fits = [
            Fit(
                group="intervention",
                method=method,
                site=site,
                sites=grid.together(site, having[site.component]),
                rank=rank,
                seed=seed,
            )
            for method, factory in grid.methods.items()
            if not is_training(factory)
            for site in sites
            if _layer(site) == layer
            for rank in (grid.ranks if "rank" in inspect.signature(factory).parameters else [None])
        ]
        if fits:
            yield kind(name=f"seed{seed} {layer}", fits=fits)
    for method, factory in grid.methods.items():
        if is_training(factory):
            named: dict[str, Any] = {"group": "training", "method": method, "rank": None, "seed": seed}
            fits = [
                Fit(**named, site=site, sites=[site], detector=each) for each in detectors_of(factory) for site in sites
            ]
            yield ProbeJob(name=f"seed{seed} {method}", fits=fits)


def _sites(fits: Sequence[Fit]) -> list[Site]:
    """The sites of some fits, each once."""
    return list(dict.fromkeys(fit.site for fit in fits))


def _layer(site: Site) -> str:
    """The layer of a site, or the module, whose fits are trained side by side."""
    return site.component.removeprefix("module:") if site.layer is None else f"layer{site.layer}"


def _member(cfg: DictConfig, opened: Opened, grid: Grid, fit: Fit) -> AlignmentSearch | CausalTracing:
    intervention: Any = grid.methods[fit.method]
    if fit.rank is not None:
        intervention = partial(intervention, rank=fit.rank)
    # Each fit starts as it would alone.
    lightning.seed_everything(fit.seed, verbose=False)
    training = instantiate(cfg.training, _convert_="all")
    member: Any = opened.module(training, fit.sites, intervention=intervention)
    return member


def _fitted(
    cfg: DictConfig, opened: Opened, grid: Grid, members: Mapping[str, AlignmentSearch | CausalTracing]
) -> dict[str, Figures]:
    """The figures of each member of a cohort, and the curve of those that learn."""
    first = next(iter(members.values()))
    references = first.references() if isinstance(first, CausalTracing) else {}
    cohort = Cohort(
        members={**members, **references}, optimizer=first.optimizer, warmup=first.warmup, patience=grid.patience
    )
    curves, learning = Curves(), list(cohort.learning)
    trainer = make_trainer(cfg, curves)
    if learning:
        trainer.fit(cohort, datamodule=opened.data)
    else:
        cohort.prepare(opened.data, uses=epochs_of(trainer))
    trainer.test(cohort, datamodule=opened.data, verbose=False)
    tested, trained = cohort.found, {}
    if not references:
        trainer.test(cohort, dataloaders=_training_pairs(opened.data), verbose=False)
        trained = cohort.found
    beside = {key.replace("/test/", "/"): tested[key] for key in tested if key.split("/")[0] in references}
    found = {}
    for name in members:
        place = f"{name}/test/"
        figures: Figures = {key.removeprefix(place): value for key, value in tested.items() if key.startswith(place)}
        if DIVERGED in figures or place + DIVERGED in trained:
            figures = {DIVERGED: 1.0}
        elif trained:
            figures["gap"] = trained[place + IIA] - figures[IIA]
        found[name] = {**figures, **beside, **({"curve": curves.of(name)} if name in learning else {})}
    return found


def _tokens(
    members: Mapping[str, AlignmentSearch | CausalTracing], found: Mapping[str, Figures], opened: Opened
) -> dict[str, dict[str, str]]:
    """What the leading direction of each alignment that changes most labels raises and lowers."""
    tokenizer, data = opened.base_model.tokenizer, opened.data
    telling = {
        name: member
        for name, member in members.items()
        if isinstance(member, AlignmentSearch) and found[name].get(IIA, 0.0) > 0.5
    }
    # They share the model and the data, so that one answers for all.
    if tokenizer is None or not telling or not can_describe(next(iter(telling.values())), data, tokenizer):
        return {}
    return {
        name: dict(zip(TOKENS, in_a_row(directions_of(member, data), tokenizer), strict=True))
        for name, member in telling.items()
    }


def _training_pairs(data: SplitDataModule) -> DataLoader[Any]:
    """The training pairs, each once and in order, as a test has its own."""
    return data.loader(data.datasets["train"], data.eval_batch_size)


def _set_selectivity(found: dict[str, Figures]) -> None:
    """Add to each row its odds less those of the control task."""
    for figures in found.values():
        if ODDS in figures and CONTROL_TASK + ODDS in figures:
            figures[ODDS_SELECTIVITY] = figures[ODDS] - figures[CONTROL_TASK + ODDS]


def _is_checked(cfg: DictConfig, member: Training) -> bool:
    """Whether a fit is repeated on a false variable: a map that is not linear, unless the key ``vacuity`` says so."""
    asked = cfg.get("vacuity")
    return isinstance(member, AlignmentSearch) and (is_nonlinear(member.exported) if asked is None else bool(asked))


def _is_found(member: AlignmentSearch | CausalTracing) -> bool:
    """Whether the member learns from the model, by training or in closed form."""
    parts = member.trained.values() if isinstance(member, AlignmentSearch) else ()
    return any(part.fits_activations or list(part.parameters()) for part in parts)


class Curves(lightning.Callback):
    """Keeps the figures of a cohort's validations, which no logger writes."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.epochs.append({"epoch": trainer.current_epoch, **pl_module.found})  # type: ignore[dict-item]

    def of(self, name: str) -> list[dict[str, float]]:
        """The epochs of one member of a cohort."""
        place = f"{name}/"
        return [
            {key.removeprefix(place): value for key, value in epoch.items() if key == "epoch" or key.startswith(place)}
            for epoch in self.epochs
        ]
