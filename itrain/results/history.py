"""The curve of a single run, read from its ``metrics.csv``."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from itrain.results.columns import AUROC, BEFORE, EXACT_MATCH, PROBE_ACCURACY, TEST, TRAIN_LOSS, VALIDATION, spoken

FIGURES_SEEN = {
    f"{VALIDATION}iia_argmax": "validation IIA, argmax",
    f"{VALIDATION}{PROBE_ACCURACY}": "validation accuracy",
    f"{VALIDATION}{EXACT_MATCH}": "validation exact match",
    f"{VALIDATION}{AUROC}": "validation AUROC",
}
"""The figures of a validation that are shown first, with their titles."""

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss by step and, of runs that validate, a figure of the validation."""

    loss: str
    losses: Sequence[tuple[int, float]]
    figure: str = ""
    validation: Sequence[tuple[int, float]] = ()


def read_curve(metrics: Path) -> Curve | None:
    """The curve of a run from its ``metrics.csv``: of the training loss, or of the first column that may be one."""
    if not metrics.is_file():
        return None
    with metrics.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = list(dict.fromkeys(column for row in rows for column in row if column))
    points = {column: _points(rows, column) for column in columns if column not in ("step", "epoch")}
    trained = [name for name in columns if name.startswith("train")]
    trained += [name for name in columns if "loss" in name and not name.startswith(("val", TEST, BEFORE))]
    loss = next((name for name in (TRAIN_LOSS, *trained) if points.get(name)), None)
    if loss is None:
        return None
    validated = [name for name in columns if name.startswith("val")]
    figure = next((name for name in (*FIGURES_SEEN, *validated) if points.get(name)), "")
    return Curve(
        loss="training loss" if loss == TRAIN_LOSS else spoken(loss),
        losses=points[loss],
        figure=FIGURES_SEEN.get(figure, figure.replace("/", " ").replace("_", " ")),
        validation=points.get(figure, ()),
    )


def read_history(metrics: Path) -> pandas.DataFrame:
    """What a run logged in training and validation, one row a step; empty of a run that trained nothing."""
    import pandas

    if not metrics.is_file():
        return pandas.DataFrame()
    rows = pandas.read_csv(metrics)
    kept = [name for name in map(str, rows) if name == "epoch" or name.startswith(("train", "val"))]
    # Training and validation of one step are rows of their own in the file.
    steps = rows.groupby("step").first()[kept]
    return steps.loc[steps.drop(columns="epoch", errors="ignore").notna().any(axis=1)]


def rows_before(metrics: Path, steps: int) -> list[dict[str, float]]:
    """The rows of a ``metrics.csv`` that were logged in training before a step.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with metrics.open(newline="", encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        return [row for row in rows if row["step"] < steps and not any(name.startswith(f"{TEST}/") for name in row)]
    except (csv.Error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{metrics}' is damaged ({error}); remove it to go on without the metrics before") from error


def _points(rows: Sequence[Mapping[str, str]], column: str) -> list[tuple[int, float]]:
    """The finite numbers of a column by step; in a table without steps, by row."""
    found = []
    for number, row in enumerate(rows):
        step, value = _number(row.get("step")), _number(row.get(column))
        if value is not None:
            found.append((number if step is None else int(step), value))
    return found


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if isfinite(value) else None
