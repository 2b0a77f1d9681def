"""The table of a sweep: reads it, and collects it from the rows that jobs leave."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from itrain.files import replacing, write_text
from itrain.results.columns import COMMAND, CURVE, IIA, METHOD, PAIRWISE, REQUIRED, SEED
from itrain.results.flags import flagged
from itrain.trust import require_yaml

if TYPE_CHECKING:
    import pandas

JOBS = "jobs"
"""The folder of a sweep in which each finished job leaves its rows, so that none is run twice."""
RESULTS, CURVES, CONFIGURATION = "results.parquet", "curves.parquet", "config.yaml"

LEFT_BY_FITS = ("metrics.json", "figure.png", "tokens.html", "judgements.jsonl", "generations.jsonl")
"""The files of a fit's folder that show its figures and texts; the first is always there."""

LARGEST_TABLE = 100_000_000
"""Values of a table; 10,000 fits of 100 epochs have a tenth."""


def read_results(folder: Path | str) -> pandas.DataFrame:
    """The table of a sweep, one row a fit: method, site, rank, seed, figures, seconds, command and flag.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no finished sweep.
        ValueError: the table is far larger than a sweep's.
    """
    file = Path(folder) / RESULTS
    if not file.is_file():
        raise FileNotFoundError(_no_table(Path(folder)))
    return _read(file)


def _no_table(folder: Path) -> str:
    """Why a folder has no table of a sweep, and what to do."""
    if not folder.is_dir():
        return f"'{folder}' is no folder; give that of a sweep, which itrain sweep prints"
    if (folder / LEFT_BY_FITS[0]).is_file():
        return f"'{folder}' is a fit's and holds no {RESULTS}; its figures are in {folder / LEFT_BY_FITS[0]}"
    return f"'{folder}' holds no {RESULTS}; to finish a sweep: itrain sweep resume={folder}"


def _read(file: Path) -> pandas.DataFrame:
    """A table, unless it is far larger than a sweep's: a small file can hold one value without end.

    Raises:
        ValueError: it is.
    """
    import pandas
    from pyarrow.parquet import read_metadata

    found = read_metadata(file)
    if found.num_rows * max(found.num_columns, 1) > LARGEST_TABLE:
        raise ValueError(f"'{file}' has {found.num_rows} rows, and is not one of itrain's")
    return pandas.read_parquet(file)


def read_curves(folder: Path | str) -> pandas.DataFrame:
    """The validation figures of a sweep, one row a fit and epoch; empty if there are none."""
    import pandas

    file = Path(folder) / CURVES
    return _read(file) if file.is_file() else pandas.DataFrame()


def read_checked(folder: Path) -> pandas.DataFrame:
    """The table of a sweep, with the columns that every sweep has.

    Raises:
        FileNotFoundError: the folder holds no finished sweep.
        ValueError: the table is unreadable, or not that of a sweep.
    """
    read_configuration(folder)
    try:
        frame = read_results(folder)
    except ValueError as error:
        raise ValueError(f"'{folder / RESULTS}' cannot be read: {error}") from error
    if missing := [name for name in REQUIRED if name not in frame]:
        raise ValueError(f"'{folder / RESULTS}' is not the table of a sweep: it has no column '{missing[0]}'")
    _require_rule(frame, folder / RESULTS)
    if jobs := sorted((folder / JOBS).glob("*.json")):
        count = sum(len(read_rows(file)) for file in jobs)
        if count != len(frame):
            raise ValueError(
                f"'{folder / RESULTS}' has {len(frame)} fits, and the jobs of the sweep have {count}; to finish it: "
                f"itrain sweep resume={folder}"
            )
    return frame


def _require_rule(frame: pandas.DataFrame, file: Path) -> None:
    """Refuse a table that has only the IIA of a rule that sweeps are not judged by.

    Raises:
        ValueError: it does.
    """
    if PAIRWISE in frame and IIA not in frame:
        raise ValueError(
            f"'{file}' has no column '{IIA}', which sweeps are judged by; run the sweep again, or read its "
            f"'{PAIRWISE}' with itrain.read_results"
        )


def read_configuration(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a finished sweep.

    Raises:
        FileNotFoundError: the folder holds no finished sweep.
        ValueError: its configuration is damaged.
    """
    missing = next((name for name in (RESULTS, CONFIGURATION) if not (folder / name).is_file()), None)
    if missing:
        left = [name for name in LEFT_BY_FITS if (folder / name).is_file()]
        alone = f"which is shown by {', '.join(left)}, or alone by: itrain report {folder}"
        fit = f"; it is the folder of a fit, {alone}" if LEFT_BY_FITS[0] in left else ""
        raise FileNotFoundError(f"'{folder}' is not the folder of a finished sweep: there is no {missing} in it{fit}")
    require_yaml(folder / CONFIGURATION)
    found = yaml.safe_load((folder / CONFIGURATION).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"'{folder / CONFIGURATION}' is not the configuration of a sweep")
    return found


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows that a job has left.

    Raises:
        ValueError: the file is damaged, or holds no rows of a sweep.
    """
    remedy = "remove it, and its job is run again"
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{file}' is damaged ({type(error).__name__}); {remedy}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"'{file}' holds no rows of fits; {remedy}")
    for row in rows:
        if missing := [name for name in (METHOD, SEED, COMMAND) if name not in row]:
            raise ValueError(f"'{file}' has a row without '{missing[0]}'; {remedy}")
    return rows


def require_rows(file: Path, fits: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a job's file that does not hold exactly these fits, given by the columns that tell them apart.

    Raises:
        ValueError: the file is damaged, or holds other fits.
    """
    rows = read_rows(file)
    if len(rows) != len(fits) or any(
        row.get(key) != fit[key] for row, fit in zip(rows, fits, strict=True) for key in fit
    ):
        raise ValueError(
            f"'{file}' holds other fits than the {len(fits)} of its job; remove it, and its job is run again"
        )


def write(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write the rows of a job, all or none, so that a sweep killed meanwhile leaves no half of a job."""
    write_text(file, json.dumps(list(rows)))


def collect(folder: Path) -> pandas.DataFrame:
    """Make the table and the curves of a sweep from the rows of its jobs, write both, and return the table."""
    frame, curves = _collected(folder)
    with replacing(folder / CURVES) as beside:
        curves.to_parquet(beside)
    with replacing(folder / RESULTS) as beside:
        frame.to_parquet(beside)
    return frame


def table_of_jobs(folder: Path) -> pandas.DataFrame:
    """The table of a sweep from the rows of its jobs, of which nothing is written."""
    return _collected(folder)[0]


def _collected(folder: Path) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """The table and the curves."""
    import pandas

    rows = [row for file in sorted((folder / JOBS).glob("*.json")) for row in read_rows(file)]
    curves = []
    for row in rows:
        settings = {key: value for key, value in row.items() if not isinstance(value, float | list)}
        curves += [{**settings, **epoch} for epoch in row.pop(CURVE, [])]
    return flagged(pandas.DataFrame(rows)), pandas.DataFrame(curves)
