"""A sweep on screen: its progress, and its results as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from itrain.reports.progress import SlowLog
from itrain.reports.tables import print_note, print_table
from itrain.reports.terminal import is_quiet, suggest, typed
from itrain.reports.text import plain
from itrain.results.best import Best, by_figure, heads_beside
from itrain.results.columns import (
    AUROC,
    CONTROLS,
    FIGURES,
    IIA,
    LAYER,
    METHOD,
    POSITION,
    SELECTIVITY,
    UNBOUNDED,
    in_order,
    named_site,
    order_of,
)
from itrain.results.conclusions import controls_table
from itrain.results.flags import REASONS
from itrain.results.intervals import Estimate
from itrain.results.maps import HeatMap, axis_of, maps_read
from itrain.results.parts import Table as RunTable
from itrain.results.peaks import LEAST
from itrain.results.reading import BEST_READ, BEYOND_READ, DETECTORS_BEST_READ
from itrain.results.summary import SweepSummary
from itrain.trust import printable

SITE = "best site"
FITS = 8
"""How many fits a flag names on screen."""


class SweepProgress:
    """One line for a whole sweep: fits done, the best so far, and the time left."""

    def __init__(self, *, quiet: bool) -> None:
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
        self.progress = Progress(TextColumn("{task.description}", markup=False), *columns, disable=quiet or is_quiet())
        self.task = self.progress.add_task("fits", total=None)
        self.best: dict[str, tuple[float, int | str, str]] = {}
        self.slow_log = SlowLog()

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
            self.progress.console.print(plain(line))

    def expect(self, fits: int) -> None:
        """Set the number of all fits."""
        self.progress.update(self.task, total=fits)

    def done(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count the fits of these rows as finished."""
        for row in rows:
            for figure in (figure for figure in FIGURES if row.get(figure) is not None):
                if figure not in {IIA, *UNBOUNDED} or row[METHOD] not in CONTROLS:
                    found = row[figure], row[LAYER], f"{row[METHOD]} {named_site(row[LAYER], row[POSITION])}"
                    # Of equal ones the lowest layer, and there the first.
                    both = self.best.get(figure, found), found
                    self.best[figure] = min(both, key=lambda each: (-each[0], order_of(each[1])))
        value, _, name = next((self.best[figure] for figure in FIGURES if figure in self.best), (0.0, 0, ""))
        description = f"fits, best {value:.2f} ({printable(name)})" if value >= LEAST else "fits"
        self.progress.update(self.task, advance=len(rows), description=description)
        if not self.progress.disable:
            self.slow_log.say(self.progress.console, lambda: f"{self.progress.tasks[0].completed:.0f} {description}")


def show_sweep(summary: SweepSummary, report: Path | None = None, took: str = "") -> None:
    """Print what a sweep comes to, the maps that this rests on, and where all the rest is."""
    console = Console()
    _show_conclusions(console, summary)
    _show_maps(console, summary)
    count = "; ".join(filter(None, (f"{len(summary.frame)} fits", took)))
    console.print(plain(f"{count}; folder: {summary.folder}"), soft_wrap=True)
    if report is not None:
        console.print(plain(f"report: {report}"), soft_wrap=True)
        suggest(
            {
                f"itrain report {typed(summary.folder)} <folder>": "compares with another sweep on one page",
                f"itrain.read_results({str(typed(summary.folder))!r})": "the table of all fits in Python",
            }
        )


def _show_conclusions(console: Console, summary: SweepSummary) -> None:
    """Each method at its best site, what speaks against it, and what probes read beyond it."""
    console.print()
    for figure, rows in by_figure([*summary.best, *_compared_odds(summary)]).items():
        print_table(console, _best_table(figure, rows), left=[SITE])
    for flag, fits in summary.flags.items():
        named = "; ".join(name for _, name in fits[:FITS])
        more = f"; and {len(fits) - FITS} more" if len(fits) > FITS else ""
        console.print(plain(f"{flag}: {named}{more}"), soft_wrap=True)
        console.print(plain(f"  ({REASONS[flag]})" if flag in REASONS else ""))
    if summary.best:
        for line in filter(None, (summary.remark, *summary.beyond)):
            console.print(plain(line))
        console.print()
        detectors = all(row.figure == FIGURES[AUROC] for row in summary.best)
        beyond = f" {BEYOND_READ}" if summary.beyond else ""
        print_note(console, (DETECTORS_BEST_READ if detectors else BEST_READ) + beyond)
        console.print()


def _show_maps(console: Console, summary: SweepSummary) -> None:
    """The leading maps beside each other, the controls in short, and which maps the report has besides."""
    shown, groups = summary.leading, dict[str, list[HeatMap]]()
    for each in shown:
        # Figures of the user's own stand apart: shares are compared with each other.
        groups.setdefault("" if each.column in FIGURES else each.column, []).append(each)
    controls = controls_table([each for each in summary.maps if each not in shown])
    for table in (*map(_maps_table, groups.values()), *([] if controls is None else [controls])):
        print_table(console, table)
    if shown:
        print_note(console, maps_read(shown))
    if summary.example.tokens:
        named = ", ".join(f"{position} {token}" for position, token in summary.example.tokens.items())
        console.print(plain(f"\ntokens of '{summary.example.text}': {named}"), soft_wrap=True)
    if summary.maps:
        console.print()
    figures = Counter(each.figure for each in summary.maps if each not in shown)
    others = [f"{figure} ({count})" for figure, count in figures.items()]
    others += ["best sites by odds"] if summary.odds and not _compared_odds(summary) else []
    if others:
        console.print(plain(f"in the report alone, with the number of maps: {'; '.join(others)}"))


def _compared_odds(summary: SweepSummary) -> Sequence[Best]:
    """The odds, where a control task says what they are worth."""
    return summary.odds if any(SELECTIVITY in row.beside for row in summary.odds) else ()


def _maps_table(maps: Sequence[HeatMap]) -> RunTable:
    """Maps beside each other, below the names of their methods; that of a single one stands in the title."""
    single = len(maps) == 1
    first, *others = dict.fromkeys(each.caption for each in maps)
    named = [f"{', '.join(each.method for each in maps if each.caption == caption)}: {caption}" for caption in others]
    layers = reversed(in_order({layer for each in maps for layer in each.rows}))
    cells = {layer: [each.at(layer, position) for each in maps for position in each.positions] for layer in layers}
    heads = [
        ("" if number or single else each.method, position)
        for each in maps
        for number, position in enumerate(each.positions)
    ]
    rows = {str(layer): ["" if cell is None else cell.estimate.short for cell in row] for layer, row in cells.items()}
    corner = axis_of(layer for each in maps for layer in each.rows)
    title = "; ".join([f"{maps[0].method if single else 'maps'}: {first}", *named])
    return RunTable(title=title, heads=heads, rows=rows, corner=corner)


def _best_table(figure: str, rows: Sequence[Best]) -> RunTable:
    """The methods of one figure; what it is compared with goes without intervals, for which there is no room."""
    heads = heads_beside(rows)
    lines = {}
    for row in rows:
        compared = [each.short if isinstance(each, Estimate) else each or "" for each in map(row.beside.get, heads)]
        lines[row.method] = [row.site, row.value.short, row.value.between("-"), *compared]
    titles = [SITE, "value", "95%", *heads]
    return RunTable(title=f"best sites: {figure}", heads=[("", title) for title in titles], rows=lines, corner="method")
