"""Instructions: prompts and responses from a file or a data set."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter
from string import Formatter
from typing import ClassVar

from itrain.causal_model import CausalModel, Setting
from itrain.tasks import TaskError
from itrain.tasks.base import SPLITS, Split
from itrain.tasks.dividing import by_group
from itrain.tasks.responses import ResponseTask
from itrain.tasks.rows import SPLIT_NAMES, Row, all_made, read_groups
from itrain.tasks.tokens import continuation, encode, unknown_words

SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
"""The part of the shuffled prompts that each split has, where no splits are given."""


class Instructions(ResponseTask):
    """Rows of a table or a Hugging Face data set, each formatted as a prompt and its response.

    Prompt and response are tokenized separately: a space or a line break between them belongs to one of the two
    formats, and a space that the tokenizer puts before every text is left out of the response. In a site, ``@prompt``
    means all tokens of the prompt.

    Args:
        file: a .jsonl, .json, .csv, .tsv or .parquet file, divided among the splits; or one file per split.
        dataset: a data set's name on the hub, or a folder. Splits named train, validation and test are used as they
            are; a data set with train alone is divided.
        prompt, response: format strings of the columns.
        concept: the words by which responses mention a concept, which training=steering counts; capital letters differ.
        split_seed: shuffles the different prompts before they are divided.

    Raises:
        ValueError: neither or both of file and data set are given, or a split is missing.
        TaskError: a file is missing or a line of it is no row, a column is missing, or a prompt or response is empty;
            the message names file, line and remedy.
    """

    reads: ClassVar[tuple[str, ...]] = ("file", "dataset")

    def __init__(
        self,
        *,
        file: str | Mapping[str, str] | None = None,
        dataset: str | None = None,
        prompt: str = "{prompt}",
        response: str = "{response}",
        concept: Sequence[str] = (),
        split_seed: int = 0,
    ) -> None:
        if (file is None) == (dataset is None):
            raise ValueError("instructions come from one place: set task.file=<.jsonl> or task.dataset=<name>")
        self.concept = concept
        self.formats = {"prompt": prompt, "response": response}
        rows = {split: all_made(each, self._written) for split, each in _read(file, dataset).items()}
        self._settings = (
            by_group(rows["train"], itemgetter("prompt"), SHARES, split_seed) if list(rows) == ["train"] else rows
        )
        every = [setting for split in self._settings.values() for setting in split]
        self.causal_model = CausalModel(
            inputs={name: [setting[name] for setting in every] for name in self.formats},
            mechanisms={},
            output="response",
        )

    def template(self, setting: Setting) -> str:
        return "{prompt}"

    def settings(self, split: Split) -> Sequence[Setting]:
        return self._settings[split]

    def label(self, output: str) -> Sequence[int]:
        for word in unknown_words(self.tokenizer, output, *encode(self.tokenizer, [output])):
            raise TaskError(
                f"the response {output!r} has words that are not in the model's vocabulary: {word!r}; leave its row out"
            )
        return continuation(self.tokenizer, output)

    def _written(self, row: Row) -> Setting:
        setting = {}
        for name, text in self.formats.items():
            for _, column, _, _ in Formatter().parse(text):
                if column is not None and column not in row.columns:
                    raise TaskError(
                        f"{row.place}: there is no column '{column}', which task.{name} asks for; it has "
                        f"{', '.join(row.columns)}"
                    )
                if column is not None and row.columns[column] is None:
                    raise TaskError(f"{row.place}: '{column}' has no value, which task.{name} asks for")
            setting[name] = text.format_map(row.columns)
            if not setting[name].strip():
                raise TaskError(f"{row.place}: the {name} is empty; leave the row out, or write another task.{name}")
        return setting


def _read(file: str | Mapping[str, str] | None, dataset: str | None) -> dict[Split, list[Row]]:
    """The rows of each split, or those of train alone where they are to be divided."""
    if file is not None and not isinstance(file, str):
        _require_splits(file, "task.file")
        return {split: read_groups(file[split])[""] for split in SPLITS}
    if file is not None:
        return {"train": read_groups(file)[""]}
    assert dataset is not None, "one of the two is given"
    found = read_groups(dataset)
    rows: dict[Split, list[Row]] = {split: found[name] for name, split in SPLIT_NAMES.items() if name in found}
    if list(rows) != ["train"]:
        _require_splits(rows, f"data set '{dataset}'")
    return rows


def _require_splits(given: Collection[str], place: str) -> None:
    if sorted(given) != sorted(SPLITS):
        has, wanted = ", ".join(sorted(given)) or "no splits", ", ".join(SPLITS)
        raise ValueError(f"{place}: it has {has}; {wanted} are needed, or one to divide")
