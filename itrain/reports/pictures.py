"""The pictures of a report as plain numbers and words: heat maps over layer and position, and curves over rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from itrain.reports.intervals import over_pairs, over_seeds
from itrain.reports.sweeps import COLOURS, FIGURES

if TYPE_CHECKING:
    import pandas

FIRST = next(iter(FIGURES))
"""The figure of interventions, a share of label-changing pairs."""
CONTROL, CEILING = "random_subspace", "full_vector"
PLACE = ["layer", "position"]
"""The columns that make a cell of a heat map."""
LINES = {"#0072b2": "none", "#d55e00": "6 3", "#009e73": "2 2", "#cc79a7": "8 3 2 3"}
"""Colours of lines that stay apart for colour-blind readers (Okabe and Ito), each with a dash of its own."""
LEFT, WIDTH, BOTTOM, HEIGHT = 40, 210, 130, 120
"""Where the axes of a plot lie in its drawing."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95% interval, where pairs or seeds give one."""

    value: float
    interval: tuple[float, float] | None = None
    over: str = ""

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ({self.interval[0]:.2f} to {self.interval[1]:.2f})"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The fits of one layer and position in a heat map, one for each seed."""

    estimate: Estimate
    name: str
    details: Sequence[str]
    flagged: bool
    fits: Sequence[int]

    @property
    def style(self) -> str:
        background, ink = colour_of(round(min(max(self.estimate.value, 0), 1), 2))
        return f"background:{background};color:{ink}"


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """One figure of one method, layers (the last on top) by positions."""

    method: str
    figure: str
    positions: Sequence[str]
    rows: Mapping[int, Sequence[Cell | None]]


class Point(NamedTuple):
    """A figure and its interval at one rank, in the coordinates of its plot, and what it says."""

    x: float
    y: float
    low: float
    high: float
    says: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A method over ranks."""

    method: str
    colour: str
    dash: str
    points: Sequence[Point]

    @property
    def path(self) -> str:
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Methods over ranks at one site."""

    title: str
    ticks: Mapping[int, float]
    lines: Sequence[Line]


def settings_apart(frames: Sequence[pandas.DataFrame]) -> dict[str, list[str]]:
    """The settings of which each method has several in all sweeps taken together; they stand before the command."""
    values: dict[str, dict[str, set[str]]] = {}
    for frame in frames:
        for name in frame.columns[: list(frame).index("command")].difference(["method", "seed", *PLACE], sort=False):
            for method, found in frame.groupby("method")[name]:
                values.setdefault(str(method), {}).setdefault(name, set()).update(map(written, found.unique()))
    return {method: [name for name, each in named.items() if len(each) > 1] for method, named in values.items()}


def methods_of(frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, pandas.DataFrame]]:
    """Each method, its fits apart by the settings that are named for it."""
    for method in dict.fromkeys(frame.method):
        part = frame.loc[frame.method == method]
        several = [name for name in apart[method] if name in part]
        if not several:
            yield method.replace("_", " "), part
            continue
        for values, fits in part.groupby(several, sort=False, dropna=False):
            named = ", ".join(f"{name} {written(value)}" for name, value in zip(several, values, strict=True))
            yield f"{method.replace('_', ' ')}, {named}", fits


def maps_of(frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]]) -> Iterator[HeatMap]:
    """A heat map for each method and each of its figures."""
    order = list(dict.fromkeys(frame.position))
    for method, part in methods_of(frame, apart):
        positions = [position for position in order if (part.position == position).any()]
        fits: dict[Any, Any] = dict(iter(part.groupby(PLACE)))
        for figure in (figure for figure in FIGURES if figure in part and part[figure].notna().any()):
            rows = {
                layer: [_cell(method, figure, fits.get((layer, position))) for position in positions]
                for layer in sorted(part.layer.unique(), reverse=True)
            }
            yield HeatMap(method=method, figure=FIGURES[figure], positions=positions, rows=rows)


