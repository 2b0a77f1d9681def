"""Sweeps in a logger: each fit once, when it is finished, and in the end what all of them found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from itrain.sites import Site

if TYPE_CHECKING:
    import pandas

LOGGED = "logged.txt"
"""The file of a sweep that names what has been logged, so that a sweep that goes on logs nothing twice."""


@dataclass(frozen=True, kw_only=True)
class FinishedFit:
    """A row of a sweep as loggers take it."""

    sweep: str
    row: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What was fitted; in a row, settings end with the command."""
        names = list(self.row)
        return {name: self.row[name] for name in names[: names.index("command") + 1]}

    @property
    def figures(self) -> dict[str, float]:
        return {name: value for name, value in self.row.items() if name not in {*self.settings, "curve"}}

    @property
    def curve(self) -> Sequence[Mapping[str, float]]:
        """The validation after each epoch; empty where nothing was trained step by step."""
        return self.row.get("curve", [])

    @property
    def name(self) -> str:
        site = Site(**{field.name: self.row[field.name] for field in fields(Site) if field.name in self.row})
        rank = "" if self.row["rank"] is None else f" rank{self.row['rank']}"
        return f"{self.row['method']} {site}{rank} seed{self.row['seed']}"

    @property
    def id(self) -> str:
        """The same whenever the fit is logged."""
        return digest(self.sweep, json.dumps(self.settings, sort_keys=True))


@runtime_checkable
class SweepLogger(Protocol):
    """A logger that takes sweeps as well as single fits."""

    def log_fit(self, fit: FinishedFit) -> None:
        """Log a fit as a run of its own."""
        ...

    def log_results(self, sweep: str, frame: pandas.DataFrame, heat_maps: Path) -> None:
        """Log table and heat maps as one run; those of a sweep that has gone on replace the earlier ones."""
        ...


class SweepLog:
    """Hands a logger each finished fit and the results of a sweep, once.

    Args:
        logger: None logs nothing.
        folder: of the sweep, whose name and time name the group of its runs.

    Raises:
        ValueError: the logger takes single fits only.
    """

    def __init__(self, *, logger: object | None, folder: Path) -> None:
        if logger is not None and not isinstance(logger, SweepLogger):
            raise ValueError(
                f"logger: {type(logger).__name__} takes single fits only; a sweep takes wandb, tensorboard or trackio"
            )
        self.logger, self.file = logger, folder / LOGGED
        self.sweep = name_of(folder)
        self.logged = set(self.file.read_text().split()) if self.file.is_file() else set[str]()

    def fits(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """These fits are finished."""
        if self.logger is None:
            return
        for fit in (FinishedFit(sweep=self.sweep, row=row) for row in rows):
            if fit.id not in self.logged:
                self.logger.log_fit(fit)
                self._keep(fit.id)

    def results(self, frame: pandas.DataFrame, heat_maps: Path) -> None:
        """All fits are finished."""
        key = digest(str(frame.to_json()))
        if self.logger is not None and key not in self.logged:
            self.logger.log_results(self.sweep, frame, heat_maps)
            self._keep(key)

    def _keep(self, key: str) -> None:
        self.logged.add(key)
        with self.file.open("a") as file:
            file.write(f"{key}\n")


def name_of(folder: Path) -> str:
    """What a sweep in a folder is called: its recipe and time."""
    return f"{folder.resolve().parent.name} {folder.resolve().name}"


def digest(*parts: str) -> str:
    """A short name for what the parts say."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def require_package(name: str) -> None:
    """
    Raises:
        RuntimeError: the package is not installed.
    """
    if find_spec(name) is None:
        raise RuntimeError(f"logger={name} needs a package that is not installed: pip install {name}")
