"""AxBench's concept data: instructions with responses that have a concept, and others, to detect it and to steer."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from random import Random
from types import NoneType
from typing import Any, ClassVar, NamedTuple

from itrain import tiny_world
from itrain.causal_model import CausalModel, Setting
from itrain.tasks import TaskError
from itrain.tasks.base import SPLITS, Split
from itrain.tasks.labelled import LabelledTask
from itrain.tasks.responses import ResponseTask
from itrain.tasks.rows import READERS, Row, read_rows
from itrain.tasks.schema import require_columns
from itrain.tasks.tokens import continuation, encode, unknown_words
from itrain.trust import shown

COLUMNS = {
    **dict.fromkeys(("input", "output", "output_concept", "concept_genre", "category"), (str, NoneType)),
    "concept_id": (int, float, NoneType),
}
"""The columns of a row, with their types."""
POSITIVE, NEGATIVE, HARD = "positive", "negative", "hard negative"
CATEGORIES, SHIFT = (POSITIVE, NEGATIVE, HARD), "hard_negatives"
PART = "2b/l10"
"""The part of AxBench's data that is read, where nothing else is said."""
NO_CONCEPT = -1
"""The concept_id of training responses without any concept, which all concepts of their genre share."""
FILES: Mapping[str, tuple[str, ...]] = {
    "train": ("train/data", "generate/train_data", "train_data"),
    "test": ("test/data", "inference/latent_eval_data", "latent_eval_data"),
}
"""Where a folder has the rows of each split: as on the hub, and as AxBench's programs write them."""
VALIDATION = 0.2
"""The share of the training instructions on which detection chooses."""
_GENERAL = """
the and for with that this from are was were its not but has have had all any can into onto over under than
then also such other others some which while where when who whom whose what how about between within without references
reference mentions mention terms term words word phrases phrase related relating specific various certain particular
different expressions expression instances instance concepts concept elements element contexts context indicating
indicate associated involving including
"""
GENERAL = frozenset(_GENERAL.split())
"""Words of a concept's description that are not the concept's own."""


class Concept(NamedTuple):
    """The rows of one concept."""

    number: int
    text: str
    train: Sequence[Row]
    """Responses with the concept, then those of its genre without any."""
    test: Sequence[Row]
    """Responses with the concept, without it, and with another sense of one of its words, to other instructions."""

    @property
    def words(self) -> list[str]:
        """The words of the description that are the concept's own."""
        found = re.findall(r"[^\W\d_]+", self.text.lower())
        return list(dict.fromkeys(word for word in found if len(word) > 2 and word not in GENERAL))


def read_concept(source: str | None, *, part: str, concept: int | str, revision: str | None = None) -> Concept:
    """The rows of a concept; of no source, one of the concepts of the tiny world.

    Args:
        source: a folder, or a data set's name on the hub.
        part: the folder in it, which names a model and a layer, for example ``2b/l10``.
        concept: its number or its description.
        revision: of a data set on the hub.

    Raises:
        TaskError: a file, a column, the concept, or its rows of a category are missing.
    """
    if source is None and part != PART:
        raise TaskError(f"part={shown(part)} is of AxBench's data; set task.source=<folder or name>, or leave it out")
    if revision is not None and (source is None or Path(source).expanduser().exists()):
        raise TaskError(f"revision={shown(revision)} is of a data set on the hub; set task.source, or leave it out")
    rows = _embedded() if source is None else _read(source, part, revision)
    for row in (row for each in rows.values() for row in each):
        require_columns(row.place, row.columns, COLUMNS)
    named: dict[int, str] = {
        row.columns["concept_id"]: row.columns["output_concept"]
        for row in rows["train"]
        if row.columns["category"] == POSITIVE and row.columns["output_concept"]
    }
    chosen = [number for number, text in named.items() if concept in (number, str(number), text)]
    if not chosen:
        listed = ", ".join(f"{number} ({shown(text)})" for number, text in list(named.items())[:5])
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        raise TaskError(f"concept: there is no {shown(concept)} in the training rows; they have {listed}{more}")
    number = chosen[0]
    train = [row for row in rows["train"] if _is(row, number, POSITIVE)]
    genres = {row.columns["concept_genre"] for row in train}
    train += [row for row in rows["train"] if _is(row, NO_CONCEPT, NEGATIVE) and row.columns["concept_genre"] in genres]
    known = {row.columns["input"] for row in train}
    test = [row for row in rows["test"] if row.columns["concept_id"] == number and row.columns["input"] not in known]
    for category in (POSITIVE, NEGATIVE):
        if not any(row.columns["category"] == category for row in test):
            raise TaskError(
                f"concept {number} ({shown(named[number])}) has no {category} test rows; give both files of one part"
            )
    return Concept(number, named[number], train, test)


