"""The table of reproductions: what was published or planted, what our runs have found, and whether that holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

HOLDS, MISSED, FAILED, NOT_RUN, DONE = "holds", "missed", "failed", "not run", "done"
"""The states of a row whose runs are all there, or cannot be; the others say how many seeds are there."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is known of a figure.

    Args:
        published: the figure of the paper or of its code; None: there is none, the answer is planted.
        at_least, at_most: what the mean over seeds must keep to.
    """

    published: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bounds(self) -> str:
        """The bounds as text: ``>= 0.95``."""
        said = [f">= {self.at_least:g}"] if self.at_least is not None else []
        return ", ".join(said + ([f"<= {self.at_most:g}"] if self.at_most is not None else []))

    def holds(self, value: float) -> bool:
        """Whether a value keeps to the bounds; one that is no number does not."""
        low, high = self.at_least, self.at_most
        return not math.isnan(value) and (low is None or value >= low) and (high is None or value <= high)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: a command, and what its figures should be.

    Args:
        name: of the row.
        title: one line.
        paper: where the figures were published, or what the question is from.
        command: what follows ``itrain``; ``{seed}`` stands for the seed.
        seeds: one run each.
        figures: of a fit, the keys of its metrics.json; of a sweep, ``<method>/<site>/<figure>`` of its table, where a
            site is ``best``, ``mean_over_layers`` or as ``layer2.block_output@name``.
        minutes: of one seed on two cores, as measured; None: it has not been.
        quick: whether a seed takes less than 20 seconds.
        needs: what is missing here, such as weights; such a row is listed and not run.
        package: a package that must be installed for the row to be run.
    """

    name: str
    title: str
    paper: str
    command: str
    seeds: Sequence[int]
    figures: Mapping[str, Expected]
    minutes: float | None
    quick: bool = False
    needs: str | None = None
    package: str | None = None

    def command_of(self, seed: int) -> str:
        """The command of one seed, without ``itrain`` before it."""
        return self.command.replace("{seed}", str(seed))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One seed of a row.

    Args:
        seed: its seed.
        folder: the run's.
        seconds: of loading, training and testing.
        made_with: what it was run with: CPU, cores, GPU, torch, itrain, commit.
        figures: those of its row.
    """

    seed: int
    folder: str
    seconds: float
    made_with: Mapping[str, Any]
    figures: Mapping[str, float]

    @property
    def hardware(self) -> str:
        """CPU or GPU, cores and torch in a line."""
        made = self.made_with
        device = f"{made['gpu']}, " if made.get("gpu") else ""
        return f"{device}{made.get('cpu')}, {made.get('cores')} cores, torch {made.get('torch')}"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the runs of a row have found for one figure."""

    name: str
    expected: Expected
    values: Sequence[float]
    """In the order of the runs."""

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None without a run."""
        return fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None of fewer than two, or where one is no number."""
        return stdev(self.values) if len(self.values) > 1 and all(map(math.isfinite, self.values)) else None

    @property
    def holds(self) -> bool:
        """Whether there is a mean that keeps to the bounds."""
        return self.mean is not None and self.expected.holds(self.mean)

    @property
    def published(self) -> str:
        """The published figure as text."""
        return "planted" if self.expected.published is None else f"{self.expected.published:.4g}"

    @property
    def ours(self) -> str:
        """Mean and spread as text."""
        if self.mean is None:
            return ""
        return f"{self.mean:.3f}" + (f" ± {self.spread:.3f}" if self.spread is not None else "")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A row with its runs so far, and the error that has ended one of them."""

    row: Row
    runs: Sequence[Run] = ()
    error: str | None = None
    needs: str | None = None
    """What is missing on this machine."""

    @property
    def figures(self) -> list[Found]:
        """The row's figures in its order."""
        return [
            Found(name=name, expected=expected, values=[run.figures[name] for run in self.runs])
            for name, expected in self.row.figures.items()
        ]

    @property
    def is_complete(self) -> bool:
        """Whether all its seeds have run."""
        return len(self.runs) == len(self.row.seeds)

    @property
    def state(self) -> str:
        """What has come of the row, in a word or two."""
        if self.error is not None:
            return FAILED
        if not self.is_complete:
            return NOT_RUN if self.needs or not self.runs else f"{len(self.runs)} of {len(self.row.seeds)} seeds"
        if not all(found.holds for found in self.figures):
            return MISSED
        return HOLDS if any(expected.bounds for expected in self.row.figures.values()) else DONE

    @property
    def minutes(self) -> float | None:
        """Of one seed, on average; None without a run."""
        return fmean(run.seconds for run in self.runs) / 60 if self.runs else None

    @property
    def hardware(self) -> str:
        """What its runs were made on."""
        return "; ".join(dict.fromkeys(run.hardware for run in self.runs))

    def plain(self) -> dict[str, Any]:
        """The outcome as data for JSON, which knows no number that is not finite."""
        row = self.row
        figures = [
            {
                "name": found.name,
                "published": found.expected.published,
                "at_least": found.expected.at_least,
                "at_most": found.expected.at_most,
                "mean": _finite(found.mean),
                "spread": _finite(found.spread),
                "values": [_finite(value) for value in found.values],
                "holds": found.holds if found.values else None,
            }
            for found in self.figures
        ]
        runs = [
            {
                "seed": run.seed,
                "command": f"itrain {row.command_of(run.seed)}",
                "folder": run.folder,
                "seconds": run.seconds,
                "made_with": dict(run.made_with),
            }
            for run in self.runs
        ]
        return {
            "name": row.name,
            "title": row.title,
            "paper": row.paper,
            "command": f"itrain {row.command}",
            "seeds": list(row.seeds),
            "quick": row.quick,
            "state": self.state,
            "needs": self.needs,
            "error": self.error,
            "minutes": self.minutes,
            "figures": figures,
            "runs": runs,
        }


def counted(outcomes: Sequence[Outcome]) -> str:
    """How many rows there are in each state, as text."""
    states = [outcome.state if outcome.is_complete or outcome.error else NOT_RUN for outcome in outcomes]
    said = [f"{states.count(state)} {state}" for state in (HOLDS, DONE, MISSED, FAILED, NOT_RUN) if state in states]
    return f"{len(outcomes)} row{'s' * (len(outcomes) != 1)}: {', '.join(said)}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
