"""Labelled texts of a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from itrain.causal_model import CausalModel, Setting
from itrain.signatures import nearest
from itrain.tasks import TaskError
from itrain.tasks.base import SPLITS, Split
from itrain.tasks.dividing import by_group
from itrain.tasks.labelled import UNLABELLED, LabelledTask
from itrain.tasks.rows import Row, read_rows
from itrain.tasks.schema import require_columns
from itrain.tasks.tokens import encode, unknown_words
from itrain.trust import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""The part of the shuffled texts that each split has, where no splits are given."""
BINARY = {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}
"""How a column says whether a text has the concept of the column's name."""
NAME, LABEL = re.compile(r"\w[\w .+-]{0,63}"), re.compile(r"[^/]{0,80}")
"""Names of splits and shifts, and classes: figures are named after them."""


class Column(NamedTuple):
    """A column of labels, and the concepts that it is about: the classes that stand in it, or the column itself."""

    name: str
    classes: tuple[str, ...]

    @property
    def concepts(self) -> list[str]:
        return [f"{self.name}={each}" for each in self.classes] or [self.name]

    def labels(self, row: Row) -> list[int]:
        """The label of each concept; an empty list says that a text has none of several."""
        value, said = row.columns[self.name], _said(row.columns[self.name])
        if not said and not isinstance(value, list):
            return [UNLABELLED] * len(self.concepts)
        return [int(each in said) for each in self.classes] or [BINARY[said[0].lower()]]


class LabelledTexts(LabelledTask):
    """Texts of a table: JSONL, JSON, CSV, TSV, Parquet, or a data set of the hub.

    A label column of 0 and 1, or false and true, is a concept of the column's name. One of two classes is the concept
    ``column=class`` of its last class in the alphabet, or of the ``positive`` one; of more classes each is a concept. A
    list holds all classes of a text. Null, or an empty cell, leaves a text unlabelled.

    A text may be a list of chat messages, ``[{"role": ..., "content": ...}]``, which become a text by the tokenizer's
    own template.

    Args:
        texts: the table; or a table for each split, ``{train: ..., validation: ..., test: ...}``.
        shifts: shifted test sets by name, each a table with the same columns.
        text: the column of texts.
        label: the column of labels, or several.
        split: the column that names each row's split: train, validation, test, or the name of a shift. Without such a
            column, rows are divided 60 : 20 : 20.
        group: a column whose values stay together in one split where rows are divided; None: equal texts do.
        type: a column of what the control task of detectors gives arbitrary labels to, such as a name or a template;
            None: no control task.
        positive: the class that is the concept, for a column of classes.
        name, revision: of a data set of the hub.
        split_seed: shuffles the texts before they are divided.

    Raises:
        TaskError: a column, a text, a label or a split is missing, or a text is in two splits; naming row and column.
    """

    reads: ClassVar[tuple[str, ...]] = ("texts", "shifts")

    def __init__(
        self,
        *,
        texts: str | Mapping[str, str] | None = None,
        shifts: Mapping[str, str] | None = None,
        text: str = "text",
        label: str | Sequence[str] = "label",
        split: str = "split",
        group: str | None = None,
        type: str | None = None,
        positive: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        split_seed: int = 0,
    ) -> None:
        if texts is None:
            raise TaskError("task.texts: no table is given; set task.texts=<file or data set>")
        read = partial(read_rows, name=name, revision=revision)
        tables = _tables(read, texts, group or text, split, split_seed)
        for shift, source in (shifts or {}).items():
            # One set, whatever the splits are named that its table has.
            tables[shift] = [row for rows in read(source).values() for row in rows]
        rows = [row for each in tables.values() for row in each]
        names = [label] if isinstance(label, str) else list(label)
        _require_columns(rows, [text, *names, *([type] if type else [])])
        for row in rows:
            _require_labels(row, names)
        self.text, self.type = text, type
        self.columns = [_column(each, rows, positive) for each in names]
        self.concepts = [concept for column in self.columns for concept in column.concepts]
        self._settings = {part: [self._setting(row) for row in each] for part, each in tables.items()}
        self.shifts = [each for each in self._settings if each not in SPLITS]
        _require_apart(self._settings)
        every = [setting for split in self._settings.values() for setting in split]
        self.causal_model = CausalModel(
            inputs={key: [setting[key] for setting in every] for key in ("text", "place", "labels")},
            mechanisms={},
            output="text",
        )

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().bind(tokenizer)
        self._settings = {
            split: [{**setting, "text": self._written(setting)} for setting in each]
            for split, each in self._settings.items()
        }

    def settings(self, split: str) -> Sequence[Setting]:
        return self._settings.get(split, ())

    def labels(self, setting: Setting) -> Sequence[int]:
        return setting["labels"]

    def template(self, setting: Setting) -> str:
        return setting["text"].replace("{", "{{").replace("}", "}}")

    def kind(self, setting: Setting) -> Hashable | None:
        return setting["type"]

    def label(self, output: Any) -> int:
        raise TaskError("labelled texts have no answers; use them with data=labelled")

    def identity(self, setting: Setting) -> Hashable:
        return setting["text"]

    def _render(self, setting: Setting) -> tuple[str, dict[str, tuple[int, int]]]:
        return setting["text"], {}

    def _written(self, setting: Setting) -> str:
        """The text of a setting, by the tokenizer's own template where it is a chat."""
        text = setting["text"]
        if not isinstance(text, str):
            if not getattr(self.tokenizer, "chat_template", None):
                raise TaskError(
                    f"{setting['place']}, column '{self.text}': chat messages need a tokenizer with a chat template, "
                    "which this model's lacks; write the texts out, or take an instruction-tuned model"
                )
            try:
                text = str(self.tokenizer.apply_chat_template(text, tokenize=False))
            except (TypeError, ValueError, KeyError) as error:
                raise TaskError(f"{setting['place']}, column '{self.text}': no chat messages: {error}") from error
        for word in unknown_words(self.tokenizer, text, *encode(self.tokenizer, [text])):
            raise TaskError(
                f"{setting['place']}, column '{self.text}': {shown(word)} is not in the model's vocabulary; leave the "
                "row out, or use another word or model"
            )
        return text

    def _setting(self, row: Row) -> Setting:
        text = row.columns[self.text]
        if not isinstance(text, str | list) or not (text.strip() if isinstance(text, str) else text):
            raise TaskError(
                f"{row.place}, column '{self.text}': {shown(text)} is no text; write one, or a list of chat messages"
            )
        labels = [label for column in self.columns for label in column.labels(row)]
        kind = None if self.type is None else _type(row, self.type)
        return {"text": text, "place": row.place, "labels": labels, "type": kind}


