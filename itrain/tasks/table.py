"""Tasks whose pairs are the rows of a table: texts with their labels, or the inputs of a causal model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from itrain.causal_model import CausalModel, Setting
from itrain.signatures import nearest
from itrain.tasks import TaskError
from itrain.tasks.base import ListedTask, Pair, Split, Task
from itrain.tasks.columns import Listing, Run, listing
from itrain.tasks.dividing import divided
from itrain.tasks.of_task import SettingsOf
from itrain.tasks.rows import all_made, fingerprint_of, read_groups, require_none
from itrain.tasks.spans import all_characters
from itrain.trust import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 256
"""Texts that are given to the tokenizer at a time."""


def table(
    *,
    pairs: str | Mapping[str, str],
    of: Task | None = None,
    subset: str | None = None,
    revision: str | None = None,
    rows: int | None = None,
    columns: Mapping[str, str] | None = None,
    separator: str = " ",
    control: str | None = None,
    shares: Mapping[str, float] | None = None,
    disjoint: Sequence[str] = (),
    split_seed: int = 0,
    fingerprint: str | None = None,
) -> Task:
    """The task of the pairs of a table, which ``docs/howto/data.md`` describes column by column.

    On the command line ``data.pairs=<file>`` asks for it, with the other arguments beside it as ``data.<argument>``.

    Args:
        pairs: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them or of a data set, a data set's name on the
            hub, or a file for each split.
        of: the task whose inputs the rows hold, and whose causal model gives the labels; None: the rows hold texts and
            labels.
        subset: the configuration of a data set that has several.
        revision: the branch, tag or commit of a data set on the hub.
        rows: take the first rows of each file or split only; None: all.
        columns: how the table calls its columns, by the names that they have here, as in ``{base: prompt}``.
        separator: what stands between a prompt that ends in no space and its label.
        control: the value, of ``base_values``, that gets random labels in the control tasks of probes.
        shares: of the rows, for splits that the table does not have; in proportion. None: 0.8, 0.1 and 0.1 where it has
            no splits.
        disjoint: columns of which no value may be in two splits.
        split_seed: draws which rows go to which split.
        fingerprint: what the contents of a local file are known by; a table that has changed is refused.

    Raises:
        TaskError: the table cannot be read, or a row is no pair; naming file, row, column and remedy.
    """
    if fingerprint is not None and (found := fingerprint_of(pairs)) != fingerprint:
        raise TaskError(
            f"data.pairs: {shown(pairs)} has changed since: its fingerprint is {found}, and was {fingerprint}; bring "
            "it back, or name it anew with data.pairs=<file>"
        )
    variables = None if of is None else of.variables
    splits, how = divided(
        {
            name: all_made(of_group, lambda row: listing(row, columns or {}, variables))
            for name, of_group in read_groups(pairs, subset, revision, rows).items()
        },
        shares=shares,
        disjoint=disjoint,
        seed=split_seed,
    )
    notes = _notes(pairs, splits, how, disjoint)
    if of is None:
        return Table(splits=splits, separator=separator, control=control, notes=notes)
    return task_of(of, splits, control=control, notes=notes)


table.reads = ("pairs",)  # type: ignore[attr-defined]


def task_of(
    of: Task, splits: Mapping[Split, Sequence[Listing]], *, control: str | None, notes: Mapping[str, str]
) -> Task:
    """A task with the rows as its pairs.

    Raises:
        TaskError: a row gives no value, or a wrong one, of an input; naming row and column.
    """
    if control is not None and control not in of.causal_model.variables:
        raise TaskError(f"data.control: there is no variable '{control}'{nearest(control, of.causal_model.variables)}")
    task, settings = copy.copy(of), SettingsOf(of)
    task.listed = {split: all_made(rows, settings.pair) for split, rows in splits.items()}
    task.notes, task.control = {**of.notes, **notes}, control or of.control
    return task


class Table(ListedTask):
    """Pairs of texts with their labels, as the rows of a table give them; :func:`table` makes one.

    Args:
        splits: the rows of each split.
        separator: what stands between a prompt that ends in no space and its label.
        control: the value that gets random labels in the control tasks of probes.
        notes: what the user should be told of the table.

    Raises:
        TaskError: rows say different things of one pair, or some have a value and others have not.
    """

    def __init__(
        self,
        *,
        splits: Mapping[Split, Sequence[Listing]],
        separator: str = " ",
        control: str | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self.separator, self.control, self.notes = separator, control, notes or {}
        self.splits, self._pairs = splits, dict[Split, list[Pair]]()
        self._faults: dict[tuple[str, str], str] = {}
        """By the last word of a text and its answer: why they have no tokens of their own."""
        every = [each for rows in splits.values() for each in rows]
        runs = [run for each in every for run in each.runs.values()]
        _require_one_answer(every)
        self.variables = tuple(dict.fromkeys(name for each in every for name in each.sources))
        self._valued = tuple(dict.fromkeys((*self.variables, *_values_of(every))))
        if control is not None and control not in self._valued:
            raise TaskError(f"data.control: no row has base_values.{control}{nearest(control, self._valued)}")
        self._outputs = sorted({self._answer(each.label) for each in (*runs, *every)})
        values = {name: sorted({run.values.get(name) for run in runs}, key=repr) for name in self._valued}
        self.causal_model = CausalModel(
            inputs={**values, "prompt": [""], "answer": self._outputs, "spans": [{}]}, mechanisms={}, output="answer"
        )

    @property
    def outputs(self) -> Sequence[str]:
        return self._outputs

    def pairs(self, split: Split) -> Sequence[Pair]:
        if not self._pairs:
            raise TaskError("the table has no tokenizer yet: call task.bind(base_model.tokenizer) first")
        return self._pairs[split]

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Render all rows, and look for each text, span and label in the vocabulary.

        Raises:
            TaskError: naming the first row at fault and its column, and how many others are.
        """
        require_none(list(self.render(tokenizer).values()))

    def render(self, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, TaskError]:
        """Render all rows, and return what is wrong with some by the place of the row, which then are no pairs."""
        super().bind(tokenizer)
        self._faults.clear()
        faults: dict[str, TaskError] = {}
        found: list[tuple[Split, Listing, Pair]] = []
        for split, rows in self.splits.items():
            for row in rows:
                try:
                    found.append((split, row, self.pair(row)))
                except TaskError as error:
                    faults[row.place] = error
        for check in (self._check_texts, self._check_labels):
            settings = [setting for *_, pair in found for setting in pair.settings()]
            self.causal_model.inputs["prompt"] = list(dict.fromkeys(setting["prompt"] for setting in settings))
            if check == self._check_texts and self._are_known(settings):
                continue
            right = []
            for split, row, pair in found:
                try:
                    check(row, pair)
                    right.append((split, row, pair))
                except TaskError as error:
                    faults[row.place] = error
            found = right
        self._pairs = {split: [pair for of, _, pair in found if of == split] for split in self.splits}
        return faults

    def _are_known(self, settings: Sequence[Setting]) -> bool:
        """Whether no text or span is at fault, found for many at a time."""
        try:
            for start in range(0, len(settings), AT_ONCE):
                self.inputs(settings[start : start + AT_ONCE])
        except TaskError:
            return False
        return True

    def pair(self, row: Listing) -> Pair:
        """A row as a pair.

        Raises:
            TaskError: one of its spans is not in its text, or its messages have no text; naming row and column.
        """
        base, *sources = [self._setting(row, column, run) for column, run in row.runs.items()]
        return Pair(
            base=base,
            sources=dict(zip(row.sources, sources, strict=True)),
            isolates=row.isolates,
            output=self._answer(row.label),
            place=row.place,
        )

    def _check_texts(self, row: Listing, pair: Pair) -> None:
        """Refuse words and spans of a row that have no tokens of their own."""
        for column, setting in zip(row.runs, pair.settings(), strict=True):
            try:
                self.inputs([setting])
            except TaskError as error:
                raise TaskError(f"{row.where(column)}: {error}") from error

    def _check_labels(self, row: Listing, pair: Pair) -> None:
        """Refuse labels of a row that have no tokens of their own."""
        for column, setting in zip(row.runs, pair.settings(), strict=True):
            self._check_label(row, row.label_of(column), setting, setting["answer"])
        self._check_label(row, row.label_column, pair.base, pair.output)

    def _check_label(self, row: Listing, column: str, setting: Setting, answer: str) -> None:
        # How an answer is split depends on the word before it, and on no other.
        key = setting["prompt"].rpartition(" ")[2], answer
        if key not in self._faults:
            try:
                here, usual = self.answer(setting, answer), self.label(answer)
            except TaskError as error:
                self._faults[key] = str(error)
            else:
                texts = f"{shown(answer)} is {here} after {shown(setting['prompt'])} and {usual} elsewhere, as tokens"
                self._faults[key] = "" if here == usual else f"{texts}; end all texts alike, with or without a space"
        if fault := self._faults[key]:
            raise TaskError(f"{row.where(column)}: {fault}")

    def _setting(self, row: Listing, column: str, run: Run) -> Setting:
        text, spans = self._text(row.where(column), run), {}
        for name, (said_in, said) in run.spans.items():
            try:
                spans |= all_characters(text, {name: said})
            except TaskError as error:
                raise TaskError(f"{row.where(said_in)}, of its {column}: {error}") from error
        return {
            **{name: run.values.get(name) for name in self._valued},
            "prompt": text,
            "answer": self._answer(run.label),
            "spans": spans,
        }

    def _text(self, where: str, run: Run) -> str:
        """The prompt; the messages of a chat are written by the tokenizer's own template."""
        if isinstance(run.text, str):
            return run.text
        if self.tokenizer.chat_template is None:
            raise TaskError(
                f"{where}: the model's tokenizer has no chat template, so messages have no text; write text"
            )
        goes_on = run.text[-1]["role"] == "assistant"
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in run.text],
                tokenize=False,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
            )
        except Exception as error:  # a template is a program, which raises whatever its author chose
            raise TaskError(f"{where}: the tokenizer's chat template refuses the messages: {error}") from error
        assert isinstance(text, str), "text was asked for"
        return text

    def _answer(self, label: str | None) -> str:
        assert label is not None, "a row of texts has all labels"
        return label.removeprefix(self.separator)


