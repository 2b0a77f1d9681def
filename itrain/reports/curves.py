"""The curves of a sweep as PNG and SVG, for print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from itrain.reports.figures import save_figure
from itrain.reports.lines import draw_plot
from itrain.reports.text import drawn
from itrain.results.columns import FIGURES, IIA, RANK_FOUND, spoken
from itrain.results.curves import Plot
from itrain.results.summary import SweepSummary

ACROSS = 3
"""Plots beside each other before a new row of them begins."""
FILES: Mapping[str, tuple[str, str]] = {
    "rank": ("ranks", FIGURES[IIA]),
    "layer": ("boundaries", spoken(RANK_FOUND)),
    "epoch": ("training", f"{FIGURES[IIA]}, validation"),
}
"""The file and the label of the plots over each axis."""


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
        draw_plot(place, plot)
    for place in axes.flat[len(plots) :]:
        place.set_axis_off()
    figure.supylabel(drawn(label), fontsize=9)
    if sample := " or ".join(dict.fromkeys(plot.sample for plot in plots if plot.sample)):
        figure.supxlabel(drawn(f"a point: {sample}; a vertical line: its 95% interval"), fontsize=8)
    if plots[0].best is None:
        named = {line.get_label(): line for place in axes.flat for line in place.get_legend_handles_labels()[0]}
        figure.legend(named.values(), named, loc="outside upper center", ncols=5, fontsize=9, frameon=False)
    save_figure(figure, path, path.with_suffix(".svg"))