class AxBench(ResponseTask):
    """One of AxBench's concepts to steer towards: instructions, and responses that have it.

    The model learns from the training responses. The strength is chosen on the validation instructions, the first half
    of those that are held out, and scored on the test instructions, the other half. Held-out instructions are those of
    the concept's test file, without any that training has, or of a file such as AlpacaEval's.

    Wu et al. 2025, "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders".

    Args:
        source: a folder with the data, or ``pyvene/axbench-concept500``; None: concepts of the embedded model's world.
        part: the folder in it, which names a model and a layer.
        concept: its number or its description.
        words: those that mention the concept; None: those of its description.
        negatives: train on responses without any concept too, which directions between the two need.
        instructions: a file whose rows have an ``instruction`` and an ``output``; None: the test file's.
        examples: how many instructions are held out, drawn by the concept's number; None: all.
        chat: write prompts by the tokenizer's chat template.
        max_tokens: a response of as many tokens is one that was cut off, and does not end.
        revision: of a data set on the hub.

    Raises:
        TaskError: the data are not there or not in AxBench's schema, naming row and column.
    """

    reads: ClassVar[tuple[str, ...]] = ("source", "instructions")

    def __init__(
        self,
        *,
        source: str | None = None,
        part: str = PART,
        concept: int | str = 0,
        words: Sequence[str] | None = None,
        negatives: bool = True,
        instructions: str | None = None,
        examples: int | None = None,
        chat: bool = False,
        max_tokens: int = 128,
        revision: str | None = None,
    ) -> None:
        found = read_concept(source, part=part, concept=concept, revision=revision)
        self.chat, self.max_tokens, self._text = chat, max_tokens, found.text
        self.concept = found.words if words is None else list(words)
        train = [_setting(row) for row in found.train if negatives or row.columns["category"] == POSITIVE]
        held_out = _held_out(found, instructions, {setting["prompt"] for setting in train})
        if examples is not None:
            if not 2 <= examples <= len(held_out):
                raise TaskError(f"examples={examples}: {len(held_out)} instructions are held out; ask for 2 or more")
            held_out = Random(found.number).sample(held_out, examples)
        half = len(held_out) - round(len(held_out) / 2)
        self._settings: dict[Split, list[Setting]] = {
            "train": train,
            "validation": held_out[:half],
            "test": held_out[half:],
        }
        every = [setting for split in self._settings.values() for setting in split]
        self.causal_model = CausalModel(
            inputs={name: [setting[name] for setting in every] for name in ("prompt", "response", "has_concept")},
            mechanisms={},
            output="response",
        )
        self._asked: dict[str, str] = {}

    @property
    def concept_text(self) -> str:
        return self._text

    @property
    def end(self) -> int:
        """The token that ends a response: that of the model's turn in a chat."""
        if not self.chat:
            return super().end
        written = chat_text(self.tokenizer, "?", "!")
        after = self.tokenizer(written[written.rindex("!") + 1 :], add_special_tokens=False)["input_ids"]
        return after[0] if after else super().end

    def template(self, setting: Setting) -> str:
        return "{prompt}"

    def settings(self, split: Split) -> Sequence[Setting]:
        return self._settings[split]

    @property
    def mentions(self) -> list[list[int]]:
        """The tokens of each of the concept's words, and of those that the vocabulary has with a capital letter."""
        found = super().mentions
        for word in self.concept:
            for form in (word.capitalize(), f" {word.capitalize()}"):
                tokens = continuation(self.tokenizer, form)
                if tokens not in found and self.tokenizer.unk_token_id not in tokens:
                    found.append(tokens)
        return found

    def has_concept(self, setting: Setting) -> bool:
        return bool(setting["has_concept"])

    def label(self, output: str) -> Sequence[int]:
        require_known(self, output, "response")
        return continuation(self.tokenizer, output)

    def response(self, setting: Setting) -> list[int]:
        whole = super().response(setting)
        return whole if len(whole) <= self.max_tokens else whole[: self.max_tokens]

    def instruction(self, prompt: str) -> str:
        if not self._asked:
            every = [setting for split in SPLITS for setting in self._settings[split]]
            self._asked = {self._render(setting)[0]: setting["prompt"] for setting in every}
        return self._asked.get(prompt, prompt)

    def _render(self, setting: Setting) -> tuple[str, dict[str, tuple[int, int]]]:
        asked = setting["prompt"]
        text = chat_text(self.tokenizer, asked) if self.chat else asked
        start = text.find(asked.strip())
        return text, {"prompt": (start, start + len(asked.strip()))} if start >= 0 else {}


