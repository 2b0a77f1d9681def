"""Listings: how a row of a table of counterfactual pairs becomes a base, its sources and their labels.

A row is a pair. Nested objects and columns with dots say the same: ``{"spans": {"subject": "cat"}}`` in JSON is the
column ``spans.subject`` of a CSV file. ``docs/howto/data.md`` has all columns with examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from itrain.signatures import nearest
from itrain.tasks import TaskError
from itrain.tasks.cells import Cells, Text
from itrain.tasks.rows import Row
from itrain.trust import shown

VARIABLE = "variable"
"""The name of the variable of pairs that do not say which one they interchange."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a row says of its base or of one of its sources."""

    text: Text = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """The values of a task's inputs, where the rows are of a task."""
    label: str | None = None
    spans: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    """Of each span by its name, the column that says it and what it says."""
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """What tells the run from others."""
        return repr((self.text, sorted(self.inputs.items(), key=lambda each: each[0])))


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A row as a pair, before the base model's tokenizer is known."""

    place: str
    base: Run
    sources: Mapping[str, Run]
    label: str | None
    isolates: bool
    split: str | None
    cells: Mapping[str, Any]
    """All cells by their column."""
    unread: tuple[str, ...]
    """Columns of the row that are none of a table of pairs."""

    @property
    def identity(self) -> tuple[str, ...]:
        """What tells the pair from others."""
        return self.base.identity, *(f"{name} {run.identity}" for name, run in sorted(self.sources.items()))

    @property
    def runs(self) -> dict[str, Run]:
        """The base and the sources, by the columns that hold their texts."""
        prefix = "" if any(name.split(".")[0] == "source" for name in self.cells) else "sources."
        return {
            "base": self.base,
            **{f"{prefix}{name}" if prefix else "source": run for name, run in self.sources.items()},
        }

    @property
    def label_column(self) -> str:
        """The column of the label after the interchange."""
        return "counterfactual_label" if "counterfactual_label" in self.cells else "label"

    def label_of(self, column: str) -> str:
        """The column of the label of a run."""
        several = f"source_labels.{column.removeprefix('sources.')}"
        return several if several in self.cells else f"{column.partition('.')[0].removesuffix('s')}_label"

    def where(self, column: str) -> str:
        """A column of the row, for messages."""
        return f"{self.place}, {column}"


def listing(row: Row, columns: Mapping[str, str], variables: Sequence[str] | None) -> Listing:
    """The pair of a row.

    Args:
        row: the row.
        columns: how the table calls the columns, by their names here.
        variables: those of the task whose inputs the rows hold; None: the rows hold texts and labels.

    Raises:
        TaskError: a column is missing, empty, or of the wrong type; naming row and column.
    """
    cells = Cells(row, columns, of_task=variables is not None)
    base = _base(cells, of_task=variables is not None)
    sources = _sources(cells, variables)
    label = _label(cells)
    if label is None and variables is None:
        raise cells.required("label")
    isolates, split = cells.switch("isolates"), cells.text("split")
    return Listing(
        place=cells.place,
        base=base,
        sources=sources,
        label=label,
        isolates=isolates,
        split=split,
        cells=cells.all,
        unread=tuple(cells.unread()),
    )


def _label(cells: Cells) -> str | None:
    if "label" in cells.all and "counterfactual_label" in cells.all:
        raise TaskError(f"{cells.place} has both label and counterfactual_label, which are one thing; leave one out")
    return cells.text("counterfactual_label" if "counterfactual_label" in cells.all else "label")


def _base(cells: Cells, *, of_task: bool) -> Run:
    spans = {**_spans(cells, "spans"), **_spans(cells, "base_spans")}
    return _run(cells, "base", label="base_label", spans=spans, values=_values(cells, "base_values"), of_task=of_task)


