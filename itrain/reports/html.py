"""The report of a sweep, or of several beside each other: one HTML file that opens from disk and needs nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from itrain.files import write_text
from itrain.reports.colours import DIFFERENCES, SCALE, colour_of, stroke_of
from itrain.reports.svg import Drawing
from itrain.results.best import TWIN, by_figure, heads_beside
from itrain.results.columns import (
    AUROC,
    COMMAND,
    CONTROL_TASK,
    DIVERGENCE,
    FALSE_VARIABLE,
    FIGURES,
    GAP,
    IIA,
    RANDOM_MODEL,
    spoken,
    written,
)
from itrain.results.flags import REASONS
from itrain.results.maps import Cell, HeatMap, maps_read
from itrain.results.peaks import RULE
from itrain.results.reading import BEYOND_READ
from itrain.results.summary import SweepSummary, summarise
from itrain.results.tasks import over_tasks
from itrain.versions import versions

REPORT = "report.html"
SECTIONS = {
    "rank": (
        "Over rank",
        f"{FIGURES[IIA]}, at each position, in the layer where learned methods score highest, of equal layers the "
        "lowest. Vertical lines are 95% intervals.",
    ),
    "layer": (
        "Boundaries",
        "Dimensions that each gate or boundary swaps, by layer; with several seeds that differ, their mean and its 95% "
        "interval over seeds (Student).",
    ),
    "epoch": (
        "Over training",
        f"{FIGURES[IIA]} on the validation pairs after each epoch: one line a fit. The highest at the end is named; "
        "of equal ones that which rose soonest, and then the one in the lowest layer.",
    ),
}
"""Title and note of the curves over each axis."""


def save_report(folders: Sequence[Path], path: Path) -> None:
    """Write the page of finished sweeps, read from ``results.parquet`` and ``config.yaml`` of each folder.

    Raises:
        FileNotFoundError: a folder holds no finished sweep.
        ValueError: the table in a folder is not that of a sweep.
    """
    write_report(summarise(folders), path)


def write_report(sweeps: Sequence[SweepSummary], path: Path) -> None:
    """Write the page of sweeps that are summarised."""
    rows = [{"sweep": sweep.label} | row for sweep in sweeps for row in sweep.frame.to_dict("records")]
    columns = [str(column) for column in dict.fromkeys(column for row in rows for column in row) if _is_shown(column)]
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.jinja")
    text = page.render(
        sweeps=sweeps,
        maps=[{_name(each): each for each in sweep.maps} for sweep in sweeps],
        names=list(dict.fromkeys(_name(each) for sweep in sweeps for each in sweep.maps)),
        axes=[axis for axis in SECTIONS if any(sweep.plots[axis] for sweep in sweeps)],
        sections=SECTIONS,
        columns=[*(["sweep"] if len(sweeps) > 1 else []), *columns, COMMAND],
        rows=[{column: written(value) for column, value in row.items()} for row in rows],
        scale=[colour_of(share / 20)[0] for share in range(21)],
        ends=sorted({each.scale for sweep in sweeps for each in sweep.maps}),
        differences=[{_name(each): each for each in sweep.differences} for sweep in sweeps],
        subtracted=list(dict.fromkeys(_name(each) for sweep in sweeps for each in sweep.differences)),
        difference_scale=[colour_of(share / 20, DIFFERENCES)[0] for share in range(21)],
        rule=RULE,
        maps_read=maps_read([each for sweep in sweeps for each in sweep.maps]),
        by_figure=by_figure,
        tasks=over_tasks([sweep.frame for sweep in sweeps]),
        beside=heads_beside,
        beyond_read=BEYOND_READ,
        random=any(TWIN in row.beside for sweep in sweeps for row in sweep.best),
        detectors=any(row.figure == FIGURES[AUROC] for sweep in sweeps for row in sweep.best),
        gap=any(GAP in row.beside for sweep in sweeps for row in sweep.best),
        divergence=any(DIVERGENCE in row.beside for sweep in sweeps for row in sweep.best),
        shade=_shade,
        drawing_of=Drawing,
        stroke_of=stroke_of,
        spoken=spoken,
        reasons=REASONS,
        versions=versions(),
        command=shlex.join(["python", "-m", "itrain", "report", *(str(sweep.folder) for sweep in sweeps)]),
    )
    write_text(path, text)


def _name(each: HeatMap) -> tuple[str, str]:
    """What a heat map is called in all sweeps that have it."""
    return each.method, each.figure


def _shade(cell: Cell, each: HeatMap) -> str:
    """The style of a cell, whose colour says where its value lies on the scale of the map."""
    low, high = each.scale
    share = (cell.estimate.value - low) / (high - low)
    scale = DIFFERENCES if each.is_difference else SCALE
    background, ink = colour_of(round(min(max(share, 0), 1), 2), scale)
    return f"background:{background};color:{ink}"


def _is_shown(column: str) -> bool:
    """Whether a column has a place in the table of all fits; of a second fit only the figures with heat maps do."""
    again = next((prefix for prefix in (RANDOM_MODEL, FALSE_VARIABLE, CONTROL_TASK) if column.startswith(prefix)), None)
    is_spared = again is not None and column.removeprefix(again) not in FIGURES
    return column not in ("sweep", COMMAND) and not is_spared
