"""The table of a sweep: one row a fit, read from what the jobs have left, with flags."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itrain.reports.curves import CURVES
from itrain.reports.html import RESULTS
from itrain.reports.intervals import over_pairs
from itrain.reports.pictures import CEILING, CONTROL, FIRST, RANDOM_MODEL

if TYPE_CHECKING:
    import pandas

JOBS = "jobs"
"""The folder of a sweep in which each finished job leaves its rows, so that none is run twice."""
SHOWN = 0.5
"""The share of label-changing pairs from which a control is said to pass, half of the way from 0 to all of them."""
SHOWN_UNTRAINED = 0.75
"""The same for a randomly initialised model, which need not be right on the bases: half of the way from the 0.5 that it
has by answering all pairs alike."""
ABOVE = 0.3
"""How far above the whole vector a subspace is marked: it may use what the model does not (Makelov et al. 2023)."""


def read_results(folder: Path | str) -> pandas.DataFrame:
    """The table of a sweep, one row a fit: method, site, rank, seed, figures, seconds, command and flag.

    Raises:
        FileNotFoundError: the folder holds no finished sweep.
    """
    import pandas

    file = Path(folder) / RESULTS
    if not file.is_file():
        raise FileNotFoundError(f"'{folder}' holds no {RESULTS}; to finish a sweep: itrain sweep resume={folder}")
    return pandas.read_parquet(file)


def read_curves(folder: Path | str) -> pandas.DataFrame:
    """The validation of each trained intervention of a sweep, one row a fit and epoch; empty where none is trained."""
    import pandas

    return pandas.read_parquet(Path(folder) / CURVES)


def write(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    # Whole or not at all, so that a sweep killed here finds no half of a job.
    beside = file.with_suffix(f".{os.getpid()}.part")
    beside.write_text(json.dumps(list(rows)))
    beside.replace(file)


def collect(folder: Path) -> pandas.DataFrame:
    import pandas

    rows = [row for file in sorted((folder / JOBS).glob("*.json")) for row in json.loads(file.read_text())]
    curves = []
    for row in rows:
        settings = {key: value for key, value in row.items() if not isinstance(value, float | list)}
        curves += [{**settings, **epoch} for epoch in row.pop("curve", [])]
    pandas.DataFrame(curves).to_parquet(folder / CURVES)
    frame = flagged(pandas.DataFrame(rows))
    frame.to_parquet(folder / RESULTS)
    return frame


def flagged(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The table with a column ``flag`` that says where a control speaks against a result, the first of these that does.

    ``control passes``: a random subspace of equal rank changes the label as predicted on half of the label-changing
    pairs or more. ``random model passes``: the same fit on a randomly initialised model does so on three quarters of
    them; or, of a probe that is better than the most frequent class, it comes into or above the 95% interval of the
    probe's accuracy. ``above the whole vector``: the fit is more than 0.3 above swapping all of the activation.
    """
    iia, accuracy = FIRST, "probe_accuracy"
    needed = [iia, accuracy, RANDOM_MODEL + iia, RANDOM_MODEL + accuracy, "majority_accuracy", "examples", "rank"]
    table = frame.reindex(columns=list(dict.fromkeys([*frame.columns, *needed])))
    place = ["layer", "component", "position", "seed"]
    control = table[table.method == CONTROL].groupby([*place, "rank"], dropna=False)[iia].first()
    ceiling = table[table.method == CEILING].groupby(place)[iia].first()

    def flag(row: Any) -> str:
        if row.method in (CONTROL, CEILING):
            return ""
        here = tuple(row[key] for key in place)
        if row[accuracy] == row[accuracy]:
            low, _ = over_pairs(row[accuracy], row.examples)
            return "random model passes" if row[RANDOM_MODEL + accuracy] >= low > row.majority_accuracy else ""
        if row[iia] == row[iia] and control.get((*here, row["rank"]), 0.0) >= SHOWN:
            return "control passes"
        if row[RANDOM_MODEL + iia] >= SHOWN_UNTRAINED:
            return "random model passes"
        return "above the whole vector" if row[iia] > ceiling.get(here, 1.0) + ABOVE else ""

    return frame.assign(flag=table.apply(flag, axis=1))
