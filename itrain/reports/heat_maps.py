"""The heat maps of a sweep as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from itrain.reports.colours import DIFFERENCES, SCALE, colour_of
from itrain.reports.figures import save_figure
from itrain.reports.text import drawn
from itrain.results.columns import IIA, PROBE_ACCURACY
from itrain.results.heads import HEAD
from itrain.results.maps import HeatMap, axis_of
from itrain.results.summary import SweepSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

ACROSS, WIDEST = 4, 26
"""Heat maps beside each other, and inches, before a new row of them begins."""
MANY = 16
"""Layers or positions from which cells are small."""
CELLS, SMALL_CELLS = (0.62, 0.42, 7), (0.34, 0.24, 5.5)
"""Width and height of a cell, in inches, and the size of what is written in it."""
LETTER = 0.08
"""The width of a letter of a title, in inches."""
HEAT_MAPS, IIA_MAPS, PROBE_MAPS, DIFFERENCE_MAPS = "heat_maps", "iia_maps", "probe_maps", "difference_maps"
"""The names of the pictures; ``iia_maps`` and ``probe_maps`` are drawn for loggers alone."""


def save_heat_maps(summary: SweepSummary) -> dict[str, Path]:
    """Draw all heat maps of a sweep, and its differences, as PNG and SVG into its folder; returns the PNGs."""
    groups = {HEAT_MAPS: summary.maps} | ({DIFFERENCE_MAPS: summary.differences} if summary.differences else {})
    found = {name: summary.folder / f"{name}.png" for name in groups}
    for name, path in found.items():
        save_figure(draw(groups[name]), path, path.with_suffix(".svg"))
    return found


def save_comparison(summary: SweepSummary, folder: Path) -> dict[str, Path]:
    """Draw the IIA of learned methods and the accuracy of probes, those that a sweep has, as PNG."""
    groups = {
        IIA_MAPS: [each for each in summary.maps if each.column == IIA and not each.is_control],
        PROBE_MAPS: [each for each in summary.maps if each.column == PROBE_ACCURACY],
    }
    found = {name: folder / f"{name}.png" for name, maps in groups.items() if maps}
    for name, path in found.items():
        save_figure(draw(groups[name]), path)
    return found


def draw(maps: Sequence[HeatMap]) -> Figure:
    """Heat maps side by side, the last layer on top, with an example's tokens below the positions."""
    from matplotlib.figure import Figure

    if not maps:
        figure = Figure(figsize=(4, 1.5))
        figure.text(0.5, 0.5, "no figures to draw", ha="center", va="center")
        return figure
    layers, positions = max(len(each.rows) for each in maps), max(len(each.positions) for each in maps)
    wide, high, letters = SMALL_CELLS if max(layers, positions) > MANY else CELLS
    longest = max(len(line) for each in maps for line in _title(each).splitlines())
    width = max(wide * positions + 0.5, LETTER * longest)
    across = min(len(maps), ACROSS, max(1, int(WIDEST / width)))
    down = -(-len(maps) // across)
    size = (width * across + 1.4, (high * layers + 1.3) * down)
    figure = Figure(figsize=size, layout="constrained")
    # Heads and tokens, or components with other numbers of heads, do not share their places.
    shared = len({tuple(each.positions) for each in maps}) == 1
    axes = figure.subplots(down, across, sharex=shared, sharey=True, squeeze=False)
    scales = [_draw_map(place, each, letters) for place, each in zip(axes.flat, maps, strict=False)]
    for place in axes.flat[len(maps) :]:
        place.set_axis_off()
    for place in axes[:, 0]:
        place.set_ylabel(axis_of(row for each in maps for row in each.rows))
    if len({each.scale for each in maps}) == 1:
        shown = {each.figure for each in maps}
        label = "difference" if maps[0].is_difference else shown.pop() if len(shown) == 1 else "share"
        figure.colorbar(scales[0], ax=axes, shrink=0.8, label=label)
    else:
        for place, scale in zip(axes.flat, scales, strict=False):
            figure.colorbar(scale, ax=place)
    return figure


def _draw_map(axes: Axes, each: HeatMap, letters: float) -> AxesImage:
    """One heat map; returns the image, for its scale of colours."""
    low, high = each.scale
    scale = DIFFERENCES if each.is_difference else SCALE
    # From the first layer up.
    rows = {layer: each.rows[layer] for layer in reversed(list(each.rows))}
    values = [[float("nan") if cell is None else cell.estimate.value for cell in cells] for cells in rows.values()]
    image = axes.imshow(values, vmin=low, vmax=high, cmap=scale, origin="lower", aspect="auto")
    for row, cells in enumerate(rows.values()):
        for column, cell in enumerate(cells):
            if cell is not None:
                _, colour = colour_of(min(max((cell.estimate.value - low) / (high - low), 0), 1), scale)
                axes.text(column, row, cell.estimate.short, ha="center", va="center", color=colour, fontsize=letters)
    axes.set_title(drawn(_title(each)), fontsize=9)
    if each.is_by_head:
        axes.set_xticks(range(len(each.positions)), [name.removeprefix(HEAD) for name in each.positions], fontsize=8)
        axes.set_xlabel(HEAD.strip())
    else:
        labels = [f"{position}\n{token}" if token else position for position, token in each.positions.items()]
        axes.set_xticks(range(len(labels)), list(map(drawn, labels)), rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [drawn(str(layer)) for layer in rows])
    axes.tick_params(labelbottom=True)
    return image


def _title(each: HeatMap) -> str:
    """What is shown, and of how many seeds and pairs."""
    return "\n".join(filter(None, (each.method, each.caption, each.sample)))
