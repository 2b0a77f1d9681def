"""The summary of probes: their accuracy on held-out examples, beside that on control labels."""

from __future__ import annotations

from collections.abc import Mapping

from itrain.results.columns import (
    CONTROL_ACCURACY,
    CONTROL_EXAMPLES,
    EXAMPLES,
    L2,
    MAJORITY_ACCURACY,
    PROBE_ACCURACY,
    SELECTIVITY,
    TEST,
)
from itrain.results.intervals import of_run
from itrain.results.parts import INTERVALS, Bars, Kind, Results, Table, count, decimals
from itrain.results.reading import PROBES_READ

PROBED = frozenset({PROBE_ACCURACY, CONTROL_ACCURACY, SELECTIVITY, MAJORITY_ACCURACY, EXAMPLES, CONTROL_EXAMPLES, L2})


def _names(results: Results) -> list[str]:
    first = f"{TEST}/{PROBE_ACCURACY}/"
    return [key.removeprefix(first) for key in results if key.startswith(first)]


def _figures(results: Results, figures: Mapping[str, str]) -> dict[str, str]:
    """Those of the figures that each probe has."""
    names = _names(results)
    return {
        figure: title
        for figure, title in figures.items()
        if all(f"{TEST}/{figure}/{name}" in results for name in names)
    }


def _table(results: Results) -> Table:
    titles = {PROBE_ACCURACY: "probe", CONTROL_ACCURACY: "control", SELECTIVITY: SELECTIVITY}
    titles = _figures(results, titles | {MAJORITY_ACCURACY: "majority", L2: L2})
    rows = {}
    for name in _names(results):
        values = {figure: results[f"{TEST}/{figure}/{name}"] for figure in titles}
        rows[name] = [f"{value:g}" if figure == L2 else decimals(value) for figure, value in values.items()]
    heads = [("", title) for title in titles.values()]
    return Table(title="accuracy of probes on held-out examples", heads=heads, rows=rows, note=PROBES_READ)


def _bars(results: Results) -> Bars:
    names = _names(results)[::-1]
    titles = {SELECTIVITY: SELECTIVITY, CONTROL_ACCURACY: "control", PROBE_ACCURACY: "probe"}
    series = {
        title: [results[f"{TEST}/{figure}/{name}"] for name in names]
        for figure, title in _figures(results, titles).items()
    }
    found = [
        {figure: results[f"{TEST}/{figure}/{name}"] for figure in PROBED if f"{TEST}/{figure}/{name}" in results}
        for name in names
    ]
    shown = _figures(results, titles)
    majority = [figures.get(MAJORITY_ACCURACY) for figures in found]
    marks = [each for each in majority if each is not None]
    return Bars(
        axis=f"accuracy on {count(found[0])}held-out examples\n{INTERVALS}",
        names=[name.replace(" ", "\n") for name in names],
        series=series,
        intervals={title: [of_run(figures, figure) for figures in found] for figure, title in shown.items()},
        marks=marks if len(marks) == len(names) else (),
    )


PROBES = Kind(fits=lambda results: bool(_names(results)), known=PROBED, table=_table, bars=_bars)
