"""The curves of a sweep as plain numbers and words: over rank, over training, and how many dimensions gates chose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itrain.reports.pictures import CONTROL, FIGURES, FIRST, PLACE, estimated, methods_of, spoken

if TYPE_CHECKING:
    import pandas

FOUND = "rank_found"
"""The column of the rank that a gate or boundary came to."""
CURVES = "curves.parquet"
VALIDATION = f"validation/{FIRST}"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Of lines, apart for colour-blind readers (Okabe and Ito)."""
DASHES = ("none", "6 3", "2 2", "8 3 2 3")
"""So that lines stay apart in grey print."""
TICKS = 5
"""Numbers below a plot over epochs at most."""
LEFT, RIGHT, TOP, BOTTOM = 40, 330, 10, 150
"""Where the axes of a plot lie in its drawing."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A figure with its 95% interval, where there is one, and the fits that it is of."""

    x: float
    y: float
    says: str
    name: str = ""
    interval: tuple[float, float] | None = None
    fits: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is drawn in one stroke; a line of one fit has that fit."""

    name: str
    points: Sequence[Point]
    colour: str = COLOURS[0]
    dash: str = DASHES[0]
    fits: Sequence[int] = ()

    @property
    def says(self) -> str:
        """From where to where it goes."""
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

    def across(self, x: float) -> float:
        """Where a value lies in the drawing, from the left."""
        first, last = self.ends
        return round(LEFT + (RIGHT - LEFT) * (x - first) / (last - first), 1)

    def down(self, y: float) -> float:
        """Where a value lies in the drawing, from above."""
        return round(BOTTOM - (BOTTOM - TOP) * min(max(y / self.top, 0), 1), 1)

    def path(self, line: Line) -> str:
        return " ".join(f"{self.across(point.x):g},{self.down(point.y):g}" for point in line.points)


def read_curves(folder: Path) -> pandas.DataFrame:
    """The validation after each epoch; empty where nothing was trained, or an older sweep has left none."""
    import pandas

    file = folder / CURVES
    return pandas.read_parquet(file) if file.is_file() else pandas.DataFrame()


def over_rank(frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]], tokens: Mapping[str, str]) -> Iterator[Plot]:
    """At each position, in the layer where learned methods do best, the methods that were fitted at several ranks."""
    if "rank" not in frame or FIRST not in frame:
        return
    others = {method: [name for name in names if name != "rank"] for method, names in apart.items()}
    frame = frame.loc[frame[FIRST].notna()]
    methods = {name: part for name, part in methods_of(frame, others) if part["rank"].nunique() > 1}
    learned = frame[frame.method.isin([part.method.iloc[0] for part in methods.values()]) & (frame.method != CONTROL)]
    ranks = sorted({rank for part in methods.values() for rank in part["rank"].dropna()})
    for position, there in learned.groupby("position", sort=False):
        layer = there.groupby("layer")[FIRST].mean().idxmax()
        lines = []
        for (method, part), (colour, dash) in zip(methods.items(), _strokes(), strict=False):
            found: Any = part[(part.position == position) & (part.layer == layer)].groupby("rank")
            points = [_estimated(fits, FIRST, ranks.index(rank), f"{method}, rank {rank:g}") for rank, fits in found]
            lines.append(Line(name=method, colour=colour, dash=dash, points=points))
        steps = [f"{rank:g}" for rank in ranks]
        yield _over_steps(f"{_named(str(position), tokens)}, layer {layer}", "rank", steps, lines)


def boundaries(
    frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]], tokens: Mapping[str, str]
) -> Iterator[Plot]:
    """The rank that each method with a gate came to, over layers, a line for each position."""
    if FOUND not in frame:
        return
    strokes = dict(zip(dict.fromkeys(frame.position), _strokes(), strict=False))
    for name, part in methods_of(frame.loc[frame[FOUND].notna()], apart):
        layers = sorted(part.layer.unique())
        lines = []
        positions: Any = part.groupby("position", sort=False)
        for position, there in positions:
            colour, dash = strokes[position]
            called = _named(position, tokens)
            points = [
                _estimated(fits, FOUND, layers.index(layer), f"{name}, layer {layer}, {called}")
                for layer, fits in there.groupby("layer")
            ]
            lines.append(Line(name=called, colour=colour, dash=dash, points=points))
        top = 2 * max(1, ceil(part[FOUND].max() / 2))
        yield _over_steps(name, "layer", list(map(str, layers)), lines, top=top)


def over_training(
    curves: pandas.DataFrame, frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]]
) -> Iterator[Plot]:
    """The validation of each trained method, a line for each fit, of which the best comes last.

    Args:
        curves: a row for each fit and epoch.
        frame: a row for each fit.
        apart: the settings of which each method has several.
    """
    if VALIDATION not in curves:
        return
    number = dict(zip(frame.command, frame.index, strict=True))
    several = frame.seed.nunique() > 1
    for name, part in methods_of(curves, apart):
        lines = []
        fits: Any = part.groupby([*PLACE, "seed", "command"], sort=False)
        for (layer, position, seed, command), epochs in fits:
            called = f"layer {layer}, {position}" + (f", seed {seed}" if several else "")
            points = [
                Point(x=epoch + 1, y=share, says=f"epoch {epoch + 1}: {share:.2f}")
                for epoch, share in zip(epochs.epoch, epochs[VALIDATION], strict=True)
            ]
            lines.append(Line(name=called, points=points, fits=[int(str(number[command]))]))
        # Of fits that end alike, the one that has learned soonest.
        lines.sort(key=lambda line: (line.points[-1].y, sum(point.y for point in line.points)), reverse=True)
        last = int(part.epoch.max()) + 1
        step = ceil(last / TICKS)
        ticks = {float(epoch): str(epoch) for epoch in range(step, last + 1, step)}
        yield Plot(
            title=name, axis="epoch", ticks=ticks, ends=(min(1, last - 1), last), lines=lines[::-1], best=lines[0]
        )


def _over_steps(title: str, axis: str, steps: Sequence[str], lines: Sequence[Line], top: float = 1) -> Plot:
    """Evenly spaced steps, half a step from either end."""
    ticks = {float(place): step for place, step in enumerate(steps)}
    return Plot(title=title, axis=axis, ticks=ticks, ends=(-0.5, len(steps) - 0.5), lines=lines, top=top)


def _estimated(fits: pandas.DataFrame, figure: str, x: float, name: str) -> Point:
    estimate = estimated(fits, figure, highest=inf if figure == FOUND else 1)
    said = f"{FIGURES.get(figure, spoken(figure))}: {estimate}"
    fits_of = tuple(int(str(number)) for number in fits.index)
    return Point(x=x, y=estimate.value, interval=estimate.interval, name=name, says=said, fits=fits_of)


def _named(position: str, tokens: Mapping[str, str]) -> str:
    return f"{position} {tokens[position]}" if position in tokens else position


def _strokes() -> Iterator[tuple[str, str]]:
    """Colours with dashes, 16 pairs that are all different, again and again."""
    count = 0
    while True:
        yield COLOURS[count % 4], DASHES[(count + count // 4) % 4]
        count += 1
