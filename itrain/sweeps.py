"""Sweeps: many fits over methods, layers, positions, ranks and seeds, in one table with their controls."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from itrain.architectures import blocks, locate
from itrain.experiment import Opened, RunError, make_logger, open_model
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.networks.replay import ReplayNetwork
from itrain.reports.html import REPORT, RESULTS, save_report
from itrain.reports.pictures import CEILING, CONTROL
from itrain.reports.sweeps import SweepProgress, save_heat_maps, show_sweep
from itrain.reports.tracking import SweepLog
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from itrain.training.base import Training
from itrain.training.callbacks import Annealing, Curves
from itrain.training.cohort import Cohort
from itrain.training.interchange import count_features
from itrain.training.probing import ProbeTraining
from itrain.training.tracing import CausalTracing

if TYPE_CHECKING:
    import pandas

JOBS = "jobs"
"""The folder of a sweep in which each finished job leaves its rows, so that none is run twice."""
CURVES = "curves.parquet"
SHOWN = 0.5
"""The share of label-changing pairs from which a control is said to pass."""
ABOVE = 0.3
"""How far above the whole vector a subspace is marked: it may use what the model does not (Makelov et al. 2023)."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a sweep goes over.

    Args:
        methods: interventions and trainings of probes, by name.
        layers: ``all``, ``every(2)`` from the last one down, or numbers.
        positions: ``all`` tokens that the task names, and the first and the last one; or positions, of whole spans too.
        components: where in each layer.
        window: layers that are edited together, centred on each: of all components, or for some of them by name.
        ranks: of the methods that have one.
        seeds: each with data, model and start of its own.
        patience: epochs without a lower validation loss after which a fit stops; None: all go to the end.
        words: what was typed, for the commands that repeat single fits.

    Raises:
        ValueError: the layers cannot be read, something is empty, or a window is less than 1 layer or one of probes.
    """

    methods: Mapping[str, Callable[..., Intervention] | Callable[..., Training]]
    layers: str | Sequence[int] = "all"
    positions: str | Sequence[str] = "all"
    components: Sequence[str] = ("block_output",)
    window: int | Mapping[str, int] = 1
    ranks: Sequence[int] = (1,)
    seeds: Sequence[int] = (0,)
    patience: int | None = None
    words: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("methods", "layers", "positions", "components", "ranks", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"sweep.{name} is empty")
        if isinstance(self.layers, str) and self.layers != "all" and not re.fullmatch(r"every\(\d+\)", self.layers):
            raise ValueError(f"sweep.layers: '{self.layers}' is none of all, every(2), or a list such as [3,5]")
        if any(self.width(component) < 1 for component in self.components):
            raise ValueError(f"sweep.window: a window has 1 layer or more; got {self.window}")
        probes = [name for name, method in self.methods.items() if _is_training(method)]
        if probes and any(self.width(component) > 1 for component in self.components):
            raise ValueError(f"sweep.window: {probes[0]} reads one layer; leave it out, or the window")

    def width(self, component: str) -> int:
        """The layers that are edited together."""
        return self.window if isinstance(self.window, int) else self.window.get(component, 1)

    def sites(self, opened: Opened) -> list[Site]:
        """Layer by layer, the sites of all methods, each the centre of its window."""
        count = len(blocks(opened.network.model))
        layers = list(range(count)) if isinstance(self.layers, str) else list(self.layers)
        if isinstance(self.layers, str) and self.layers != "all":
            step = int(self.layers[len("every(") : -1])
            layers = sorted(range(count - 1, -1, -step))
        if outside := [layer for layer in layers if not 0 <= layer < count]:
            raise ValueError(f"sweep.layers: there is no layer {outside[0]}; the model has 0 to {count - 1}")
        # A window may be given for components that this sweep leaves out, but not for one that the model lacks.
        for component in () if isinstance(self.window, int) else self.window:
            locate(opened.network.model, Site(layer=0, component=component))
        examples = opened.data.edited()[0]
        positions = tokens_of(examples) if isinstance(self.positions, str) else list(self.positions)
        return [
            Site(layer=layer, component=component, position=position)
            for layer in layers
            for component in self.components
            for position in positions
        ]

    def together(self, site: Site, count: int) -> list[Site]:
        """The sites of the window around a site, as far as the model's ``count`` layers go."""
        assert site.layer is not None, "a sweep goes over layers"
        width = self.width(site.component)
        start = site.layer - width // 2
        return [replace(site, layer=layer) for layer in range(max(start, 0), min(start + width, count))]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One row of the table, before it is fitted."""

    group: str
    method: str
    site: Site
    sites: Sequence[Site]
    """Those of the window around the site."""
    rank: int | None
    seed: int

    @property
    def name(self) -> str:
        rank = "" if self.rank is None else f" rank{self.rank}"
        return f"{self.method} {self.site}{rank}".replace(".", "_")


def sweep(cfg: DictConfig, folder: Path) -> pandas.DataFrame:
    """Fit all that the configuration's grid names and write table, heat maps and a summary; goes on where it was left.

    Fits of one layer are trained as a cohort, probes of all sites in one pass. A job that fails is told at the end and
    stops no other.

    Args:
        cfg: the configuration of a fit, with a grid in ``sweep``.
        folder: of the sweep; jobs that have left their rows in it are not run again.

    Raises:
        RunError: a job failed, after all others have run.
    """
    grid: Grid = instantiate(cfg.sweep, _convert_="all")
    (folder / JOBS).mkdir(exist_ok=True)
    log, failed = SweepLog(logger=make_logger(cfg, folder), folder=folder), []
    with SweepProgress(quiet=not cfg.trainer.get("enable_progress_bar", True)) as progress:
        for seed in grid.seeds:
            seeded = _with_seed(cfg, seed)
            grid = instantiate(seeded.sweep, _convert_="all")
            opened = open_model(seeded, folder)
            opened.network.to(_trainer(seeded).strategy.root_device)
            opened.data.setup("fit")
            jobs = list(_jobs(grid, seed, opened))
            progress.expect(sum(len(job.fits) for job in jobs) * len(grid.seeds))
            for job in jobs:
                file = folder / JOBS / f"{job.name}.json"
                if not file.is_file():
                    try:
                        rows = job.run(seeded, opened, grid)
                    # A fault of one job must not cost the others' results; it is told at the end.
                    except Exception as error:
                        failed.append(f"{job.name}: {type(error).__name__}: {error}")
                        continue
                    _write(rows, file)
                rows = json.loads(file.read_text())
                progress.done(rows)
                log.fits(rows)
    frame = _collect(folder)
    save_heat_maps(frame, folder / "heat_maps.png")
    save_report([folder], folder / REPORT)
    log.results(frame, folder / "heat_maps.png")
    show_sweep(frame, folder)
    if failed:
        raise RunError(f"{len(failed)} of the jobs failed, and their fits are missing: {'; '.join(failed)}")
    return frame


def read_results(folder: Path | str) -> pandas.DataFrame:
    """The table of a sweep, one row a fit: method, site, rank, seed, figures, seconds, command and flag.

    Raises:
        FileNotFoundError: the folder holds no finished sweep.
    """
    import pandas

    file = Path(folder) / RESULTS
    if not file.is_file():
        raise FileNotFoundError(f"'{folder}' holds no {RESULTS}; to finish a sweep: itrain sweep resume={folder}")
    return pandas.read_parquet(file)


def read_curves(folder: Path | str) -> pandas.DataFrame:
    """The validation of each trained intervention of a sweep, one row a fit and epoch; empty where none is trained."""
    import pandas

    return pandas.read_parquet(Path(folder) / CURVES)


def tokens_of(examples: ModelInputs) -> list[str]:
    """Positions of one token that between them name the first token, the last, and those of each span, in order."""
    assert examples.tokens is not None, "positions are those of tokens"
    first, end = examples.tokens.unbind(1)
    named = {
        name if bool((span[:, 1] - span[:, 0] == 1).all()) else f"{name}.last": span[:, 1] - 1
        for name, span in examples.spans.items()
    }
    places = {"first": first, **named, "last": end - 1}
    # A span that is the first or the last token in all examples stands for it.
    doubled = [edge for edge in ("first", "last") if any(torch.equal(places[edge], named[name]) for name in named)]
    order = {name: float((place - first).float().mean()) for name, place in places.items() if name not in doubled}
    return sorted(order, key=lambda name: order[name])


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
        if isinstance(opened.network, ReplayNetwork):
            opened.network.expect(cohort.sites, opened.data.edited(), opened.data.read())
        curves, learning = Curves(), list(cohort.learning)
        trainer = _trainer(cfg, curves)
        if learning:
            trainer.fit(cohort, datamodule=opened.data)
        (figures,) = trainer.test(cohort, datamodule=opened.data, verbose=False)
        if isinstance(opened.network, ReplayNetwork):
            opened.network.forget()
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
        trainer = _trainer(cfg)
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


def _jobs(grid: Grid, seed: int, opened: Opened) -> Iterator[CohortJob | ProbeJob]:
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
            if not _is_training(factory)
            for site in sites
            if site.layer == layer
            for rank in (grid.ranks if "rank" in inspect.signature(factory).parameters else [None])
        ]
        if fits:
            yield CohortJob(name=f"seed{seed} layer{layer}", fits=fits)
    for method, factory in grid.methods.items():
        if _is_training(factory):
            fits = [
                Fit(group="training", method=method, site=site, sites=[site], rank=None, seed=seed) for site in sites
            ]
            yield ProbeJob(name=f"seed{seed} {method}", fits=fits)


def _is_training(factory: Callable[..., Any]) -> bool:
    target = factory.func if isinstance(factory, partial) else factory
    return isinstance(target, type) and issubclass(target, ProbeTraining)


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


def _trainer(cfg: DictConfig, *callbacks: lightning.Callback) -> lightning.Trainer:
    if cfg.trainer.get("devices", 1) not in (1, "1") or cfg.trainer.get("strategy", "auto") != "auto":
        raise ValueError("trainer: a sweep runs on one device; start one for each part of the layers to use more")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    node = {**{str(key): value for key, value in cfg.trainer.items()}, **quiet}
    return instantiate(node, _convert_="all")(callbacks=[Annealing(), *callbacks], logger=False)


def _with_seed(cfg: DictConfig, seed: int) -> DictConfig:
    seeded = cfg.copy()
    seeded.seed = seed
    return seeded


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


def _write(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    # Whole or not at all, so that a sweep killed here finds no half of a job.
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(list(rows)))
    beside.replace(file)


def _collect(folder: Path) -> pandas.DataFrame:
    import pandas

    rows = [row for file in sorted((folder / JOBS).glob("*.json")) for row in json.loads(file.read_text())]
    curves = []
    for row in rows:
        settings = {key: value for key, value in row.items() if not isinstance(value, float | list)}
        curves += [{**settings, **epoch} for epoch in row.pop("curve", [])]
    pandas.DataFrame(curves).to_parquet(folder / CURVES)
    frame = flagged(pandas.DataFrame(rows))
    frame.to_parquet(folder / RESULTS)
    return frame


def flagged(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The table with a column ``flag`` that says where a control speaks against a result.

    ``control passes``: a random subspace of equal rank changes the label as predicted on half of the label-changing
    pairs or more. ``above the whole vector``: the fit is more than 0.3 above swapping all of the activation.
    """
    figure = "iia_changing_pairwise"
    if figure not in frame:
        return frame.assign(flag="")
    place = ["layer", "component", "position", "seed"]
    frame = frame.copy()
    control = frame[frame.method == CONTROL].groupby([*place, "rank"], dropna=False)[figure].first()
    ceiling = frame[frame.method == CEILING].groupby(place)[figure].first()

    def flag(row: Any) -> str:
        if row.method in (CONTROL, CEILING) or row[figure] != row[figure]:
            return ""
        here = tuple(row[key] for key in place)
        if control.get((*here, row["rank"]), 0.0) >= SHOWN:
            return "control passes"
        return "above the whole vector" if row[figure] > ceiling.get(here, 1.0) + ABOVE else ""

    return frame.assign(flag=frame.apply(flag, axis=1))
