"""The rows of the table of reproductions: one YAML file each."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from itrain.config import shipped_rows
from itrain.files import read_yaml
from itrain.results.reproduction import Expected, Row
from itrain.signatures import ConfigError, check_calls, nearest

VERBS = ("fit", "sweep")
"""The verbs of a row's command."""
WORDS = ("quick", "list")
"""What the command line says in place of a row's name."""
SEED = "{seed}"


def read_rows(folder: Path | None = None) -> dict[str, Row]:
    """The rows of a folder, or those that ship with itrain, by name: quick ones first, and then by their minutes.

    Raises:
        ConfigError: the folder has no rows, or a file in it is none; the message names file and key.
    """
    files = shipped_rows() if folder is None else sorted(folder.glob("*.yaml"))
    if not files:
        raise ConfigError(f"rows: there is no .yaml file of a row in '{folder}'")
    rows = [_row(file) for file in files]
    return {row.name: row for row in sorted(rows, key=_order)}


def missing(row: Row) -> str | None:
    """What the row needs and this machine lacks; None where it can be run."""
    if row.needs is None and row.package is not None:
        try:
            version(row.package)
        except PackageNotFoundError:
            return f"package {row.package}"
    return row.needs


def _order(row: Row) -> tuple[bool, float, str]:
    return not row.quick, math.inf if row.minutes is None else row.minutes, row.name


def _row(file: Path) -> Row:
    try:
        node = read_yaml(file)
        check_calls(_asked, node)
        figures = {}
        for name, each in node["figures"].items():
            try:
                check_calls(Expected, each or {})
            except ConfigError as error:
                raise ConfigError(f"figures.{name}: {error}") from error
            figures[name] = found = Expected(**(each or {}))
            if None not in (found.at_least, found.at_most) and found.at_least > found.at_most:  # type: ignore[operator]
                raise ConfigError(f"figures.{name}: nothing is {found.bounds}; swap the bounds, or leave one out")
        row = Row(name=file.stem, **{**node, "figures": figures})
        _require_command(row)
    except ConfigError as error:
        raise ConfigError(f"row '{file}': {error}") from error
    return row


def _asked(
    *,
    title: str,
    paper: str,
    command: str,
    seeds: Sequence[int],
    figures: Mapping[str, Mapping[str, float | None] | None],
    minutes: float | None,
    quick: bool = False,
    needs: str | None = None,
    package: str | None = None,
) -> None:
    """The keys of a file, as a call whose arguments can be checked."""


def _require_command(row: Row) -> None:
    """Refuse a row that cannot be run as it stands, or whose seeds would all be the same run."""
    if row.name in WORDS:
        raise ConfigError(f"'{row.name}' is a word of the command line; name the file otherwise")
    for key in ("seeds", "figures"):
        if not getattr(row, key):
            raise ConfigError(f"{key}: give one or more")
    words = words_of(row.command)
    if words[:1] not in [[verb] for verb in VERBS]:
        raise ConfigError(f"command: it begins with {' or '.join(VERBS)}, not with '{' '.join(words[:1])}'")
    if len(set(row.seeds)) < len(row.seeds):
        raise ConfigError("seeds: one is listed twice; leave one of them out")
    if SEED not in row.command and len(row.seeds) > 1:
        raise ConfigError(f"command: it has no {SEED}, so that all seeds would be one run; add seed={SEED}")
    for word in words:
        if word.startswith(("output=", "name=")):
            raise ConfigError(f"command: '{word}' is given by 'itrain reproduce'; leave it out")


def words_of(command: str) -> list[str]:
    """A command's words.

    Raises:
        ConfigError: a quote is left open.
    """
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"command: {str(error).lower()}: {command}") from error


def chosen(rows: Mapping[str, Row], names: Sequence[str], *, quick: bool) -> list[Row]:
    """The rows that are asked for by name, or all, in the order of the table; with ``quick`` only those that are.

    Raises:
        ConfigError: there is no such row, or none is left.
    """
    for name in names:
        if name not in rows:
            raise ConfigError(f"there is no row '{name}'{nearest(name, rows)}")
    asked = [row for row in rows.values() if not names or row.name in names]
    found = [row for row in asked if row.quick or not quick]
    if not found:
        raise ConfigError(f"quick: {', '.join(names) or 'no row'} takes less than 20 seconds a seed; leave quick out")
    return found