def _notes(
    pairs: str | Mapping[str, str], splits: Mapping[Split, Sequence[Listing]], how: str, used: Sequence[str]
) -> dict[str, str]:
    every = [each for rows in splits.values() for each in rows]
    source = pairs if isinstance(pairs, str) else ", ".join(pairs.values())
    notes = {"table": f"{source}, {len(every)} rows, splits {how}"}
    unread = dict.fromkeys(name for each in every for name in each.unread)
    if left := [name for name in unread if not any(name == each or name.startswith(f"{each}.") for each in used)]:
        notes["unread"] = f"columns {', '.join(left)}"
    if again := len(every) - len({each.identity for each in every}):
        notes["repeated"] = f"{again} rows list a pair again"
    return notes


def _require_one_answer(rows: Iterable[Listing]) -> None:
    """Refuse rows that say different things of one pair, or of one text."""
    known: dict[object, tuple[str, str | None, str]] = {}
    for row in rows:
        said: list[tuple[object, str, str | None]] = [(row.identity, row.label_column, row.label)]
        said += [(run.identity, row.label_of(column), run.label) for column, run in row.runs.items()]
        for of, column, label in said:
            first, other, where = known.setdefault(of, (row.place, label, column))
            if label != other:
                what = "pair" if isinstance(of, tuple) else "text"
                raise TaskError(
                    f"{row.where(column)} is {shown(label)}, and {first}, {where} is {shown(other)} for the same "
                    f"{what}; leave one of them out"
                )


def _values_of(rows: Iterable[Listing]) -> list[str]:
    """The names of the values that the runs have.

    Raises:
        TaskError: some runs have one and others have not, or it has the name of something else.
    """
    first: tuple[str, set[str]] | None = None
    for row in rows:
        for column, run in row.runs.items():
            if reserved := {*run.values} & {"prompt", "spans"}:
                raise TaskError(f"{row.place}: a value cannot be called '{min(reserved)}'; rename it")
            first = first or (row.where(column), {*run.values})
            if other := {*run.values} ^ first[1]:
                has, lacks = (
                    (row.where(column), first[0]) if min(other) in run.values else (first[0], row.where(column))
                )
                raise TaskError(
                    f"{has} has a value '{min(other)}', and {lacks} has none; write it for base and sources"
                )
    return sorted(first[1]) if first else []
