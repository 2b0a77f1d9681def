"""What a logger is given besides Lightning's own calls: each fit of a sweep, once, then its results; a run's figure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from itrain.loggers.runs import Identity, compared, figure_name, identify_fit, identify_run, legible
from itrain.results.columns import COMMAND, CURVE, FEATURES, TEST, TOKENS
from itrain.results.maps import HeatMap, maps_read
from itrain.results.run import RunSummary, summarise_run
from itrain.results.summary import SweepSummary

LOGGED = "logged.txt"
"""The file of a sweep that lists what has been logged, so that a resumed sweep logs nothing twice."""
PICTURES: Mapping[str, str] = {
    "heat_maps": "All methods and controls",
    "iia_maps": "IIA of learned interventions",
    "probe_maps": "Accuracy of probes",
    "difference_maps": "Probes minus interventions, both above chance",
}
"""The pictures of a sweep by name, with their titles."""


@dataclass(frozen=True, kw_only=True)
class FinishedFit:
    """A row of a sweep as loggers take it."""

    sweep: str
    row: Mapping[str, Any]
    configuration: Mapping[str, Any] = field(default_factory=dict)
    """The sweep's."""

    @property
    def settings(self) -> dict[str, Any]:
        """The columns up to and including the command."""
        names = list(self.row)
        return {name: self.row[name] for name in names[: names.index(COMMAND) + 1]}

    @property
    def figures(self) -> dict[str, float]:
        """The figures, by the names that they have in a fit of its own."""
        others = {*self.settings, CURVE, FEATURES, *TOKENS}
        found = {figure_name(name): value for name, value in self.row.items() if name not in others}
        return {**found, **compared(found)}

    @property
    def curve(self) -> Sequence[Mapping[str, float]]:
        """The validation figures after each epoch; empty if nothing was trained step by step."""
        return [legible(epoch) for epoch in self.row.get(CURVE, [])]

    @property
    def identity(self) -> Identity:
        size = {FEATURES: self.row[FEATURES]} if FEATURES in self.row else {}
        return identify_fit(self.sweep, {**self.settings, **size}, self.configuration)

    @property
    def name(self) -> str:
        return self.identity.name

    @property
    def id(self) -> str:
        """A short name that depends on the sweep and the settings alone."""
        return digest(self.sweep, json.dumps(self.settings, sort_keys=True))


@runtime_checkable
class IdentifiedLogger(Protocol):
    """A logger that takes what a run is before its metrics: name, group, tags and configuration."""

    def identify(self, identity: Identity) -> None:
        """Take the identity of a run of its own; a name or group that the user has given stays."""
        ...


@runtime_checkable
class RunLogger(Protocol):
    """A logger that takes the tables and the figure of a run, besides its metrics."""

    def log_run(self, summary: RunSummary, figure: Path) -> None:
        """Log the tables and the figure, a PNG file."""
        ...


@runtime_checkable
class SweepLogger(Protocol):
    """A logger that takes sweeps as well as single fits."""

    def log_fit(self, fit: FinishedFit) -> None:
        """Log a fit as a run of its own."""
        ...

    def log_results(self, sweep: str, summary: SweepSummary, pictures: Mapping[str, Path]) -> None:
        """Log the table and the pictures, PNG files by name, as one run; a resumed sweep replaces its earlier ones."""
        ...


@rank_zero_only
def begin_run(loggers: Sequence[Logger], configuration: Mapping[str, Any], job_type: str) -> None:
    """Tell loggers what a run is, before its first metric."""
    for logger in loggers:
        if isinstance(logger, IdentifiedLogger):
            logger.identify(identify_run(configuration, job_type))
        else:
            logger.log_hyperparams(dict(configuration))


def beyond_the_test(summary: RunSummary) -> dict[str, float]:
    """The final figures that no test has logged: of the start, of the data, and what is comparable with other runs."""
    others = {name: value for name, value in summary.results.items() if not name.startswith(f"{TEST}/")}
    return {**legible(others), **compared(legible(summary.results))}


@rank_zero_only
def log_run(loggers: Sequence[object], results: Mapping[str, float], figure: Path) -> None:
    """Give a run's final figures and the picture of them to those of the loggers that take such."""
    summary = summarise_run(results, figure.with_name("metrics.csv"))
    for logger in loggers:
        if isinstance(logger, RunLogger):
            logger.log_run(summary, figure)


class SweepLog:
    """Gives a logger each finished fit and the results of a sweep, once.

    Args:
        logger: None logs nothing.
        folder: of the sweep, whose name and time name the group of its runs.
        configuration: of the sweep, resolved.

    Raises:
        ValueError: the logger takes single fits only.
    """

    def __init__(self, *, logger: object | None, folder: Path, configuration: Mapping[str, Any] | None = None) -> None:
        if logger is not None and not isinstance(logger, SweepLogger):
            raise ValueError(
                f"logger: {type(logger).__name__} takes single fits only; a sweep takes wandb, tensorboard or trackio"
            )
        self.logger, self.file = logger, folder / LOGGED
        self.sweep, self.configuration = name_of(folder), configuration or {}
        self.logged = set(self.file.read_text().split()) if self.file.is_file() else set[str]()

    def fits(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log these fits, which are finished."""
        if self.logger is None:
            return
        for row in rows:
            fit = FinishedFit(sweep=self.sweep, row=row, configuration=self.configuration)
            if fit.id not in self.logged:
                self.logger.log_fit(fit)
                self._keep(fit.id)

    def results(self, summary: SweepSummary, draw: Callable[[], Mapping[str, Path]]) -> None:
        """Log the results of all fits; ``draw`` makes the pictures if they are needed."""
        key = digest(str(summary.frame.to_json()))
        if self.logger is not None and key not in self.logged:
            self.logger.log_results(self.sweep, summary, draw())
            self._keep(key)

    def _keep(self, key: str) -> None:
        self.logged.add(key)
        with self.file.open("a") as file:
            file.write(f"{key}\n")


def captions(summary: SweepSummary) -> dict[str, str]:
    """How to read each picture of a sweep, by the picture's name."""
    shown: dict[str, Sequence[HeatMap]] = dict.fromkeys(("heat_maps", "iia_maps", "probe_maps"), summary.maps)
    shown["difference_maps"] = summary.differences
    return {name: f"{PICTURES[name]}. {maps_read(maps)}" for name, maps in shown.items() if maps}


def name_of(folder: Path) -> str:
    """The name of the sweep in a folder: its recipe and time."""
    return f"{folder.resolve().parent.name} {folder.resolve().name}"


def digest(*parts: str) -> str:
    """A short hash of the parts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def require_package(name: str) -> None:
    """
    Raises:
        RuntimeError: the package is not installed.
    """
    if find_spec(name) is None:
        raise RuntimeError(f"logger={name} needs a package that is not installed: pip install {name}")
