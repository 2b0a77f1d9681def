"""A look at each row of a table: how the base model's tokenizer sees it, or what is wrong with it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from itrain.tasks import TaskError
from itrain.tasks.base import Pair, Split, Task, TextTask
from itrain.tasks.columns import Listing, listing
from itrain.tasks.contract import label_tokens
from itrain.tasks.dividing import divided
from itrain.tasks.of_task import SettingsOf
from itrain.tasks.rows import read_groups, tried
from itrain.tasks.table import Table, table
from itrain.tasks.tokens import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Examined(NamedTuple):
    """A row: where it stands, its split, its texts as lines by name, or what is wrong with it."""

    place: str
    """Empty of what is wrong with the whole table."""
    split: str = ""
    lines: Mapping[str, str] | None = None
    fault: str = ""
    """One line that names the place, the column and the remedy."""


def examine_table(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> Iterator[Examined]:
    """Each row of a table as the tokenizer sees it: the prompts' tokens, answers and spans, or the row's fault.

    What is wrong with the whole table, such as a split without rows, comes last. A file that cannot be read is all
    that is said of it.

    Args:
        tokenizer: the base model's.
        settings: the arguments of :func:`~itrain.tasks.table.table`, with ``of`` as a task.
    """
    bound = inspect.signature(table).bind(**settings)
    bound.apply_defaults()
    given, of = bound.arguments, bound.arguments["of"]
    try:
        groups = read_groups(given["pairs"], given["subset"], given["revision"], given["rows"])
    except TaskError as error:
        yield Examined("", fault=str(error))
        return
    right: dict[str, list[Listing]] = {}
    for name, rows in groups.items():
        for row in rows:
            made, faults = tried([row], lambda row: listing(row, given["columns"] or {}, of and of.variables))
            yield from (Examined(row.place, name, fault=str(error)) for error in faults)
            right.setdefault(name, []).extend(made)
    if not any(right.values()) and any(groups.values()):
        return  # What is wrong with the rows is all there is to say.
    splits, whole = _divided(right, given)
    try:
        yield from _of_task(of, tokenizer, splits) if of is not None else _texts(tokenizer, splits, given)
    except TaskError as error:
        whole.append(error)
    yield from (Examined("", fault=str(error)) for error in whole)


def _divided(
    groups: Mapping[str, Sequence[Listing]], given: Mapping[str, Any]
) -> tuple[Mapping[Split, Sequence[Listing]], list[TaskError]]:
    """The rows of each split, and why they cannot be divided."""
    try:
        return divided(groups, shares=given["shares"], disjoint=given["disjoint"], seed=given["split_seed"])[0], []
    except TaskError as error:
        return {"train": [row for rows in groups.values() for row in rows]}, [error]


def _texts(
    tokenizer: PreTrainedTokenizerBase, splits: Mapping[Split, Sequence[Listing]], given: Mapping[str, Any]
) -> Iterator[Examined]:
    task = Table(splits=splits, separator=given["separator"], control=given["control"])
    faults = task.render(tokenizer)
    for split, rows in splits.items():
        pairs = {pair.place: pair for pair in task.pairs(split)}
        for row in rows:
            if row.place in faults:
                yield Examined(row.place, split, fault=str(faults[row.place]))
            else:
                yield Examined(row.place, split, _lines(task, row, pairs[row.place]))


def _of_task(
    task: Task, tokenizer: PreTrainedTokenizerBase, splits: Mapping[Split, Sequence[Listing]]
) -> Iterator[Examined]:
    task.bind(tokenizer)
    settings = SettingsOf(task)
    for split, rows in splits.items():
        for row in rows:
            try:
                yield Examined(row.place, split, _lines(task, row, settings.pair(row)))
            except TaskError as error:
                where = "" if str(error).startswith(row.place) else f"{row.place}: "
                yield Examined(row.place, split, fault=f"{where}{error}")


def _lines(task: Task, row: Listing, pair: Pair) -> dict[str, str]:
    """The runs of a pair and its label, as lines by name."""
    new = task.counterfactual(pair)
    if not isinstance(task, TextTask):
        inputs = {column: ", ".join(f"{k}={v}" for k, v in run.inputs.items()) for column, run in row.runs.items()}
        return {**inputs, "label": str(new)}
    lines = {}
    for column, setting in zip(row.runs, pair.settings(), strict=True):
        answer = task.causal_model.run(setting)[task.causal_model.output]
        of_run = shown(task.tokenizer, task.inputs([setting]), task.spelled(label_tokens(task, answer)))
        lines[column] = of_run["prompt"]
        lines |= {f"{column} spans": of_run["spans"]} if "spans" in of_run else {}
    return {**lines, "label": " | ".join(task.tokenizer.convert_ids_to_tokens(list(label_tokens(task, new))))}