def _cell(method: str, figure: str, fits: pandas.DataFrame | None) -> Cell | None:
    if fits is None or fits[figure].isna().all():
        return None
    first, estimate = fits.iloc[0], estimated(fits, figure)
    said = [f"{FIGURES[figure]}: {estimate}"]
    if estimate.over:
        said.append(f"95% interval over {estimate.over}")
    figures = fits.iloc[:, list(fits).index("command") + 1 :].select_dtypes("number").mean().dropna()
    said += [f"{name.replace('_', ' ')}: {written(value)}" for name, value in figures.items() if name != figure]
    flags = sorted({flag for flag in fits.flag if flag})
    return Cell(
        estimate=estimate,
        name=f"{method}, layer {first.layer}, {first.position}",
        details=[*said, *(f"flag: {flag}" for flag in flags)],
        flagged=bool(flags),
        fits=[int(str(number)) for number in fits.index],
    )


def estimated(fits: pandas.DataFrame, figure: str) -> Estimate:
    """The mean over seeds; of one seed, the share of its label-changing pairs."""
    values = [float(value) for value in fits[figure].dropna()]
    if len(values) > 1:
        low, high = over_seeds(values)
        # Selectivity is a difference of shares, the others are shares.
        interval = max(low, -1.0 if figure == "selectivity" else 0.0), min(high, 1.0)
        return Estimate(value=sum(values) / len(values), interval=interval, over=f"{len(values)} seeds")
    if figure == FIRST and "pairs_changing" in fits:
        pairs = float(fits.pairs_changing.iloc[0])
        return Estimate(value=values[0], interval=over_pairs(values[0], pairs), over=f"{pairs:.0f} pairs")
    return Estimate(value=values[0])


def plots_of(frame: pandas.DataFrame) -> Iterator[Plot]:
    """At each position, in the layer where learned methods do best, the methods that were fitted at several ranks."""
    if "rank" not in frame or FIRST not in frame:
        return
    methods = [m for m in dict.fromkeys(frame.method) if frame.loc[frame.method == m, "rank"].nunique() > 1]
    ranked = frame.loc[frame.method.isin(methods)]
    learned = ranked.loc[ranked.method != CONTROL]
    ranks = sorted(ranked["rank"].unique())
    ticks = {rank: LEFT + WIDTH * (place + 0.5) / len(ranks) for place, rank in enumerate(ranks)}
    for position, part in learned.groupby("position", sort=False):
        layer = part.groupby("layer")[FIRST].mean().idxmax()
        here = ranked[(ranked.position == position) & (ranked.layer == layer)]
        lines = []
        for method, (colour, dash) in zip(methods, cycle(LINES.items()), strict=False):
            points = []
            for rank, fits in here[here.method == method].groupby("rank"):
                estimate = estimated(fits, FIRST)
                low, high = estimate.interval or (estimate.value, estimate.value)
                y, *ends = map(_height, (estimate.value, low, high))
                says = f"{method.replace('_', ' ')}, rank {rank:g}: {estimate}"
                points.append(Point(x=ticks[rank], y=y, low=ends[0], high=ends[1], says=says))
            lines.append(Line(method=method.replace("_", " "), colour=colour, dash=dash, points=points))
        yield Plot(title=f"{position}, layer {layer}", ticks={int(rank): x for rank, x in ticks.items()}, lines=lines)


def _height(share: float) -> float:
    return BOTTOM - HEIGHT * min(max(share, 0), 1)


@cache
def colour_of(share: float) -> tuple[str, str]:
    """The colour of a share and that of text on it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    rgb = colormaps[COLOURS](share)[:3]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # From here on black stands out more than white (WCAG 2).
    return to_hex(rgb), "#000" if luminance > 0.179 else "#fff"


def written(value: Any) -> str:
    """A value as the page shows it; what is missing as nothing."""
    if isinstance(value, int | float):
        return "" if value != value else f"{value:.4g}"
    return "" if value is None or value != value else str(value)
