"""Rows of a table that somebody else has written: JSONL, JSON, CSV, Parquet, or a data set of the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from itrain.tasks import TaskError


class Row(NamedTuple):
    """A row, and where it stands, for messages."""

    place: str
    columns: Mapping[str, Any]


def read_rows(source: str, *, name: str | None = None, revision: str | None = None) -> dict[str, list[Row]]:
    """The rows of a file, or those of a data set's splits by their names; those of a file are named ``""``.

    Args:
        source: a file ending in .jsonl, .json (a list of objects), .csv, .tsv or .parquet; else a folder that holds a
            data set, or a data set's name on the hub.
        name: the configuration of a data set that has several.
        revision: the branch, tag or commit of a data set on the hub.

    Raises:
        TaskError: there is no such file or data set, or a line of it is no row; naming file, line and remedy.
    """
    path = Path(source).expanduser()
    if path.suffix in READERS:
        if not path.is_file():
            raise TaskError(f"there is no file '{source}'")
        return {"": list(READERS[path.suffix](path))}
    if path.is_file():
        raise TaskError(f"'{source}' is none of {', '.join(READERS)}; convert it to one of them")
    return _data_set(source, name, revision)


def _json_lines(path: Path) -> Iterator[Row]:
    # Not splitlines(), which ends lines at some characters that JSON strings may hold.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield _object(f"'{path}' line {number}", line)


def _json(path: Path) -> Iterator[Row]:
    try:
        listed = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise TaskError(f"'{path}' line {error.lineno} is not JSON ({error.msg})") from error
    if not isinstance(listed, list):
        raise TaskError(f"'{path}' is a {type(listed).__name__}; write a list of objects, or a JSONL file")
    for number, row in enumerate(listed, 1):
        if not isinstance(row, dict):
            raise TaskError(f"'{path}' row {number} is not an object; write {{column: value}}")
        yield Row(f"'{path}' row {number}", row)


def _object(place: str, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise TaskError(f"{place} is not JSON ({error.msg}); a JSONL file has one object in a line") from error
    if not isinstance(row, dict):
        raise TaskError(f"{place} is not an object; write {{column: value}}")
    return Row(place, row)


def _separated(delimiter: str) -> Callable[[Path], Iterator[Row]]:
    def read(path: Path) -> Iterator[Row]:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            try:
                for row in reader:
                    place = f"'{path}' line {reader.line_num}"
                    if None in row or None in row.values():
                        raise TaskError(f"{place} has {'more' if None in row else 'fewer'} cells than the head")
                    yield Row(place, row)
            except (csv.Error, UnicodeDecodeError) as error:
                raise TaskError(f"'{path}' line {reader.line_num} cannot be read: {error}") from error

    return read


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"'{path}' is no Parquet file: {error}") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield Row(f"'{path}' row {number}", row)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TaskError(f"'{path}' is no UTF-8 text: {error}") from error


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
"""How a file is read, by its ending."""


def _data_set(source: str, name: str | None, revision: str | None) -> dict[str, list[Row]]:
    from datasets import load_dataset

    try:
        data: Mapping[str, Any] = load_dataset(source, name, revision=revision)  # type: ignore[assignment]
    except (OSError, ValueError, RuntimeError) as error:
        raise TaskError(
            f"there is no file and no data set '{source}': {type(error).__name__}: {str(error).splitlines()[0]}; "
            "check the name, the network and HF_TOKEN, or give a local copy"
        ) from error
    return {
        split: [Row(f"data set '{source}', {split} row {number}", row) for number, row in enumerate(rows)]
        for split, rows in data.items()
    }
