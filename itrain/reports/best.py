"""Each method of a sweep at its best site, beside what it must be compared with there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from itrain.reports.pictures import (
    CEILING,
    CONTROL,
    FIGURES,
    FIRST,
    PLACE,
    RANDOM_MODEL,
    Estimate,
    estimated,
    methods_of,
    spoken,
)

if TYPE_CHECKING:
    import pandas

TWIN, GAP = "random model", "gap"
BESIDE = (
    *map(spoken, (CONTROL, CEILING)),
    "control task",
    "most frequent class",
    "corrupted run",
    "clean run",
    TWIN,
    GAP,
)
"""What may stand beside a figure, in this order."""

Row = Mapping[str, "str | Estimate"]


def best_of(frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]]) -> Iterator[Row]:
    """A row for each method: its best site, and how many others are as good, the figure there, and what is beside it.

    Beside it are the controls of the same site and rank, the control task of a probe, the runs between which a trace
    lies, the same fit on a randomly initialised model, and the gap between its training examples and those held out.
    """
    for method, part in methods_of(frame, apart):
        figure = next((figure for figure in FIGURES if figure in part and part[figure].notna().any()), None)
        if figure is None:
            continue
        means: Any = part.groupby(PLACE, sort=False)[figure].mean()
        layer, position = means.idxmax()
        others = int((means == means.max()).sum()) - 1
        here: Any = part[(part.layer == layer) & (part.position == position)]
        row: dict[str, str | Estimate] = {
            "method": method,
            "best site": f"{layer}@{position}" + (f" +{others}" if others else ""),
            "figure": FIGURES[figure],
            "value": estimated(here, figure),
        }
        if figure == FIRST:
            controls = {control: _control(frame, here, control) for control in (CONTROL, CEILING)}
            controls.pop(here.method.iloc[0], None)
            row |= {spoken(control): found for control, found in controls.items() if found}
        references = {"control_accuracy": "control task", "majority_accuracy": "most frequent class"}
        # The runs that tracing stands between.
        references |= {f"{run}/{figure}": f"{run} run" for run in ("corrupted", "clean")}
        references[RANDOM_MODEL + figure] = TWIN
        for key, name in references.items():
            if key in here and here[key].notna().any():
                row[name] = estimated(here, key)
        if "gap" in here and here.gap.notna().any():
            row[GAP] = f"{here.gap.mean():+.2f}"
        yield row


def by_figure(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of methods that have the same figure."""
    figures = dict.fromkeys(str(row["figure"]) for row in rows)
    return {figure: [row for row in rows if row["figure"] == figure] for figure in figures}


def beside(rows: Sequence[Row]) -> list[str]:
    """What any of the rows has beside its figure."""
    return [head for head in BESIDE if any(head in row for row in rows)]


def _control(frame: pandas.DataFrame, here: pandas.DataFrame, control: str) -> Estimate | None:
    keys = [key for key in ("layer", "position", "component") if key in frame]
    there: Any = frame[(frame.method == control) & (frame[keys] == here[keys].iloc[0]).all(axis=1)]
    if control == CONTROL and "rank" in frame:
        there = there[there["rank"] == here["rank"].iloc[0]]
    return estimated(there, FIRST) if len(there) else None
