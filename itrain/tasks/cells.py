"""The columns of a table of counterfactual pairs, and the cells of a row, which remember those that were read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from itrain.tasks import TaskError
from itrain.tasks.rows import Row, parsed
from itrain.trust import shown

COLUMNS = (
    "base",
    "source",
    "sources",
    "variable",
    "base_label",
    "source_label",
    "source_labels",
    "label",
    "counterfactual_label",
    "spans",
    "base_spans",
    "source_spans",
    "base_values",
    "source_values",
    "isolates",
    "split",
)
OBJECTS = ("sources", "source_labels", "spans", "base_spans", "source_spans", "base_values", "source_values")
"""Columns that hold several values by name."""
_SWITCHES = {"true": True, "false": False, "1": True, "0": False}
_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(role|content)"')
_LIKENESS = 0.85
"""From which on the name of a column that nobody reads is taken for a mistyped one."""

Text = str | Sequence[Mapping[str, str]]
"""A prompt: its text, or the messages of a chat."""


class Cells:
    """The cells of a row by column, which remember those that were read."""

    def __init__(self, row: Row, columns: Mapping[str, str], *, of_task: bool) -> None:
        self.place, self.texts = row.place, row.texts
        objects = (*OBJECTS, "base", "source") if of_task else OBJECTS
        renamed = {theirs: ours for ours, theirs in columns.items()}
        self.all: dict[str, Any] = {}
        self.empty: set[str] = set()
        self.read: set[str] = set()
        for name, value in _flat(row.columns):
            ours = _renamed(name, renamed)
            if ours in self.all:
                raise TaskError(f"{self.where(ours)}: the row has it twice, of columns or by data.columns; rename one")
            if row.texts and ours in objects and isinstance(value, str) and value.lstrip().startswith("{"):
                for inside, each in _flat({ours: self.parsed(ours, value)}):
                    if inside in self.all:
                        raise TaskError(f"{self.where(inside)}: the row has it twice, also in {ours}; leave one out")
                    self.all[inside] = each
            elif row.texts and value == "":
                self.empty.add(ours)
            else:
                self.all[ours] = value

    def where(self, column: str) -> str:
        return f"{self.place}, {column}"

    def take(self, column: str) -> Any:
        """The value of a column; None where the row has none."""
        self.read.add(column)
        return self.all.get(column)

    def below(self, column: str) -> dict[str, Any]:
        """The values of the columns whose names go on after this one and a dot, by what follows."""
        if column in self.all:
            raise TaskError(
                f"{self.where(column)}: {shown(self.all[column])} is no object; write {{name: value}}, or columns "
                f"{column}.<name>"
            )
        start = f"{column}."
        found = {name.removeprefix(start): value for name, value in self.all.items() if name.startswith(start)}
        self.read |= {f"{start}{name}" for name in found}
        return found

    def text(self, column: str) -> str | None:
        """The text of a column; a whole number is taken as its digits.

        Raises:
            TaskError: it is something else, or empty.
        """
        value = self.take(column)
        if value is None:
            return None
        if type(value) is int:
            return str(value)
        if not isinstance(value, str):
            raise TaskError(f"{self.where(column)}: {shown(value)} is a {type(value).__name__}; write text")
        if not value.strip():
            raise TaskError(f"{self.where(column)} is empty; write its text, or leave the row out")
        return value

    def prompt(self, column: str) -> Text | None:
        """The text of a column, or the messages of a chat.

        Raises:
            TaskError: it is neither.
        """
        value = self.all.get(column)
        if self.texts and isinstance(value, str) and _MESSAGES.match(value):
            value = self.parsed(column, value)
        if not isinstance(value, list):
            return self.text(column)
        self.read.add(column)
        for number, message in enumerate(value):
            if not (isinstance(message, dict) and {*message} == {"role", "content"}):
                raise TaskError(f'{self.where(column)}: message {number} is not {{"role": ..., "content": ...}}')
            if not all(isinstance(each, str) for each in message.values()):
                raise TaskError(f"{self.where(column)}: role and content of message {number} are not both text")
        if not value:
            raise TaskError(f"{self.where(column)} has no messages; write one, or leave the row out")
        return value

    def switch(self, column: str) -> bool:
        """Whether a column says so; False where the row has none."""
        value = self.take(column)
        value = _SWITCHES.get(value.lower(), value) if self.texts and isinstance(value, str) else value
        if not isinstance(value, bool | None):
            raise TaskError(f"{self.where(column)}: {shown(value)} is neither true nor false")
        return bool(value)

    def required(self, column: str) -> TaskError:
        """The error of a row that has no value in a column."""
        if column in self.empty:
            return TaskError(f"{self.where(column)} is empty; write its text, or leave the row out")
        close = get_close_matches(column, [name for name in self.all if name not in COLUMNS], 1)
        if self.texts and len(self.all) == 1 and ";" in next(iter(self.all)):
            return TaskError(f"{self.place}: there is no '{column}', as its cells stand between ';'; write commas")
        known = ", ".join(name[:40] for name in [*self.all][:20]) or "no cells"
        hint = f", did you mean '{close[0]}'?" if close else f"; it has {known}"
        return TaskError(f"{self.place}: there is no '{column}'{hint}")

    def unread(self) -> list[str]:
        """The columns that were not read.

        Raises:
            TaskError: one of them has nearly the name of a column that the row lacks, or no use in it.
        """
        found = [name for name in self.all if name not in self.read]
        labelled = {"label", "counterfactual_label"} & self.all.keys()
        lacking = [each for each in COLUMNS if each not in self.all and not (labelled and each.endswith("label"))]
        for name in found:
            family = name.partition(".")[0]
            if family in COLUMNS:
                raise TaskError(f"{self.where(name)}: the row has no use for it; leave it out")
            if meant := get_close_matches(family, lacking, 1, _LIKENESS):
                raise TaskError(f"{self.place}: there is no column '{name}', did you mean '{meant[0]}'?")
        return found

    def parsed(self, column: str, text: str) -> Any:
        """The value that a column's text writes as JSON."""
        return parsed(text, self.where(column))


def _flat(cells: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The cells by column, objects taken apart, without those that hold nothing."""
    for name, value in cells.items():
        if isinstance(value, Mapping):
            yield from _flat({f"{name}.{key}": each for key, each in value.items()})
        elif value is not None:
            yield name, value


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    for theirs, ours in renamed.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name
