"""The figure of a run: its results as bars, beside the curve of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from itrain.files import replacing
from itrain.reports.colours import BLUE, GREY, ORANGE, SOFT
from itrain.reports.lines import draw_plot
from itrain.reports.text import drawn, listed
from itrain.results.history import Curve
from itrain.results.run import Bars, summarise_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 9.0
"""Inches of a figure with several pictures."""
SHARES = 1.15
"""The right end of an axis of shares, with room for the numbers at the bars."""
LETTERS = 17
"""Letters of a caption in an inch."""
ROOM = 0.25
"""The room for the numbers at bars of other figures, as a share of the axis."""


def save_run_figure(metrics: Path, results: Mapping[str, float], path: Path) -> None:
    """Draw what a run found, as PNG and SVG: the figures of the test, and the curve of the training if there is one.

    Args:
        metrics: the run's ``metrics.csv``; a run that trains nothing has none.
        results: the run's final figures.
        path: of the PNG; the SVG goes beside it.
    """
    from matplotlib.figure import Figure

    summary = summarise_run(results, metrics)
    names = 0 if summary.bars is None else len(summary.bars.names)
    widths = [1.0] * len(summary.plots) or [1.5]
    trained = [1.0] if summary.curve is not None else []
    wide = WIDE if trained or summary.plots else WIDE * 0.7
    figure = Figure(figsize=(wide, max(3.6, 0.25 * names)), layout="constrained")
    (row,) = figure.subplots(1, len(widths + trained), width_ratios=widths + trained, squeeze=False)
    lefts = row[: len(widths)]
    for place, plot in zip(lefts, summary.plots, strict=False):
        draw_plot(place, plot)
    if summary.plots:
        figure.legend(*lefts[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    elif summary.bars is None:
        _say(lefts[0], "no figures")
    else:
        _draw_bars(lefts[0], summary.bars)
    if summary.curve is not None:
        _draw_curve(row[-1], summary.curve)
    if summary.caption:
        lines = wrap(drawn(summary.caption), int(wide * LETTERS))
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color=SOFT)
    save_figure(figure, path, path.with_suffix(".svg"))


def save_figure(figure: Figure, *paths: Path) -> None:
    """Write a figure to each of the paths, in the format that its suffix names."""
    for path in paths:
        with replacing(path) as beside:
            figure.savefig(beside, format=path.suffix[1:], dpi=150)


def _draw_bars(axes: Axes, bars: Bars) -> None:
    places = range(len(bars.names))
    step = 0.76 / len(bars.series)
    colours = (GREY, ORANGE, BLUE)[-len(bars.series) :]
    for number, ((label, values), colour) in enumerate(zip(bars.series.items(), colours, strict=True)):
        middle = (number - (len(bars.series) - 1) / 2) * step
        height = 0.95 * step
        ends = bars.intervals.get(label, [None] * len(values))
        reach = [
            # By rounding, an end may lie on the other side of the value.
            (max(value - each[0], 0.0), max(each[1] - value, 0.0)) if each else (0.0, 0.0)
            for value, each in zip(values, ends, strict=True)
        ]
        whiskers = (
            {"xerr": [*zip(*reach, strict=True)], "error_kw": {"elinewidth": 0.9, "capsize": 2.5}} if any(ends) else {}
        )
        bar = axes.barh(
            [place + middle for place in places], values, height=height, color=colour, label=listed(label), **whiskers
        )
        axes.bar_label(bar, fmt="%.2f" if bars.shares else "%.5g", padding=3)
    for place, mark in enumerate(bars.marks):
        label = "" if place else bars.mark
        axes.vlines(mark, place - 0.45, place + 0.45, "k", "dotted", label=label)
    values = [value for each in bars.series.values() for value in each]
    axes.set_yticks(places, list(map(drawn, bars.names)))
    axes.set(xlim=_limits(values, shares=bars.shares), xlabel=drawn(bars.axis))
    if len(bars.series) > 1 or bars.marks:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, reverse=True)


def _limits(values: Sequence[float], *, shares: bool) -> tuple[float, float]:
    """The ends of an axis of bars, with 0 and room for the numbers at the bars."""
    finite = [value for value in values if isfinite(value)]
    low, high = min(0.0, *finite, 0.0), max(0.0, *finite, 0.0)
    if shares:
        return low, SHARES
    room = ROOM * ((high - low) or 1)
    return (low - room if low < 0 else low), high + room


def _draw_curve(axes: Axes, curve: Curve) -> None:
    axes.plot(*zip(*curve.losses, strict=True), color=GREY)
    axes.set(xlabel="training step", ylabel=drawn(curve.loss))
    if curve.validation:
        steps, values = zip(*curve.validation, strict=True)
        right = axes.twinx()
        right.plot(steps, values, color=BLUE, marker="o", markersize=3)
        right.set_ylabel(drawn(curve.figure), color=BLUE)
        if all(0 <= value <= 1 for value in values):
            right.set_ylim(0, 1.05)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY)
    axes.set_axis_off()
