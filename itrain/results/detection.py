"""The summary of detectors of concepts: what each tells on the test texts and on shifted ones, and over layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite

from itrain.metrics import auroc_interval, exact_interval
from itrain.results.columns import (
    ACCURACY,
    AREAS,
    AUROC,
    AUROC_SELECTIVITY,
    AUROC_SPREAD,
    CONTROL_AUROC,
    CONTROL_NEGATIVES,
    CONTROL_POSITIVES,
    F1,
    F1_RARE,
    FALSE_POSITIVES,
    MAJORITY_ACCURACY,
    NEGATIVES,
    POSITIVES,
    TEST,
    THRESHOLDS,
    TRUE_POSITIVES,
)
from itrain.results.curves import Line, Plot, Point
from itrain.results.intervals import Ends
from itrain.results.parts import Bars, Kind, Results, Table
from itrain.results.reading import DETECTION_READ

SHIFT = f"{TEST}/shift/"
LAYER = re.compile(r"layer(\d+)\.")


def _names(results: Results) -> list[str]:
    """The detectors, each with its concept and place, as their figures are named."""
    first = f"{TEST}/{AUROC}/"
    return [key.removeprefix(first) for key in results if key.startswith(first)]


def _sets(results: Results) -> dict[str, str]:
    """The test sets, and what the names of their figures begin with."""
    shifts = [match[1] for key in results if (match := re.match(rf"{SHIFT}(.+?)/{AUROC}/", key))]
    return {TEST: TEST} | {name: f"{SHIFT}{name}" for name in dict.fromkeys(shifts)}


def _at(results: Results, place: str, name: str) -> dict[str, float]:
    """The figures of a detector on a test set."""
    first, last = f"{place}/", f"/{name}"
    return {
        key[len(first) : -len(last)]: value
        for key, value in results.items()
        if key.startswith(first) and key.endswith(last) and "/" not in key[len(first) : -len(last)]
    }


def _interval(figures: Mapping[str, float], figure: str) -> Ends | None:
    """The interval of a figure over its texts; of several controls, that of their spread."""
    positives, negatives = (int(figures.get(each, 0)) for each in AREAS.get(figure, (POSITIVES, NEGATIVES)))
    value = figures[figure]
    if AUROC_SPREAD in figures or not isfinite(value):
        return None
    if figure in AREAS and positives and negatives:
        return auroc_interval(value, positives, negatives)
    count = {TRUE_POSITIVES: positives, FALSE_POSITIVES: negatives}.get(figure, 0)
    return exact_interval(value, count) if count else None


def _cell(figures: Mapping[str, float], figure: str) -> str:
    """A figure and its interval as text; of controls the mean, and for AUROC its spread."""
    if figure not in figures:
        return ""
    ends = _interval(figures, figure)
    if ends is not None:
        return f"{figures[figure]:.3f}\n{ends[0]:.2f}-{ends[1]:.2f}"
    spread = figures.get(AUROC_SPREAD) if figure == AUROC else None
    return f"{figures[figure]:.3f}" + ("" if spread is None else f"\n±{spread:.2f}")


def _short(names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """What all names say, the concept before or the place after the detector; and the names without it."""
    words = [name.split() for name in names]
    first, last = 0, 0
    while all(len(each) > first + 1 and each[first] == words[0][first] for each in words):
        first += 1
    while all(len(each) > first + last + 1 and each[-1 - last] == words[0][-1 - last] for each in words):
        last += 1
    shared = [*words[0][:first], *(["at", *words[0][len(words[0]) - last :]] if last else [])]
    shorter = [" ".join(each[first : len(each) - last]) for each in words]
    return " ".join(shared), dict(zip(names, shorter, strict=True))


COLUMNS = {
    AUROC: "AUROC 95%",
    TRUE_POSITIVES: "TPR 95%",
    FALSE_POSITIVES: "FPR 95%",
    F1: "F1",
    F1_RARE: "rare F1",
    ACCURACY: "accuracy",
    MAJORITY_ACCURACY: "most frequent class",
    CONTROL_AUROC: "control task 95%",
    AUROC_SELECTIVITY: "selectivity",
}


def _table(results: Results) -> Table:
    names, sets = _names(results), _sets(results)
    shared, short = _short(names)
    columns = {
        figure: head
        for figure, head in COLUMNS.items()
        if figure not in (CONTROL_AUROC, AUROC_SELECTIVITY)
        or any(key.startswith(f"{TEST}/{figure}/") for key in results)
    }
    rows = {
        short[name] if shift == TEST else f"{short[name]}, {shift}": [
            _cell(_at(results, place, name), figure) for figure in columns
        ]
        for name in names
        for shift, place in sets.items()
    }
    title = f"detection of {shared}, held-out texts" if shared else "detection on held-out texts"
    return Table(title=title, heads=[("", head) for head in columns.values()], rows=rows, note=DETECTION_READ)


def _bars(results: Results) -> Bars:
    names, sets = _names(results)[::-1], _sets(results)
    found = {shift: [_at(results, place, name) for name in names] for shift, place in reversed(sets.items())}
    return Bars(
        axis="AUROC on held-out texts\n95% intervals",
        names=[short.replace(" ", "\n") for short in _short(names)[1].values()],
        series={shift: [figures[AUROC] for figures in each] for shift, each in found.items()},
        intervals={shift: [_interval(figures, AUROC) for figures in each] for shift, each in found.items()},
        marks=[0.5] * len(names),
        mark="chance",
    )


def _plots(results: Results) -> Sequence[Plot]:
    """AUROC over layers on each test set, where detectors read several; a line for each detector and concept."""
    lines: dict[str, dict[int, str]] = {}
    for name in _names(results):
        layers = LAYER.findall(name)
        if len(layers) == 1:
            lines.setdefault(LAYER.sub("", name), {})[int(layers[0])] = name
    layers = sorted({layer for found in lines.values() for layer in found})
    if len(layers) < 2:
        return ()
    return [
        Plot(
            title=f"AUROC, {'held-out texts' if shift == TEST else f'shift {shift}'}",
            axis="layer",
            ticks={layer: str(layer) for layer in layers},
            ends=(layers[0] - 0.25, layers[-1] + 0.25),
            lines=[
                Line(name=line, stroke=stroke, points=_points(results, place, found))
                for stroke, (line, found) in enumerate(lines.items())
            ],
        )
        for shift, place in _sets(results).items()
    ]


def _points(results: Results, place: str, names: Mapping[int, str]) -> list[Point]:
    found = []
    for layer, name in sorted(names.items()):
        figures = _at(results, place, name)
        says = f"layer {layer}: {' '.join(_cell(figures, AUROC).split())}"
        found.append(Point(x=layer, y=figures[AUROC], says=says, interval=_interval(figures, AUROC)))
    return found


DETECTION = Kind(
    fits=lambda results: bool(_names(results)),
    known=frozenset(
        {AUROC, AUROC_SPREAD, TRUE_POSITIVES, FALSE_POSITIVES, F1, F1_RARE, ACCURACY, MAJORITY_ACCURACY}
        | {POSITIVES, NEGATIVES, *THRESHOLDS, CONTROL_AUROC, AUROC_SELECTIVITY, CONTROL_POSITIVES, CONTROL_NEGATIVES}
    ),
    table=_table,
    bars=_bars,
    plots=_plots,
)
"""A run that fits or tests detectors of concepts."""
