"""Instructions: prompts and responses from a file or a data set."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from string import Formatter
from typing import Any, get_args

from itrain.causal_model import CausalModel, Setting
from itrain.tasks import TaskError
from itrain.tasks.base import Split
from itrain.tasks.responses import ResponseTask
from itrain.tasks.tokens import continuation, encode, unknown_words

SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
"""The part of the shuffled prompts that each split has, where no splits are given."""

Row = tuple[str, Mapping[str, Any]]
"""The place of a row, for messages, and its columns."""


class Instructions(ResponseTask):
    """Rows of a JSONL file or a Hugging Face data set, each formatted as a prompt and its response.

    Prompt and response are tokenized separately: a space or a line break between them belongs to one of the two
    formats, and a space that the tokenizer puts before every text is left out of the response. In a site, ``@prompt``
    means all tokens of the prompt.

    Args:
        file: a JSONL file, one object per line, divided among the splits; or one file per split.
        dataset: a data set's name on the hub, or a folder. Splits named train, validation and test are used as they
            are; a data set with train alone is divided.
        prompt, response: format strings of the columns.
        concept: the words by which responses mention a concept, which training=steering counts; capital letters differ.
        split_seed: shuffles the different prompts before they are divided.

    Raises:
        ValueError: neither or both of file and data set are given, a file or split is missing, a line is not an object,
            a column is missing, or a prompt or response is empty; the message names file, line and remedy.
    """

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
        sources = _dataset(dataset) if dataset is not None else _files(file or {})
        rows = {split: [self._written(*row) for row in each] for split, each in sources.items()}
        self._settings = _divided(rows["train"], split_seed) if list(rows) == ["train"] else rows
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

    def _written(self, place: str, row: Mapping[str, Any]) -> Setting:
        setting = {}
        for name, text in self.formats.items():
            for _, column, _, _ in Formatter().parse(text):
                if column is not None and column not in row:
                    raise ValueError(
                        f"{place}: there is no column '{column}', which task.{name} asks for; it has {', '.join(row)}"
                    )
            setting[name] = text.format_map(row)
            if not setting[name].strip():
                raise ValueError(f"{place}: the {name} is empty; leave the row out, or write another task.{name}")
        return setting


def _files(file: str | Mapping[str, str]) -> dict[Split, list[Row]]:
    if isinstance(file, str):
        return {"train": list(_lines(file))}
    _require_splits(file, "task.file")
    return {split: list(_lines(file[split])) for split in get_args(Split)}


def _lines(file: str) -> Iterator[Row]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"task.file: there is no file '{file}'")
    # Not splitlines(), which ends lines at some characters that JSON strings may hold.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        place = f"'{file}' line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is not JSON ({error.msg}); a JSONL file has one object in a line") from error
        if not isinstance(row, dict):
            raise ValueError(f'{place} is not an object; write it as {{"prompt": ..., "response": ...}}')
        yield place, row


def _dataset(name: str) -> dict[Split, list[Row]]:
    from datasets import load_dataset

    data: Mapping[str, Any] = load_dataset(name)  # type: ignore[assignment]
    splits: list[Split] = [split for split in get_args(Split) if split in data]
    if splits != ["train"]:
        _require_splits(splits, f"data set '{name}'")
    return {
        split: [(f"data set '{name}', {split} row {number}", row) for number, row in enumerate(data[split])]
        for split in splits
    }


def _require_splits(given: Collection[str], place: str) -> None:
    if sorted(given) != sorted(get_args(Split)):
        has, wanted = ", ".join(sorted(given)) or "no splits", ", ".join(get_args(Split))
        raise ValueError(f"{place}: it has {has}; {wanted} are needed, or one to divide")


def _divided(settings: Sequence[Setting], seed: int) -> dict[Split, list[Setting]]:
    """Rows with the same prompt go to the same split."""
    prompts = sorted({setting["prompt"] for setting in settings})
    place = {prompt: number / len(prompts) for number, prompt in enumerate(Random(seed).sample(prompts, len(prompts)))}
    return {
        split: [setting for setting in settings if start <= place[setting["prompt"]] < stop]
        for split, (start, stop) in SHARES.items()
    }
