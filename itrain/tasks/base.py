"""The contract of a task: a causal model, a sampler of counterfactual pairs, and a rendering for the base model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal

import torch

from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ModelInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]


Label = int | Sequence[int]
"""The class or token that stands for an output, or the tokens of an answer of several."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Input settings of a base and, for each interchanged variable, of the source that gives its value."""

    base: Setting
    sources: Mapping[str, Setting]
    isolates: bool = False
    """Whether the base asks for a variable that is not interchanged, so that its label must not change."""


class Task(ABC):
    """A question to the base model, and the variables to find in the model.

    A subclass is final and constructible without arguments. It says what is sampled, how the model sees it, and which
    class or token stands for an output. Labels, batches, splits and filters are generic.
    """

    causal_model: CausalModel
    variables: tuple[str, ...]
    """The variables that pairs interchange, and that probes read."""
    control: str | None = None
    """The variable whose values get random labels in the control tasks of probes; None: no control task."""

    @abstractmethod
    def sample(self, random: Random, split: Split) -> Pair:
        """A pair of the split; equal random states give equal pairs, in every process."""

    @abstractmethod
    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        """The settings as the base model sees them."""

    @abstractmethod
    def label(self, output: Any) -> Label:
        """The class index, token or tokens that stand for a value of the causal model's output."""

    @property
    @abstractmethod
    def outputs(self) -> Sequence[Any]:
        """The values that the output can take, in a fixed order."""

    def values(self, variable: str) -> Sequence[Any]:
        """The values of a variable, in a fixed order: the classes of a probe for it."""
        if variable in self.causal_model.inputs:
            return self.causal_model.inputs[variable]
        if variable == self.causal_model.output:
            return self.outputs
        raise ValueError(f"{type(self).__name__} does not list the values of '{variable}'")

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Take the base model's tokenizer before the first rendering; tasks without text ignore it."""


class TextTask(Task):
    """A task in text: templates with named fields, whose tokens become the spans that positions name.

    A template is a format string such as ``{name} walked because``; each field is filled with the variable of that
    name, and ``@name`` in a site means its tokens. The answer is the token, or the tokens, that follow the text.
    """

    _tokenizer: PreTrainedTokenizerBase | None = None

    @abstractmethod
    def template(self, setting: Setting) -> str:
        """The template of a setting."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise RuntimeError(
                f"{type(self).__name__} has no tokenizer yet: call task.bind(base_model.tokenizer) first"
            )
        return self._tokenizer

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if tokenizer is None:
            raise ValueError(f"{type(self).__name__} is a task in text, but the base model has no tokenizer")
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say where tokens are in the text; load the fast tokenizer"
            )
        self._tokenizer = tokenizer
        self._labels: dict[Any, Label] = {}

    def inputs(self, settings: Sequence[Setting], responses: Sequence[Sequence[int]] | None = None) -> ModelInputs:
        """The settings as prompts, each followed by a response if there are any.

        Each token of a response is predicted at the token before it, (B, A); shorter responses repeat their first such
        token. Positions and spans count the prompt's tokens.
        """
        texts, fields = zip(*(self._render(setting) for setting in settings), strict=True)
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        prompts = [start + tokens for tokens in encoded["input_ids"]]
        # Nothing is predicted at a response's last token.
        ids = [p + list(r[:-1]) for p, r in zip(prompts, responses or [()] * len(prompts), strict=True)]
        width = max(len(tokens) for tokens in ids)
        left = self.tokenizer.padding_side == "left"
        shifts = [width - len(tokens) if left else 0 for tokens in ids]
        input_ids = torch.full((len(ids), width), _padding(self.tokenizer))
        for row, (tokens, shift) in enumerate(zip(ids, shifts, strict=True)):
            input_ids[row, shift : shift + len(tokens)] = torch.tensor(tokens)
        tokens = torch.tensor([[shift, shift + len(row)] for row, shift in zip(prompts, shifts, strict=True)])
        stop = torch.tensor([shift + len(row) for row, shift in zip(ids, shifts, strict=True)])
        place = torch.arange(width)
        names = sorted(set(fields[0]).intersection(*fields[1:]))
        spans = {
            name: torch.tensor(
                [
                    [token + shift + len(start) for token in _tokens_of(field[name], offsets, text)]
                    for field, offsets, text, shift in zip(
                        fields, encoded["offset_mapping"], texts, shifts, strict=True
                    )
                ]
            )
            for name in names
        }
        mask = (place >= tokens[:, :1]) & (place < stop[:, None])
        answer = tokens[:, 1] - 1
        if responses is not None:
            ahead, count = torch.arange(max(map(len, responses))), torch.tensor([[len(r)] for r in responses])
            answer = answer[:, None] + ahead * (ahead < count)
        return ModelInputs(
            arguments={"input_ids": input_ids, "attention_mask": mask.long()},
            answer=answer,
            tokens=tokens,
            stop=None if responses is None else stop,
            spans=spans,
            texts=texts,
        )

    def label(self, output: str) -> Label:
        """The token, or the tokens, that continue a prompt with the output.

        Raises:
            ValueError: the output is not in the vocabulary, or changes how the prompt before it is split.
        """
        tokenizer = self.tokenizer
        if output not in self._labels:
            prompt, _ = self._render(self.causal_model.sample(Random(0)))
            before, after = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{prompt} {output}")
            )
            tokens = after[len(before) :]
            if after[: len(before)] != before or not tokens or tokenizer.unk_token_id in tokens:
                raise ValueError(f"the answer '{output}' is no continuation of '{prompt}' in the model's vocabulary")
            self._labels[output] = tokens[0] if len(tokens) == 1 else tuple(tokens)
        return self._labels[output]

    def _render(self, setting: Setting) -> tuple[str, dict[str, tuple[int, int]]]:
        return _fill(self.template(setting), self.causal_model.run(setting))

    def is_one_token(self, word: str) -> bool:
        """Whether the word, standing first in a text, is one token of the vocabulary."""
        tokens = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        return len(tokens) == 1 and tokens[0] != self.tokenizer.unk_token_id


def _fill(template: str, setting: Setting) -> tuple[str, dict[str, tuple[int, int]]]:
    """The text, and the range of each field in it, in characters."""
    text, fields = "", {}
    for literal, field, _, _ in Formatter().parse(template):
        text += literal
        if field is not None:
            if field not in setting:
                raise ValueError(
                    f"template '{template}': there is no variable '{field}'; there are {', '.join(setting)}"
                )
            fields[field] = (len(text), len(text) + len(str(setting[field])))
            text += str(setting[field])
    return text, fields


def _tokens_of(characters: tuple[int, int], offsets: Sequence[tuple[int, int]], text: str) -> tuple[int, int]:
    """The first token that overlaps the characters, and one past the last."""
    inside = [token for token, (start, stop) in enumerate(offsets) if start < characters[1] and stop > characters[0]]
    if not inside:
        raise ValueError(f"no token covers '{text[slice(*characters)]}' in '{text}'")
    return inside[0], inside[-1] + 1


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if isinstance(token, int))
