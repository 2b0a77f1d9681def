"""Several sweeps as the tasks of a benchmark: odds and their selectivity, averaged over layers and then over tasks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from itrain.results.columns import ODDS, ODDS_SELECTIVITY
from itrain.results.controls import without_void
from itrain.results.heads import by_head
from itrain.results.layers import mean_over_layers
from itrain.results.maps import methods_of, settings_apart
from itrain.results.parts import Table

if TYPE_CHECKING:
    import pandas

COLUMNS = {ODDS: "odds", ODDS_SELECTIVITY: "selectivity"}


def over_tasks(frames: Sequence[pandas.DataFrame]) -> Table | None:
    """The mean over sweeps of each method's mean over layers of its best position, as CausalGym averages over tasks.

    1/T sum_t 1/L sum_l max_p figure(t, l, p). A method that a sweep lacks is left out, and so is a figure; None where
    there is one sweep, or no odds.
    """
    views = [without_void(by_head(frame)) for frame in frames]
    apart = settings_apart(views)
    found: dict[str, dict[str, list[float]]] = {}
    for view in views:
        for method, part in methods_of(view, apart):
            for column in COLUMNS:
                layers = mean_over_layers(part, column) if column in part and part[column].notna().any() else None
                if layers is not None:
                    found.setdefault(method, {}).setdefault(column, []).append(layers)
    whole = {
        method: {column: fmean(each) for column, each in values.items() if len(each) == len(views)}
        for method, values in found.items()
    }
    shown = [column for column in COLUMNS if any(column in values for values in whole.values())]
    if len(views) < 2 or not shown:
        return None
    rows = {
        method: [f"{values[column]:.2f}" if column in values else "" for column in shown]
        for method, values in whole.items()
        if values
    }
    heads = [("", COLUMNS[column]) for column in shown]
    return Table(title=f"mean over {len(views)} sweeps of the mean over layers", heads=heads, rows=rows, name="tasks")
