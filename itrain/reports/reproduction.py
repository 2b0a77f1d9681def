"""The table of reproductions: on screen, as a page, and as data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from itrain.files import write_json, write_text
from itrain.reports.terminal import is_quiet
from itrain.reports.text import plain
from itrain.results.reproduction import FAILED, MISSED, Outcome, counted
from itrain.versions import versions

PAGE, TABLE = "report.html", "table.json"
HEADS = ("row, figure", "published", "ours", "bound", "")


def write_table(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write the table as a page and as data."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TABLE, {"versions": versions(), "rows": [outcome.plain() for outcome in outcomes]})
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("reproduction.html.jinja")
    wrong = (MISSED, FAILED)
    text = page.render(outcomes=outcomes, counted=counted(outcomes), wrong=wrong, versions=versions())
    write_text(folder / PAGE, text)


def show_table(outcomes: Sequence[Outcome]) -> None:
    """Print each row with its figures: published, ours with the spread over seeds, the bound, and what came of it."""
    console = Console()
    table = Table(title=plain("reproductions", "table.title"), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in HEADS:
        table.add_column(head, overflow="fold", justify="right" if head in HEADS[1:4] else "left")
    for outcome in outcomes:
        runs = f"{len(outcome.runs)} x {outcome.minutes:.1f} min" if outcome.minutes is not None else ""
        table.add_row(plain(outcome.row.name, "bold"), "", runs, "", plain(outcome.state))
        for found in outcome.figures:
            held = found.holds or not found.values
            cells = (f"  {found.name}", found.published, found.ours, found.expected.bounds, "" if held else MISSED)
            table.add_row(*map(plain, cells))
    console.print(table)
    for outcome in outcomes:
        if outcome.error is not None:
            console.print(plain(f"{outcome.row.name}: {outcome.error}"), soft_wrap=True)
        elif outcome.needs is not None:
            needed = f"{outcome.row.name} needs {outcome.needs}: itrain {outcome.row.command}"
            console.print(plain(needed), soft_wrap=True)
    for hardware in dict.fromkeys(filter(None, (outcome.hardware for outcome in outcomes))):
        console.print(plain(f"hardware: {hardware}"), soft_wrap=True)
    console.print(plain(counted(outcomes)), soft_wrap=True)


def list_rows(outcomes: Sequence[Outcome]) -> None:
    """Print each row with its title, its command, and how long it takes or what it needs."""
    lines = []
    for outcome in outcomes:
        row = outcome.row
        minutes = [] if row.minutes is None else [f"{row.minutes:g} min a seed"]
        how = [f"seeds {' '.join(map(str, row.seeds))}", *minutes, *(["quick"] * row.quick)]
        how = [f"not run, needs {outcome.needs}"] if outcome.needs is not None else how
        lines += [f"{row.name} ({', '.join(how)})", f"  {row.title}", f"  itrain {row.command}"]
    for line in lines:
        Console().print(plain(line), soft_wrap=True)


def say(line: str) -> None:
    """Print a line about the runs."""
    if not is_quiet():
        Console().print(plain(line), soft_wrap=True)
