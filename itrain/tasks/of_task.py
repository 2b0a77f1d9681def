"""Rows of a table that hold the inputs of a task: the task renders them, and its causal model gives the labels."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from itrain.causal_model import Setting
from itrain.signatures import nearest
from itrain.tasks import TaskError
from itrain.tasks.base import Pair, Task
from itrain.tasks.columns import Listing, Run
from itrain.trust import shown


class SettingsOf:
    """Makes the pairs of a task from rows that hold a value of each of its inputs."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._known = {
            name: {_written(value): value for value in values} for name, values in task.causal_model.inputs.items()
        }
        """The values of each input by how a table writes them."""

    def pair(self, row: Listing) -> Pair:
        """A row as a pair of the task.

        Raises:
            TaskError: an input has no value or one that the task does not list, or a label is not the causal model's;
                naming row and column.
        """
        base, *sources = [self._setting(row, column, run) for column, run in row.runs.items()]
        made = Pair(
            base=base, sources=dict(zip(row.sources, sources, strict=True)), isolates=row.isolates, place=row.place
        )
        if row.label is not None:
            self._require(row, row.label_column, row.label, self.task.counterfactual(made))
        return made

    def _setting(self, row: Listing, column: str, run: Run) -> Setting:
        model, where = self.task.causal_model, row.where(column)
        if unknown := [name for name in run.inputs if name not in model.inputs]:
            raise TaskError(f"{where}: the task has no input '{unknown[0]}'{nearest(unknown[0], model.inputs)}")
        if missing := [name for name in model.inputs if name not in run.inputs]:
            raise TaskError(f"{where}: there is no value for the input {' and for '.join(map(repr, missing))}")
        setting = {name: self._value(row.where(f"{column}.{name}"), name, run.inputs[name]) for name in model.inputs}
        try:
            found = model.run(setting)
        except ValueError as error:
            raise TaskError(f"{where}: {error}") from error
        if run.label is not None:
            self._require(row, row.label_of(column), run.label, found[model.output])
        for name, said in run.values.items():
            if name not in found:
                raise TaskError(f"{where}: the task has no variable '{name}'{nearest(name, model.variables)}")
            self._require(row, f"{column.partition('.')[0].removesuffix('s')}_values.{name}", said, found[name])
        return setting

    def _value(self, where: str, name: str, said: Any) -> Any:
        listed: Mapping[str, Any] = self._known[name]
        if _written(said) in listed:
            return listed[_written(said)]
        close = get_close_matches(_written(said), listed, 1)
        meant = f"did you mean {shown(close[0])}?" if close else f"one is {shown(next(iter(listed), ''))}"
        raise TaskError(f"{where}: {shown(said)} is none of the {len(listed)} values of '{name}'; {meant}")

    def _require(self, row: Listing, column: str, said: Any, found: Any) -> None:
        """Refuse a row that says something else than the causal model."""
        if _written(said) != _written(found):
            raise TaskError(
                f"{row.where(column)} is {shown(said)}, and the causal model of {type(self.task).__name__} gives "
                f"{shown(_written(found))}; leave the column out, or write another"
            )


def _written(value: Any) -> str:
    """A value as a table writes it: JSON has lists in place of tuples, and CSV has texts alone."""
    return str(list(value) if isinstance(value, tuple) else value)
