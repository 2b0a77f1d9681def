"""The curves of a sweep as PNG and SVG, for print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from itrain.reports.colours import DASHES, GREY, stroke_of
from itrain.reports.figures import save_figure
from itrain.reports.text import drawn, listed
from itrain.results.columns import FIGURES, IIA, RANK_FOUND, spoken
from itrain.results.curves import Line, Plot
from itrain.results.summary import SweepSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACROSS = 3
"""Plots beside each other before a new row of them begins."""
FILES: Mapping[str, tuple[str, str]] = {
    "rank": ("ranks", FIGURES[IIA]),
    "layer": ("boundaries", spoken(RANK_FOUND)),
    "epoch": ("training", f"{FIGURES[IIA]}, validation"),
}
"""The file and the label of the plots over each axis."""
STYLES: Mapping[str, str] = dict(zip(DASHES, ("-", "--", ":", "-."), strict=True))


def save_curves(summary: SweepSummary) -> None:
    """Draw the curves that a sweep has into its folder: ``ranks``, ``boundaries``, ``training``."""
    for axis, (name, label) in FILES.items():
        if summary.plots[axis]:
            _save(summary.plots[axis], label, summary.folder / f"{name}.png")


def _save(plots: Sequence[Plot], label: str, path: Path) -> None:
    from matplotlib.figure import Figure

    across = min(len(plots), ACROSS)
    down = -(-len(plots) // across)
    figure = Figure(figsize=(3.2 * across + 0.4, 2.6 * down + 0.4), layout="constrained")
    axes = figure.subplots(down, across, sharey=True, squeeze=False)
    for place, plot in zip(axes.flat, plots, strict=False):
        _draw(place, plot)
    for place in axes.flat[len(plots) :]:
        place.set_axis_off()
    figure.supylabel(drawn(label), fontsize=9)
    if sample := " or ".join(dict.fromkeys(plot.sample for plot in plots if plot.sample)):
        figure.supxlabel(drawn(f"a point: {sample}; a vertical line: its 95% interval"), fontsize=8)
    if plots[0].best is None:
        named = {line.get_label(): line for place in axes.flat for line in place.get_legend_handles_labels()[0]}
        figure.legend(named.values(), named, loc="outside upper center", ncols=5, fontsize=9, frameon=False)
    save_figure(figure, path, path.with_suffix(".svg"))


def _draw(axes: Axes, plot: Plot) -> None:
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
