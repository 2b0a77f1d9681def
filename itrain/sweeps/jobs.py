"""Jobs of a sweep: the fits that run together, and the rows that they write."""

from __future__ import annotations

import inspect
import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import lightning
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from itrain.data.splits import SplitDataModule
from itrain.experiment import Opened
from itrain.owned import refuse_in_sweeps
from itrain.results.columns import (
    CONTROL_TASK,
    DATA,
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
from itrain.sweeps.grid import Fit, Grid, is_training, layers_with, reads_only
from itrain.trainers import trainer_factory
from itrain.training.alignment import AlignmentSearch
from itrain.training.callbacks import epochs_of
from itrain.training.cohort import Cohort
from itrain.training.describing import can_describe, directions_of, in_a_row
from itrain.training.divergence import is_nonlinear
from itrain.training.finite import NotFiniteError
from itrain.training.probing import ProbeTraining
from itrain.training.safeguards import safeguard
from itrain.training.tracing import CausalTracing

OF_EXAMPLES = ("pairs_changing", "pairs_preserving", "majority_accuracy", "examples", FEATURES)
"""Figures that depend on the examples and the site alone, not on the model's weights."""

_PLAIN = {"intervention": "full_vector", "training": "probing"}
"""By group, the choice that has the fewest settings, with which a command names a class."""

Figures = dict[str, Any]
"""The figures of one fit, as in its row."""


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
        free = [fit for fit in self.fits if is_nonlinear(members[fit.name].exported)]
        found = _fitted(cfg, opened, grid, members)
        if twin is not None:
            again = {fit.name: _member(cfg, twin, grid, fit) for fit in from_model}
            _set_beside(found, _fitted(cfg, twin, grid, again), RANDOM_MODEL)
        if free:
            again = {fit.name: _member(cfg, opened.false_twin, grid, fit) for fit in free}
            _set_beside(found, _fitted(cfg, opened.false_twin, grid, again), FALSE_VARIABLE)
        if control is not None:
            again = {fit.name: _member(cfg, control, grid, fit) for fit in self.fits}
            _set_beside(found, _fitted(cfg, control, grid, again), CONTROL_TASK)
            _set_selectivity(found)
        seconds = (time.perf_counter() - start) / len(members)
        sizes = {name: float(max(member.interchange.hidden_sizes)) for name, member in members.items()}
        shared = {"seconds": seconds, **_of_data(opened.data)}
        tokens = _tokens(members, found, opened)
        return [
            {
                **_described(fit, grid, cfg),
                **found[fit.name],
                FEATURES: sizes[fit.name],
                **tokens.get(fit.name, {}),
                **shared,
            }
            for fit in self.fits
        ]


@dataclass(frozen=True, kw_only=True)
class ProbeJob:
    """The probes of all sites, trained in one fit; or another training of its own kind, in a fit for each site."""

    name: str
    fits: Sequence[Fit]

    def run(self, cfg: DictConfig, opened: Opened, grid: Grid) -> list[dict[str, Any]]:
        start = time.perf_counter()
        twin = opened.random_twin if grid.random_model else None
        found = self._fitted(cfg, opened, grid, self.fits)
        if twin is not None:
            _set_beside(found, self._fitted(cfg, twin, grid, self.fits), RANDOM_MODEL)
        seconds = (time.perf_counter() - start) / len(self.fits)
        shared = {"seconds": seconds, **_of_data(opened.data)}
        return [{**_described(fit, grid, cfg), **found[fit.name], **shared} for fit in self.fits]

    def _fitted(self, cfg: DictConfig, opened: Opened, grid: Grid, fits: Sequence[Fit]) -> dict[str, Figures]:
        """The figures of each probe; one that diverges is left out, and the others are fitted again without it."""
        if len(fits) > 1 and not reads_only(grid.methods[fits[0].method]):
            return {name: row for fit in fits for name, row in self._fitted(cfg, opened, grid, [fit]).items()}
        try:
            return self._figures(cfg, opened, grid, fits)
        except NotFiniteError as error:
            # A place is a site, or a site and its variable.
            lost = [
                fit for fit in fits if any(f"{place} ".startswith(f"{fit.site} ") for place in error.places)
            ] or fits
        rest = [fit for fit in fits if fit not in lost]
        found = self._fitted(cfg, opened, grid, rest) if rest else {}
        return found | {fit.name: {DIVERGED: 1.0} for fit in lost}

    def _figures(self, cfg: DictConfig, opened: Opened, grid: Grid, fits: Sequence[Fit]) -> dict[str, Figures]:
        """The figures of each probe, averaged over variables."""
        lightning.seed_everything(self.fits[0].seed, verbose=False)
        training: Any = grid.methods[self.fits[0].method]
        probes = opened.module(training, [fit.site for fit in fits])
        trainer = make_trainer(cfg)
        trainer.fit(probes, datamodule=opened.data)
        (figures,) = trainer.test(probes, datamodule=opened.data, verbose=False)
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


def jobs_of(grid: Grid, seed: int, opened: Opened) -> Iterator[CohortJob | ProbeJob]:
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
            yield CohortJob(name=f"seed{seed} {layer}", fits=fits)
    for method, factory in grid.methods.items():
        if is_training(factory):
            fits = [
                Fit(group="training", method=method, site=site, sites=[site], rank=None, seed=seed) for site in sites
            ]
            yield ProbeJob(name=f"seed{seed} {method}", fits=fits)


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
    if training.func not in (AlignmentSearch, CausalTracing):
        raise ValueError(f"training: a sweep runs AlignmentSearch or CausalTracing, not {training.func.__name__}")
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


def _of_data(data: SplitDataModule) -> dict[str, float]:
    """The figures about the test data itself, such as how many of its pairs are different ones."""
    return {figure: value for figure, value in data.figures().items() if figure.startswith(DATA)}


def _training_pairs(data: SplitDataModule) -> DataLoader[Any]:
    """The training pairs, each once and in order, as a test has its own."""
    return data.loader(data.datasets["train"], data.eval_batch_size)


def _set_beside(found: dict[str, Figures], again: Mapping[str, Figures], prefix: str) -> None:
    """Add to each row the figures of the same fit to something else: a random model, or a control task."""
    for name, figures in again.items():
        found[name] |= {
            f"{prefix}{figure}": value
            for figure, value in figures.items()
            if isinstance(value, float) and not figure.endswith(OF_EXAMPLES) and DIVERGED not in found[name]
        }


def _set_selectivity(found: dict[str, Figures]) -> None:
    """Add to each row its odds less those of the control task."""
    for figures in found.values():
        if ODDS in figures and CONTROL_TASK + ODDS in figures:
            figures[ODDS_SELECTIVITY] = figures[ODDS] - figures[CONTROL_TASK + ODDS]


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


def make_trainer(cfg: DictConfig, *callbacks: lightning.Callback) -> lightning.Trainer:
    """The trainer of a fit of a sweep, which shows no progress and writes nothing."""
    factory = trainer_factory(cfg)
    refuse_in_sweeps(factory.keywords)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = factory(**quiet, callbacks=list(callbacks), logger=False)
    safeguard(trainer)
    return trainer


def identity(fit: Fit, grid: Grid) -> dict[str, Any]:
    """The columns of a row that tell its fit from others."""
    component, layer, position = fit.place
    # One kind in a column: numbers, unless modules are named by their paths.
    site = {"component": component, "layer": layer if grid.names_modules else fit.site.layer, "position": position}
    site["window"] = grid.width(fit.site.component)
    return {"method": fit.method, **site, "rank": fit.rank, "seed": fit.seed}


def _described(fit: Fit, grid: Grid, cfg: DictConfig) -> dict[str, Any]:
    """The columns of a row besides its figures, among them the command that repeats the fit alone."""
    left = ("sweep", "seed=", "logger")
    if fit.group == "training":  # The settings that were typed are those of the sweep's own training.
        left += ("training",)
    command = ["python", "-m", "itrain", "fit"]
    command += [word for word in grid.words if not word.lstrip("+~").startswith(left)]
    sites = str(fit.site) if len(fit.sites) == 1 else f"[{','.join(map(str, fit.sites))}]"
    command += [*_choice(fit, grid, cfg), f"site={sites}", f"seed={fit.seed}"]
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