def _tables(
    read: Callable[[str], dict[str, list[Row]]], texts: str | Mapping[str, str], group: str, column: str, seed: int
) -> dict[str, list[Row]]:
    """The rows of each split and shift: as tables or a column say, else divided."""
    if not isinstance(texts, str):
        return {split: [row for rows in read(source).values() for row in rows] for split, source in texts.items()}
    found = read(texts)
    if not set(found) <= {"", "train"}:
        return found
    rows = [row for each in found.values() for row in each]
    if not any(column in row.columns for row in rows):
        _require_columns(rows, [group])
        return {**by_group(rows, lambda row: str(row.columns[group]), SHARES, seed)}
    parted: dict[str, list[Row]] = {}
    for row in rows:
        split = row.columns.get(column)
        if not isinstance(split, str) or not split.strip():
            raise TaskError(
                f"{row.place}, column '{column}': it names no split; write train, validation, test or the name of a "
                "shift"
            )
        if not NAME.fullmatch(split.strip()):
            raise TaskError(f"{row.place}, column '{column}': {shown(split)} is no name; use letters, digits, _ and -")
        parted.setdefault(split.strip(), []).append(row)
    return parted


def _type(row: Row, column: str) -> str:
    """The type of a row's text; those without one would otherwise be a type together."""
    value = row.columns[column]
    if value is None or isinstance(value, dict | list) or not str(value).strip():
        raise TaskError(
            f"{row.place}, column '{column}': {shown(value)} is no type; write a name or a number, or leave the row out"
        )
    return str(value)


def _require_columns(rows: Sequence[Row], columns: Sequence[str]) -> None:
    for row in rows:
        require_columns(row.place, row.columns, dict.fromkeys(columns, object))


def _require_labels(row: Row, columns: Sequence[str]) -> None:
    """Refuse what is no class, of which figures could not be named."""
    for column in columns:
        value = row.columns[column]
        for each in value if isinstance(value, list) else [value]:
            plain = isinstance(each, str | int | float | None) and LABEL.fullmatch(str(each).strip())
            if not plain or not str(each).isprintable():
                raise TaskError(
                    f"{row.place}, column '{column}': {shown(each)} is no class; write a number, or a short text "
                    "without '/'"
                )


def _require_apart(settings: Mapping[str, Sequence[Setting]]) -> None:
    """Refuse a text that is in two splits, of which the later one would not be held out."""
    known: dict[str, tuple[str, str]] = {}
    for split, each in settings.items():
        for setting in each:
            former = known.setdefault(str(setting["text"]), (split, setting["place"]))
            if former[0] != split:
                raise TaskError(
                    f"{setting['place']}: its text is in {split} and, at {former[1]}, in {former[0]}, so that it is "
                    "not held out; leave one of them out"
                )


def _column(name: str, rows: Sequence[Row], positive: str | None) -> Column:
    """What a column of labels is about, by all that stands in it."""
    said = sorted({each for row in rows for each in _said(row.columns[name])})
    if not said:
        raise TaskError(f"column '{name}': no row has a label")
    if positive is not None and positive not in said and not BINARY.keys() >= set(map(str.lower, said)):
        raise TaskError(f"task.positive: no row has the label '{positive}'{nearest(positive, said)}")
    if BINARY.keys() >= set(map(str.lower, said)):
        return Column(name, ())
    listed = any(isinstance(row.columns[name], list) for row in rows)
    if positive is not None:
        return Column(name, (positive,))
    return Column(name, tuple(said) if listed or len(said) > 2 else (said[-1],))


def _said(value: Any) -> list[str]:
    """What a cell says, as texts: its class, or each of several; nothing where it is empty."""
    if value is None or (isinstance(value, float) and value != value) or (isinstance(value, str) and not value.strip()):
        return []
    return [str(each).strip() for each in value] if isinstance(value, list) else [str(value).strip()]
