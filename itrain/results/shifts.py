"""How far the answers of a run move from those of the unedited model, as a table."""

from __future__ import annotations

from collections.abc import Mapping

from itrain.results.columns import (
    CLEAN_DIFFERENCE,
    FLDD,
    FLDD_RELATIVE,
    FLIP,
    LOGIT_DIFFERENCE,
    ODDS,
    ODDS_SPREAD,
    PAIRS_CHANGING,
    TEST,
)
from itrain.results.intervals import of_run
from itrain.results.parts import Results, Table
from itrain.results.reading import SHIFTS_READ

SHIFTS = "shifts"
"""The name of the table in trackers."""
OF_SHIFTS = frozenset({ODDS, ODDS_SPREAD, CLEAN_DIFFERENCE, LOGIT_DIFFERENCE, FLDD, FLDD_RELATIVE, FLIP})
"""The figures that it has room for, or leaves out."""
HEADS = (
    ("odds", "mean"),
    ("", "95%"),
    ("logit gap", "clean"),
    ("", "edited"),
    ("FLDD", "%"),
    ("", "% of full"),
    ("pairs", "flipped"),
)


def shifts_table(results: Results, places: Mapping[str, str]) -> Table | None:
    """Odds, logit differences and FLDD at each place; None where the run has not compared answers with unedited ones.

    Args:
        results: the figures of the run.
        places: the names of the rows, by the beginnings of their figures' names.
    """
    rows = {name: _cells(results, place) for place, name in places.items() if f"{place}/{ODDS}" in results}
    if not rows:
        return None
    pairs = int(results[f"{TEST}/{PAIRS_CHANGING}"])
    return Table(
        title=f"how far answers shift, {pairs} label-changing pairs (odds in nats)",
        heads=HEADS,
        rows=rows,
        name=SHIFTS,
        note=SHIFTS_READ,
    )


def _cells(results: Results, place: str) -> list[str]:
    found = {key.removeprefix(f"{place}/"): value for key, value in results.items() if key.startswith(f"{place}/")}
    ends = of_run(found, ODDS)
    width = "" if ends is None else f"±{(ends[1] - ends[0]) / 2:.2f}"
    moved = [_written(found.get(figure), 2) for figure in (CLEAN_DIFFERENCE, LOGIT_DIFFERENCE)]
    shares = [_written(found.get(figure), 1) for figure in (FLDD, FLDD_RELATIVE)]
    return [_written(found[ODDS], 2), width, *moved, *shares, _written(found.get(FLIP), 3)]


def _written(value: float | None, digits: int) -> str:
    """The value without the sign of what rounds to 0; nothing for a missing one."""
    if value is None or value != value:
        return ""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text
