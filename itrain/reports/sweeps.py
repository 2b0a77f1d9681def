"""What a sweep says: its progress, heat maps of layer and position for each method, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

FIGURES = {
    "iia_changing_pairwise": "IIA, label-changing pairs",
    "probe_accuracy": "accuracy",
    "selectivity": "selectivity",
    "answer_probability": "probability of the answer",
}
"""The figures that have heat maps, those of them that a method has."""
ACROSS = 4
"""Heat maps beside each other before a new row of them begins."""
COLOURS = "cividis"
"""A scale that is read alike by all eyes and in grey print."""


class SweepProgress:
    """One line for a whole sweep: fits done, the best so far, and the time left."""

    def __init__(self, *, quiet: bool) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(TextColumn("{task.description}"), *columns, disable=quiet)
        self.task = self.progress.add_task("fits", total=None)
        self.best: tuple[float, str] = (0.0, "")

    def __enter__(self) -> SweepProgress:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def expect(self, fits: int) -> None:
        """So many fits there are in all."""
        self.progress.update(self.task, total=fits)

    def done(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """These fits are finished."""
        figure = next(iter(FIGURES))
        named = ((row[figure], f"{row['method']} {row['layer']}@{row['position']}") for row in rows if figure in row)
        self.best = max([self.best, *named])
        found = f"fits, best {self.best[0]:.2f} ({self.best[1]})" if self.best[1] else "fits"
        self.progress.update(self.task, advance=len(rows), description=found)


def heat_maps(frame: pandas.DataFrame) -> dict[str, pandas.DataFrame]:
    """Layers by positions for each method, component and figure, the mean over seeds; several ranks apart."""
    maps: dict[str, pandas.DataFrame] = {}
    positions = list(dict.fromkeys(frame.position))
    several = frame.component.nunique() > 1 or bool((frame.window > 1).any())
    for method, component in dict.fromkeys(zip(frame.method, frame.component, strict=True)):
        of_method = frame.loc[(frame.method == method) & (frame.component == component)]
        where = f" of {_place(component, of_method.window.max())}" if several else ""
        ranks = list(dict.fromkeys(of_method["rank"].dropna())) or [None]
        for rank in ranks:
            part = of_method if rank is None else of_method.loc[of_method["rank"] == rank]
            for figure in (figure for figure in FIGURES if figure in part and part[figure].notna().any()):
                ranked = f", rank {rank:.0f}" if len(ranks) > 1 else ""
                name = f"{method.replace('_', ' ')}{where}{ranked}\n{FIGURES[figure]}{_between(part, figure)}"
                table = part.pivot_table(index="layer", columns="position", values=figure, aggfunc="mean")
                maps[name] = table.reindex(columns=[each for each in positions if each in table.columns])
    return maps


def save_heat_maps(frame: pandas.DataFrame, path: Path) -> None:
    """Draw the heat maps of a sweep as PNG and SVG."""
    figure = draw(heat_maps(frame))
    figure.savefig(path, dpi=150)
    figure.savefig(path.with_suffix(".svg"))


def draw(maps: Mapping[str, pandas.DataFrame], *, low: float = 0) -> Figure:
    """Heat maps side by side on one scale from ``low`` to 1, the last layer on top."""
    from matplotlib.figure import Figure

    across = min(len(maps), ACROSS)
    down = -(-len(maps) // across)
    layers, positions = (max(table.shape[side] for table in maps.values()) for side in (0, 1))
    size = ((0.62 * positions + 0.5) * across + 1.4, (0.42 * layers + 1.3) * down)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    scale = None
    for place, (name, table) in zip(axes.flat, maps.items(), strict=False):
        scale = place.imshow(table.to_numpy(), vmin=low, vmax=1, cmap=COLOURS, origin="lower", aspect="auto")
        for (row, column), value in _cells(table):
            seen = {"color": "black" if value > (low + 1) / 2 else "white", "fontsize": 7}
            place.text(column, row, f"{value:.2f}", ha="center", va="center", **seen)
        place.set_title(name, fontsize=9)
        place.set_xticks(range(table.shape[1]), table.columns, rotation=40, ha="right")
        place.set_yticks(range(table.shape[0]), table.index)
        place.tick_params(labelbottom=True)
    for place in axes.flat[len(maps) :]:
        place.set_axis_off()
    for place in axes[:, 0]:
        place.set_ylabel("layer")
    figure.colorbar(scale, ax=axes, shrink=0.8)  # type: ignore[arg-type]
    return figure


def show_sweep(frame: pandas.DataFrame, folder: Path) -> None:
    """Print the heat maps as tables, what is flagged, and where everything lies."""
    console = Console()
    for name, table in heat_maps(frame).items():
        printed = Table("layer", *map(str, table.columns), title=name.replace("\n", ": "), box=SIMPLE_HEAD)
        for layer, row in table.iloc[::-1].iterrows():
            printed.add_row(str(layer), *("" if value != value else f"{value:.2f}" for value in row))
        console.print(printed)
    for flag, part in frame[frame.flag != ""].groupby("flag"):
        cells = ", ".join(f"{row.method} {row.layer}@{row.position}" for row in part.itertuples())
        console.print(f"{flag}: {cells}", highlight=False, soft_wrap=True)
    console.print(f"{len(frame)} fits; folder: {folder}", highlight=False, soft_wrap=True)


def _place(component: str, window: int) -> str:
    return component.replace("_", " ") + (f", {window} layers" if window > 1 else "")


def _between(part: pandas.DataFrame, figure: str) -> str:
    """The same figure of the corrupted and the clean run, where runs between the two are traced."""
    found = {run: part[f"{run}/{figure}"].mean() for run in ("corrupted", "clean") if f"{run}/{figure}" in part}
    return "".join(f", {run} {value:.2f}" for run, value in found.items())


def _cells(table: pandas.DataFrame) -> list[tuple[tuple[int, int], float]]:
    values = table.to_numpy()
    return [((r, c), values[r, c]) for r in range(values.shape[0]) for c in range(values.shape[1])]