def _run(
    cells: Cells,
    column: str,
    *,
    label: str,
    spans: Mapping[str, tuple[str, Any]],
    values: Mapping[str, Any],
    of_task: bool,
) -> Run:
    if of_task:
        if column in cells.all:
            raise TaskError(
                f"{cells.where(column)}: {shown(cells.all[column])} gives not every input a value; write "
                f"{{input: value}}, or columns {column}.<input>; of rows with texts and labels, leave task=<task> out"
            )
        if spans:
            (said, _) = next(iter(spans.values()))
            raise TaskError(f"{cells.place}: the task has spans of its own; leave {said} out")
        if not (inputs := cells.below(column)):
            raise cells.required(column)
        return Run(inputs=inputs, label=cells.text(label), values=values)
    if any(name.startswith(f"{column}.") for name in cells.all):
        raise TaskError(
            f"{cells.where(column)} holds values by name; rows of a task's inputs need task=<task> beside data.pairs"
        )
    if (text := cells.prompt(column)) is None:
        raise cells.required(column)
    if (answer := cells.text(label)) is None:
        raise cells.required(label)
    return Run(text=text, label=answer, spans=spans, values=values)


def _sources(cells: Cells, variables: Sequence[str] | None) -> dict[str, Run]:
    """The source of each variable that the row interchanges."""
    of_task = variables is not None
    prefix = "sources." if any(name.startswith("sources.") for name in cells.all) else ""
    one = any(name == "source" or name.startswith("source.") for name in cells.all)
    if prefix and one:
        raise TaskError(f"{cells.place} has both source and sources; leave one out")
    if not prefix and not one:
        raise cells.required("source")
    if prefix:
        names = dict.fromkeys(name.split(".")[1] for name in cells.all if name.startswith(prefix))
    else:
        names = {_variable(cells, variables): None}
    common, found = _spans(cells, "spans"), {}
    spans, values = _spans(cells, "source_spans"), _values(cells, "source_values")
    for name in names:
        if variables is not None and name not in variables:
            raise TaskError(f"{cells.place}: the task has no variable '{name}'{nearest(name, variables)}")
        label = "source_label" if "source_label" in cells.all or not prefix else f"source_labels.{name}"
        found[name] = _run(
            cells,
            f"{prefix}{name}" if prefix else "source",
            label=label,
            spans={**common, **_own(spans, name, names)},
            values=_own(values, name, names),
            of_task=of_task,
        )
    if len(found) > 1 and "source_label" in cells.all:
        raise TaskError(f"{cells.where('source_label')} is of one source; write source_labels.<variable> for each")
    return found


def _variable(cells: Cells, variables: Sequence[str] | None) -> str:
    """The variable of a row's only source."""
    if (said := cells.text("variable")) is not None:
        return said
    if variables is None:
        return VARIABLE
    if len(variables) > 1:
        raise TaskError(
            f"{cells.place} does not say which variable it interchanges; write sources.<variable>, or the column "
            f"variable; there are {', '.join(variables)}"
        )
    return variables[0]


def _own(said: Mapping[str, Any], name: str, names: Mapping[str, None]) -> dict[str, Any]:
    """What is said of all sources and of this one, by what it is about."""
    others = {each for each in names if each != name}
    own = {key.removeprefix(f"{name}."): value for key, value in said.items() if key.startswith(f"{name}.")}
    return {
        key: value for key, value in said.items() if key.split(".")[0] not in {name, *others} or "." not in key
    } | own


def _spans(cells: Cells, column: str) -> dict[str, tuple[str, Any]]:
    found = {}
    for name, said in cells.below(column).items():
        if cells.texts and isinstance(said, str) and said.lstrip().startswith("["):
            said = cells.parsed(f"{column}.{name}", said)
        found[name] = (f"{column}.{name}", said)
    return found


def _values(cells: Cells, column: str) -> dict[str, Any]:
    found = cells.below(column)
    for name, value in found.items():
        where = cells.where(f"{column}.{name}")
        if not isinstance(value, str | int | float | bool):
            raise TaskError(f"{where}: {shown(value)} is a {type(value).__name__}; write text or a number")
        if isinstance(value, float) and not isfinite(value):
            raise TaskError(f"{where}: {value} is no finite number; write one, or text")
    return found
