"""The curves of a sweep as plain numbers and words: over rank, over training, and the ranks that gates found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from itrain.results.columns import (
    COMMAND,
    EPOCH,
    FIGURES,
    IIA,
    LAYER,
    METHOD,
    PLACE,
    POSITION,
    RANDOM_SUBSPACE,
    RANK,
    RANK_FOUND,
    SEED,
    VALIDATION,
    in_order,
    named_layer,
    spoken,
)
from itrain.results.controls import without_void
from itrain.results.intervals import estimated
from itrain.results.maps import axis_of, methods_of
from itrain.results.peaks import DIGITS, first_highest

if TYPE_CHECKING:
    import pandas

TICKS = 5
"""Numbers below a plot over epochs at most."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A figure with its 95% interval, where there is one, and the fits that it is of."""

    x: float
    y: float
    says: str
    name: str = ""
    interval: tuple[float, float] | None = None
    over: str = ""
    """What the interval is over."""
    fits: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is drawn in one stroke; a line of one fit has that fit."""

    name: str
    points: Sequence[Point]
    stroke: int = 0
    """Lines of equal strokes look alike, in all plots of a sweep."""
    fits: Sequence[int] = ()

    @property
    def says(self) -> str:
        """Its first and its last point."""
        return "\n".join(point.says for point in dict.fromkeys((self.points[0], self.points[-1])))


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Lines over one axis; of many, the ``best`` one is named."""

    title: str
    axis: str
    ticks: Mapping[float, str]
    ends: tuple[float, float]
    lines: Sequence[Line]
    top: float = 1
    best: Line | None = None

    @property
    def sample(self) -> str:
        """Of how many seeds and pairs a point is; nothing where no point has an interval."""
        return " or ".join(dict.fromkeys(point.over for line in self.lines for point in line.points if point.over))


def over_rank(frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]], tokens: Mapping[str, str]) -> Iterator[Plot]:
    """At each position, in the layer where learned methods do best, the methods that were fitted at several ranks."""
    if RANK not in frame or IIA not in frame:
        return
    others = {method: [name for name in names if name != RANK] for method, names in apart.items()}
    frame = frame.loc[frame[IIA].notna()]
    methods = {name: without_void(part) for name, part in methods_of(frame, others) if part[RANK].nunique() > 1}
    ranked = {part[METHOD].iloc[0] for part in methods.values()} - {RANDOM_SUBSPACE}
    learned = frame[frame[METHOD].isin(ranked)]
    ranks = sorted({rank for part in methods.values() for rank in part[RANK].dropna()})
    for position, there in learned.groupby(POSITION, sort=False):
        layer = first_highest(there.groupby(LAYER)[IIA].mean())
        lines = []
        for stroke, (method, part) in enumerate(methods.items()):
            found: Any = part[(part[POSITION] == position) & (part[LAYER] == layer)].groupby(RANK)
            points = [_estimated(fits, IIA, ranks.index(rank), f"{method}, rank {rank:g}") for rank, fits in found]
            if points:
                lines.append(Line(name=method, stroke=stroke, points=points))
        steps = [f"{rank:g}" for rank in ranks]
        yield _over_steps(f"{_named(str(position), tokens)}, {named_layer(layer)}", "rank", steps, lines)


def boundaries(
    frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]], tokens: Mapping[str, str]
) -> Iterator[Plot]:
    """The rank that each method with a gate came to, over layers, a line for each position."""
    if RANK_FOUND not in frame:
        return
    strokes = {position: stroke for stroke, position in enumerate(dict.fromkeys(frame[POSITION]))}
    for name, part in methods_of(frame.loc[frame[RANK_FOUND].notna()], apart):
        layers = in_order(part[LAYER].unique())
        lines = []
        positions: Any = part.groupby(POSITION, sort=False)
        for position, there in positions:
            called = _named(position, tokens)
            points = [
                _estimated(fits, RANK_FOUND, layers.index(layer), f"{name}, {named_layer(layer)}, {called}")
                for layer, fits in there.groupby(LAYER)
            ]
            lines.append(Line(name=called, stroke=strokes[position], points=points))
        top = 2 * max(1, ceil(part[RANK_FOUND].max() / 2))
        yield _over_steps(name, axis_of(layers), list(map(str, layers)), lines, top=top)


def over_training(
    curves: pandas.DataFrame, frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]]
) -> Iterator[Plot]:
    """The validation of each trained method, a line for each fit, of which the best comes last.

    Args:
        curves: a row for each fit and epoch.
        frame: a row for each fit.
        apart: the settings of which each method has several.
    """
    validated = VALIDATION + IIA
    if validated not in curves:
        return
    number = dict(zip(frame[COMMAND], frame.index, strict=True))
    several = frame[SEED].nunique() > 1
    for name, part in methods_of(curves.loc[curves[validated].notna()], apart):
        lines = []
        fits: Any = part.sort_values(LAYER, kind="stable").groupby([*PLACE, SEED, COMMAND], sort=False)
        for (layer, position, seed, command), epochs in fits:
            called = f"{named_layer(layer)}, {position}" + (f", seed {seed}" if several else "")
            points = [
                Point(x=epoch + 1, y=share, says=f"epoch {epoch + 1}: {share:.2f}")
                for epoch, share in zip(epochs[EPOCH], epochs[validated], strict=True)
            ]
            lines.append(Line(name=called, points=points, fits=[int(str(number[command]))]))
        lines.sort(key=_rise, reverse=True)
        last = int(part[EPOCH].max()) + 1
        step = ceil(last / TICKS)
        ticks = {float(epoch): str(epoch) for epoch in range(step, last + 1, step)}
        yield Plot(
            title=name, axis="epoch", ticks=ticks, ends=(min(1, last - 1), last), lines=lines[::-1], best=lines[0]
        )


def _rise(line: Line) -> tuple[float, float]:
    """How high a fit ends and, of those that end alike, how soon it got there; equal ones keep their order."""
    return round(line.points[-1].y, DIGITS), round(sum(point.y for point in line.points), DIGITS)


def _over_steps(title: str, axis: str, steps: Sequence[str], lines: Sequence[Line], top: float = 1) -> Plot:
    """Evenly spaced steps, half a step from either end."""
    ticks = {float(place): step for place, step in enumerate(steps)}
    return Plot(title=title, axis=axis, ticks=ticks, ends=(-0.5, len(steps) - 0.5), lines=lines, top=top)


def _estimated(fits: pandas.DataFrame, figure: str, x: float, name: str) -> Point:
    estimate = estimated(fits, figure)
    said = f"{FIGURES.get(figure, spoken(figure))}: {estimate}"
    said += f"\n95% interval over {estimate.over}" if estimate.over else ""
    fits_of = tuple(int(str(number)) for number in fits.index)
    over = estimate.over
    return Point(x=x, y=estimate.value, interval=estimate.interval, over=over, name=name, says=said, fits=fits_of)


def _named(position: str, tokens: Mapping[str, str]) -> str:
    return f"{position} {tokens[position]}" if position in tokens else position