class AxBenchTexts(LabelledTask):
    """The texts of one of AxBench's concepts: an instruction with its response each, which has the concept or not.

    Training and validation have responses with the concept, and those of its genre without any; a share of the training
    instructions is for validation. The test has the concept's test responses with it and without; the shift
    ``hard_negatives`` has those with it, and those with another sense of one of its words.

    Args:
        source, part, concept, chat, revision: as in :class:`AxBench`.
        split_seed: draws the training instructions that are for validation.

    Raises:
        TaskError: as :class:`AxBench`, or no training responses are without the concept.
    """

    reads: ClassVar[tuple[str, ...]] = ("source",)

    def __init__(
        self,
        *,
        source: str | None = None,
        part: str = PART,
        concept: int | str = 0,
        chat: bool = False,
        revision: str | None = None,
        split_seed: int = 0,
    ) -> None:
        found = read_concept(source, part=part, concept=concept, revision=revision)
        self.chat, self.concepts = chat, (found.text,)
        rows: dict[str, list[Row]] = _parted(found.train, split_seed)
        of = {category: [row for row in found.test if row.columns["category"] == category] for category in CATEGORIES}
        rows["test"] = [*of[POSITIVE], *of[NEGATIVE]]
        if of[HARD]:
            rows[SHIFT] = [*of[POSITIVE], *of[HARD]]
        self.shifts = [name for name in rows if name == SHIFT]
        self._settings = {name: [_setting(row) for row in each] for name, each in rows.items()}
        every = [setting for each in self._settings.values() for setting in each]
        self.causal_model = CausalModel(
            inputs={name: [setting[name] for setting in every] for name in ("prompt", "response", "has_concept")},
            mechanisms={},
            output="has_concept",
        )

    def settings(self, split: str) -> Sequence[Setting]:
        return self._settings.get(split, ())

    def labels(self, setting: Setting) -> Sequence[int]:
        return [int(setting["has_concept"])]

    def template(self, setting: Setting) -> str:
        return "{prompt}" + self.separator + "{response}"

    def label(self, output: Any) -> int:
        raise TaskError("concept texts have no answers; use them with data=labelled, or steer with task=axbench")

    def _render(self, setting: Setting) -> tuple[str, dict[str, tuple[int, int]]]:
        if not self.chat:
            return super()._render(setting)
        return chat_text(self.tokenizer, setting["prompt"], setting["response"]), {}


def chat_text(tokenizer: Any, instruction: str, response: str | None = None) -> str:
    """An instruction as the tokenizer's chat template writes it, with its response or ready for one.

    Raises:
        TaskError: the tokenizer has no template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TaskError(
            "chat=true needs a tokenizer with a chat template; leave it out, or take an instruction-tuned model"
        )
    messages = [{"role": "user", "content": instruction}]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=response is None))


def require_known(task: Any, text: str, what: str) -> None:
    """Refuse a text with words that the model does not have."""
    for word in unknown_words(task.tokenizer, text, *encode(task.tokenizer, [text])):
        raise TaskError(
            f"the {what} {shown(text)} has {shown(word)}, which is not in the model's vocabulary; leave its row out"
        )


def _setting(row: Row) -> Setting:
    texts = {"prompt": row.columns["input"], "response": row.columns["output"]}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            column = "input" if name == "prompt" else "output"
            raise TaskError(f"{row.place}, column '{column}': {shown(text)} is no text; leave the row out")
    return {**texts, "has_concept": row.columns.get("category", POSITIVE) == POSITIVE}


def _held_out(found: Concept, instructions: str | None, known: set[Hashable]) -> list[Setting]:
    """Different instructions with responses, none of which training has."""
    if instructions is None:
        rows = [row for row in found.test if row.columns["category"] == POSITIVE]
    else:
        rows = []
        for row in (row for each in read_rows(instructions).values() for row in each):
            require_columns(row.place, row.columns, {"instruction": str, "output": str})
            asked = {"input": row.columns["instruction"], "output": row.columns["output"]}
            rows.append(Row(row.place, asked))
    settings = {setting["prompt"]: setting for setting in map(_setting, rows) if setting["prompt"] not in known}
    if len(settings) < 2:
        raise TaskError(
            f"concept {found.number} ({shown(found.text)}) has {len(settings)} held-out instructions; give two or more"
        )
    return list(settings.values())


def _parted(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """The training rows, and those for validation, which share no instruction."""
    asked = sorted({row.columns["input"] for row in rows})
    kept = set(Random(seed).sample(asked, round(VALIDATION * len(asked))))
    parts: dict[str, list[Row]] = {"train": [], "validation": []}
    for row in rows:
        parts["validation" if row.columns["input"] in kept else "train"].append(row)
    return parts


def _is(row: Row, number: int, category: str) -> bool:
    return row.columns["concept_id"] == number and row.columns["category"] == category


def _embedded() -> dict[str, list[Row]]:
    return {
        split: [Row(f"embedded concepts, {split} row {number}", row) for number, row in enumerate(rows)]
        for split, rows in tiny_world.concept_rows().items()
    }


def _read(source: str, part: str, revision: str | None) -> dict[str, list[Row]]:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        found = {split: read_rows(source, revision=revision, part=f"{part}/{split}") for split in FILES}
        return {split: [row for rows in each.values() for row in rows] for split, each in found.items()}
    return {split: _file(folder, part, split) for split in FILES}


def _file(folder: Path, part: str, split: str) -> list[Row]:
    tried = [
        home / f"{name}{ending}" for home in (folder / part, folder) for name in FILES[split] for ending in READERS
    ]
    file = next((file for file in tried if file.is_file()), None)
    if file is None:
        raise TaskError(
            f"'{folder}' has no {split} rows of part '{part}': there is no {part}/{FILES[split][0]}.parquet and no "
            f"{FILES[split][1]}.parquet; set task.part, or give AxBench's own folder"
        )
    return [row for rows in read_rows(str(file)).values() for row in rows]
