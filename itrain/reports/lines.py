"""Lines over an axis, drawn for print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from itrain.reports.colours import DASHES, GREY, stroke_of
from itrain.reports.text import drawn, listed
from itrain.results.curves import Line, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES: Mapping[str, str] = dict(zip(DASHES, ("-", "--", ":", "-."), strict=True))


def draw_plot(axes: Axes, plot: Plot) -> None:
    """Draw the lines of a plot; of many, the best one is named."""
    for line in plot.lines:
        named = plot.best in (None, line)
        _stroke(axes, line, colour=stroke_of(line.stroke)[0] if named else GREY, named=named)
    axes.set_title(drawn(plot.title), fontsize=9)
    axes.set(xlim=plot.ends, ylim=(-0.03 * plot.top, 1.05 * plot.top))
    axes.set_xlabel(drawn(plot.axis), fontsize=8)
    axes.set_xticks(list(plot.ticks), list(map(drawn, plot.ticks.values())))
    axes.tick_params(labelsize=8, labelbottom=True)
    axes.grid(axis="y", linewidth=0.4)
    if plot.best is not None:
        axes.legend(loc="best", fontsize=7, frameon=False)


def _stroke(axes: Axes, line: Line, *, colour: str, named: bool) -> None:
    x, y = ([getattr(point, side) for point in line.points] for side in ("x", "y"))
    axes.plot(
        x,
        y,
        color=colour,
        linestyle=STYLES[stroke_of(line.stroke)[1]],
        linewidth=1.8 if named else 0.7,
        marker="o" if any(point.interval for point in line.points) or len(x) == 1 else None,
        markersize=4,
        label=listed(line.name) if named else None,
    )
    for point in line.points:
        if point.interval is not None:
            axes.vlines(point.x, *point.interval, color=colour, linewidth=0.9)
