"""What a sweep says: its progress, heat maps of layer and position for each method, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from itrain.reports.best import Row, beside, best_of, by_figure
from itrain.reports.pictures import CEILING, COLOURS, CONTROL, FIGURES, FIRST, Estimate, settings_apart, spoken
from itrain.reports.terminal import is_quiet
from itrain.reports.tokens import read_tokens

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

ACROSS = 4
"""Heat maps beside each other before a new row of them begins."""


class SweepProgress:
    """One line for a whole sweep: fits done, the best so far, and the time left."""

    def __init__(self, *, quiet: bool) -> None:
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
        self.progress = Progress(TextColumn("{task.description}"), *columns, disable=quiet or is_quiet())
        self.task = self.progress.add_task("fits", total=None)
        self.best: dict[str, tuple[float, str]] = {}

    def __enter__(self) -> SweepProgress:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        # rich before 15 ends with an empty line what it never drew.
        if not self.progress.disable:
            self.progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the progress."""
        if not self.progress.disable:
            self.progress.console.print(line, highlight=False)

    def expect(self, fits: int) -> None:
        """So many fits there are in all."""
        self.progress.update(self.task, total=fits)

    def done(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """These fits are finished."""
        for row in rows:
            for figure in (figure for figure in FIGURES if row.get(figure) is not None):
                if figure != FIRST or row["method"] not in (CONTROL, CEILING):
                    found = row[figure], f"{row['method']} {row['layer']}@{row['position']}"
                    self.best[figure] = max(self.best.get(figure, found), found)
        value, name = next((self.best[figure] for figure in FIGURES if figure in self.best), (0.0, ""))
        description = f"fits, best {value:.2f} ({name})" if name else "fits"
        self.progress.update(self.task, advance=len(rows), description=description)


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
                name = f"{spoken(method)}{where}{ranked}\n{FIGURES[figure]}{_between(part, figure)}"
                table = part.pivot_table(index="layer", columns="position", values=figure, aggfunc="mean")
                maps[name] = table.reindex(columns=[each for each in positions if each in table.columns])
    return maps


def save_heat_maps(frame: pandas.DataFrame, path: Path) -> None:
    """Draw the heat maps of a sweep as PNG and SVG, into its folder."""
    figure = draw(heat_maps(frame), tokens=read_tokens(path.parent).tokens)
    figure.savefig(path, dpi=150)
    figure.savefig(path.with_suffix(".svg"))


def draw(maps: Mapping[str, pandas.DataFrame], *, low: float = 0, tokens: Mapping[str, str] | None = None) -> Figure:
    """Heat maps side by side on one scale from ``low`` to 1, the last layer on top, with an example's tokens below."""
    from matplotlib.figure import Figure

    example = tokens or {}
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
        place.set_xticks(range(table.shape[1]), _labels(table, example), rotation=40, ha="right", fontsize=8)
        place.set_yticks(range(table.shape[0]), table.index)
        place.tick_params(labelbottom=True)
    for place in axes.flat[len(maps) :]:
        place.set_axis_off()
    for place in axes[:, 0]:
        place.set_ylabel("layer")
    figure.colorbar(scale, ax=axes, shrink=0.8)  # type: ignore[arg-type]
    return figure


def show_sweep(frame: pandas.DataFrame, folder: Path) -> None:
    """Print the heat maps as tables, each method at its best site, what is flagged, and where everything lies."""
    console, example = Console(), read_tokens(folder)
    for name, table in heat_maps(frame).items():
        printed = Table("layer", *map(str, table.columns), title=name.replace("\n", ": "), box=SIMPLE_HEAD)
        for layer, row in table.iloc[::-1].iterrows():
            printed.add_row(str(layer), *("" if value != value else f"{value:.2f}" for value in row))
        console.print(printed)
    if example.tokens:
        named = ", ".join(f"{position} {token}" for position, token in example.tokens.items())
        console.print(f"in '{example.text}': {named}", highlight=False, markup=False, soft_wrap=True)
    for figure, rows in by_figure(list(best_of(frame, settings_apart([frame])))).items():
        console.print(_best_table(figure, rows))
    for flag, part in frame[frame.flag != ""].groupby("flag"):
        cells = ", ".join(f"{row.method} {row.layer}@{row.position}" for row in part.itertuples())
        console.print(f"{flag}: {cells}", highlight=False, soft_wrap=True)
    console.print(f"{len(frame)} fits; folder: {folder}", highlight=False, soft_wrap=True)


def _best_table(figure: str, rows: Sequence[Row]) -> Table:
    """The methods of one figure; what it is compared with goes without intervals, for which there is no room."""
    heads = beside(rows)
    lines = []
    for row in rows:
        value = row["value"]
        assert isinstance(value, Estimate)
        between = "" if value.interval is None else "{:.2f}-{:.2f}".format(*value.interval)
        compared = [f"{each.value:.2f}" if isinstance(each, Estimate) else each or "" for each in map(row.get, heads)]
        lines.append([str(row["method"]), str(row["best site"]), f"{value.value:.2f}", between, *compared])
    table = Table(title=f"best sites: {figure}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # A word that gets no room would be cut.
    table.add_column("method", min_width=_longest([line[0] for line in lines]))
    for head in ("best site", "", "95%"):
        table.add_column(head, no_wrap=True)
    for head, *cells in zip(heads, *(line[4:] for line in lines), strict=True):
        table.add_column(head, justify="right", width=_longest([head, *cells]))
    for line in lines:
        table.add_row(*line)
    return table


def _longest(texts: Sequence[str]) -> int:
    """The letters of the longest word."""
    return max(len(word) for text in texts for word in text.split())


def _labels(table: pandas.DataFrame, tokens: Mapping[str, str]) -> list[str]:
    """The positions, each over what stands there in an example."""
    return [f"{position}\n{tokens[position]}" if position in tokens else str(position) for position in table.columns]


def _place(component: str, window: int) -> str:
    return spoken(component) + (f", {window} layers" if window > 1 else "")


def _between(part: pandas.DataFrame, figure: str) -> str:
    """The same figure of the corrupted and the clean run, where runs between the two are traced."""
    found = {run: part[f"{run}/{figure}"].mean() for run in ("corrupted", "clean") if f"{run}/{figure}" in part}
    return "".join(f", {run} {value:.2f}" for run, value in found.items())


def _cells(table: pandas.DataFrame) -> list[tuple[tuple[int, int], float]]:
    values = table.to_numpy()
    return [((r, c), values[r, c]) for r in range(values.shape[0]) for c in range(values.shape[1])]
