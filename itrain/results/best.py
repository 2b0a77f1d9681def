"""Each method of a sweep at its best site, beside what it must be compared with there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from itrain.results.columns import (
    AUROC,
    AUROC_SELECTIVITY,
    AUROC_SPREAD,
    COMPONENT,
    CONTROL_ACCURACY,
    CONTROL_AUROC,
    CONTROL_TASK,
    CONTROLS,
    DIVERGENCE,
    FALSE_VARIABLE,
    FIGURES,
    FULL_VECTOR,
    GAP,
    IIA,
    LAYER,
    MAJORITY_ACCURACY,
    METHOD,
    NATURAL_DIVERGENCE,
    ODDS,
    ODDS_SELECTIVITY,
    POSITION,
    RANDOM_DIRECTION,
    RANDOM_MODEL,
    RANDOM_SUBSPACE,
    RANK,
    RUNS,
    SELECTIVITY,
    SHIFTED,
    spoken,
)
from itrain.results.controls import is_full_rank, without_void
from itrain.results.intervals import Estimate, estimated
from itrain.results.layers import mean_over_layers
from itrain.results.maps import methods_of
from itrain.results.parts import Table
from itrain.results.peaks import peak_of

if TYPE_CHECKING:
    import pandas

TWIN = "random model"
"""The name of the same fit on a randomly initialised model."""
BEST = "best_sites"
"""The name of the table of best sites in trackers."""
OVER_LAYERS = "mean over layers"
"""The figure at the best position of each layer, averaged over the layers."""
SELECTIVITY_OVER_LAYERS = "its mean over layers"
"""The selectivity at the best position of each layer, averaged over the layers."""
DIRECTIONS, WORST = "random directions", "lowest shift"
"""The mean AUROC of random directions, and its spread; the lowest AUROC of the shifted test sets."""
BESIDE = (
    OVER_LAYERS,
    spoken(RANDOM_SUBSPACE),
    spoken(FULL_VECTOR),
    "control task",
    SELECTIVITY,
    DIRECTIONS,
    WORST,
    SELECTIVITY_OVER_LAYERS,
    "most frequent class",
    *(f"{run} run" for run in RUNS),
    TWIN,
    GAP,
    DIVERGENCE,
)
"""What may stand beside a figure, in this order."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """A method at its best site."""

    method: str
    site: str
    """``layer@position``, and how many others are as good; where nothing is above chance, that there is none."""
    figure: str
    value: Estimate
    beside: Mapping[str, str | Estimate]
    """The figures to compare the value with, by names of ``BESIDE``."""


def best_of(frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]]) -> Iterator[Best]:
    """Each method at its best site: the figure there, and the controls of the same site and rank.

    The best site is that of :func:`~itrain.results.peaks.peak_of`. Where nothing is above chance, no site is named; the
    figure is the highest one, and has no controls beside it. A method that has only figures of the user's own is left
    out: whether higher is better is not known of them.
    """
    frame = without_void(frame)
    for method, part in methods_of(frame, apart):
        figure = next((figure for figure in FIGURES if figure in part and part[figure].notna().any()), None)
        if figure is None:
            continue
        peak = peak_of(part, figure)
        here: Any = part[(part[LAYER] == peak.layer) & (part[POSITION] == peak.position)]
        yield Best(
            method=method,
            site=str(peak),
            figure=FIGURES[figure],
            value=estimated(here, figure),
            beside=_over_layers(part, figure) | _beside(frame, here, figure) if peak.is_above_chance else {},
        )


def best_odds(frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]]) -> Iterator[Best]:
    """Each method at the site of its highest odds, beside those of the control task there, and means over layers."""
    frame = without_void(frame)
    for method, part in methods_of(frame, apart):
        if ODDS not in part or part[ODDS].isna().all():
            continue
        peak = peak_of(part, ODDS)
        here: Any = part[(part[LAYER] == peak.layer) & (part[POSITION] == peak.position)]
        found: dict[str, str | Estimate] = {}
        for column, name in {CONTROL_TASK + ODDS: "control task", ODDS_SELECTIVITY: SELECTIVITY}.items():
            if column in here and here[column].notna().any():
                found[name] = estimated(here, column)
        found |= _over_layers(part, ODDS)
        if ODDS_SELECTIVITY in part:
            found |= _over_layers(part, ODDS_SELECTIVITY, SELECTIVITY_OVER_LAYERS)
        yield Best(method=method, site=str(peak), figure=FIGURES[ODDS], value=estimated(here, ODDS), beside=found)


def _over_layers(part: pandas.DataFrame, figure: str, name: str = OVER_LAYERS) -> dict[str, str | Estimate]:
    """The mean of a figure over the layers, where there are several."""
    mean = mean_over_layers(part, figure)
    return {} if mean is None else {name: f"{mean:.2f}"}


def by_figure(rows: Sequence[Best]) -> dict[str, list[Best]]:
    """The rows of methods that have the same figure."""
    figures = dict.fromkeys(row.figure for row in rows)
    return {figure: [row for row in rows if row.figure == figure] for figure in figures}


def best_table(rows: Sequence[Best]) -> Table:
    """All methods in one table: site, figure, 95% interval and what it is over, and what to compare with."""
    heads = heads_beside(rows)
    lines = {
        row.method: [row.site, row.figure, row.value.short, row.value.between(" to "), row.value.over]
        + [str(row.beside.get(head, "")) for head in heads]
        for row in rows
    }
    titles = ["best site", "figure", "value", "95% interval", "over", *heads]
    return Table(title=BEST, heads=[("", title) for title in titles], rows=lines)


def heads_beside(rows: Sequence[Best]) -> list[str]:
    """The names of what any of the rows has beside its figure."""
    return [head for head in BESIDE if any(head in row.beside for row in rows)]


def _beside(frame: pandas.DataFrame, here: pandas.DataFrame, figure: str) -> dict[str, str | Estimate]:
    """The controls, the control task of a probe, the runs that a trace lies between, the random model and the gap."""
    found: dict[str, str | Estimate] = {}
    if figure == IIA and is_full_rank(here).all():
        found[spoken(RANDOM_SUBSPACE)] = "full rank"
    if figure == IIA:
        for control in CONTROLS:
            estimate = None if control == here[METHOD].iloc[0] else _control(frame, here, control)
            if estimate is not None:
                found[spoken(control)] = estimate
    references = {CONTROL_ACCURACY: "control task", CONTROL_AUROC: "control task"}
    references |= {} if figure == AUROC else {MAJORITY_ACCURACY: "most frequent class"}
    references |= {f"{run}/{figure}": f"{run} run" for run in RUNS}
    references |= {RANDOM_MODEL + figure: TWIN, FALSE_VARIABLE + figure: "false variable"}
    for column, name in references.items():
        if column in here and here[column].notna().any():
            found[name] = estimated(here, column)
    if figure == AUROC:
        found |= _of_detectors(here)
    if GAP in here and here[GAP].notna().any():
        found[GAP] = f"{here[GAP].mean():+.2f}"
    if {DIVERGENCE, NATURAL_DIVERGENCE} <= {*here} and here[DIVERGENCE].notna().any():
        found[DIVERGENCE] = f"{here[DIVERGENCE].mean():.3g} ({here[NATURAL_DIVERGENCE].mean():.3g})"
    return found


def _of_detectors(here: pandas.DataFrame) -> dict[str, str | Estimate]:
    """What stands beside a detector alone: selectivity, random directions, and the shift that it tells least in."""
    found: dict[str, str | Estimate] = {}
    if AUROC_SELECTIVITY in here and here[AUROC_SELECTIVITY].notna().any():
        found[SELECTIVITY] = estimated(here, AUROC_SELECTIVITY)
    means = [here[RANDOM_DIRECTION + each].mean() for each in (AUROC, AUROC_SPREAD) if RANDOM_DIRECTION + each in here]
    if means and means[0] == means[0]:
        found[DIRECTIONS] = " ±".join(f"{mean:.2f}" for mean in means if mean == mean)
    shifts = {name: here[name].mean() for name in map(str, here) if name.startswith(SHIFTED) and name.endswith(AUROC)}
    if known := {name: mean for name, mean in shifts.items() if mean == mean}:
        worst = min(known, key=lambda name: known[name])
        found[WORST] = f"{known[worst]:.2f} ({worst.removeprefix(SHIFTED).removesuffix('/' + AUROC)})"
    return found


def _control(frame: pandas.DataFrame, here: pandas.DataFrame, control: str) -> Estimate | None:
    keys = [key for key in (LAYER, POSITION, COMPONENT) if key in frame]
    there: Any = frame[(frame[METHOD] == control) & (frame[keys] == here[keys].iloc[0]).all(axis=1)]
    if control == RANDOM_SUBSPACE and RANK in frame:
        there = there[there[RANK] == here[RANK].iloc[0]]
    return estimated(there, IIA) if len(there) and there[IIA].notna().any() else None
