"""What the rows and files of a public schema must have, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

from itrain.signatures import nearest
from itrain.tasks import TaskError
from itrain.tasks.rows import parsed_file
from itrain.trust import shown

Kind: TypeAlias = type | tuple[type, ...]

WORDS: Mapping[type, str] = {str: "text", int: "a whole number", dict: "an object", list: "a list", NoneType: "null"}
"""How messages call the types of cells."""


def require_columns(place: str, columns: Any, kinds: Mapping[str, Kind], of: str = "") -> None:
    """Refuse a row that lacks a column, or has something of another type in it.

    Args:
        place: where the row stands.
        columns: its cells, by column.
        kinds: the types that each column may have.
        of: the column that holds the columns, as messages say it: `` of 'random_counterfactual'``.

    Raises:
        TaskError: naming the row, the column and what to write.
    """
    if not isinstance(columns, Mapping):
        raise TaskError(f"{place}: the cell{of} is {shown(columns)}; write an object with {', '.join(kinds)}")
    for column, kind in kinds.items():
        if column not in columns:
            known = [str(name)[:40] for name in [*columns][:20]]
            raise TaskError(f"{place} has no column '{column}'{of}{nearest(column, known)}")
        value, allowed = columns[column], kind if isinstance(kind, tuple) else (kind,)
        # In Python, true is a whole number.
        if not isinstance(value, allowed) or (isinstance(value, bool) and not {bool, object} & {*allowed}):
            wanted = " or ".join(WORDS[each] for each in allowed if each in WORDS)
            raise TaskError(
                f"{place}, column '{column}'{of}: {shown(value)} is a {type(value).__name__}; write {wanted}"
            )


def read_json(path: Path, remedy: str) -> Any:
    """What a JSON file holds.

    Raises:
        TaskError: it is not there, or no JSON.
    """
    if not path.is_file():
        raise TaskError(f"there is no file '{path}'; {remedy}")
    return parsed_file(path)
