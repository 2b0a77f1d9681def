"""The contract of a task: a causal model, a sampler of counterfactual pairs, and a rendering for the base model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ModelInputs
from itrain.tasks import TaskError
from itrain.tasks.tokens import Encoded, answer_place, answer_tokens, continuation, encode, fill, spans, unknown_words
from itrain.trust import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


Label = int | Sequence[int]
"""The class or token that stands for an output, or the tokens of an answer of several."""


class Question(NamedTuple):
    """What a prompt asks of an entity."""

    entity_type: str
    attribute: str
    """The variable that is the answer."""
    prompt: str
    """Its wording, the same for all entities."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Input settings of a base and, for each interchanged variable, of the source that gives its value.

    A source may itself be an intervened run, to any depth: with ``Pair(base=b, sources={"v": Pair(base=s, sources={"w":
    t})})`` the base takes v from a run of s that has taken w from t. A source whose output is None asks nothing: values
    are read in it, and no answer.
    """

    base: Setting
    sources: Mapping[str, Setting | Pair]
    isolates: bool = False
    """Whether the base asks for a variable that is not interchanged, so that its label must not change."""
    output: Any = None
    """The counterfactual output, where the pair's author gives it; None: the causal model's."""
    place: str = field(default="", compare=False)
    """Where a listed pair stands, such as ``'f.jsonl' line 57``, for messages."""
    known: Sequence[Setting] = ()
    """Settings that nothing runs, which the base model must answer for the pair to be kept."""

    def settings(self) -> Iterator[Setting]:
        """The settings of all runs that the pair takes: the base's, then each source's with those that edit it."""
        yield self.base
        for source in self.sources.values():
            if isinstance(source, Pair):
                yield from source.settings()
            else:
                yield source


class Difference(NamedTuple):
    """By how much the logit of one output should be above that of another."""

    value: float
    more: Any
    less: Any


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
    exhaustive: bool = False
    """Whether the splits may have pairs in common, in a task of so few that none can be held out."""
    listed: Mapping[Split, Sequence[Pair]] | None = None
    """The pairs of each split, where somebody else has listed them; None: they are sampled."""
    latent: tuple[str, ...] = ()
    """The variables that decide which natural activations stand for a counterfactual run: what has their values in it
    has them in an unedited one. Empty: those that pairs interchange, and the output."""
    notes: Mapping[str, str] = MappingProxyType({})
    """What the user should be told of the task's data, as lines by name."""
    reads: ClassVar[tuple[str, ...]] = ()
    """The arguments that name files or data sets, which a saved run of somebody else does not choose."""

    @abstractmethod
    def sample(self, random: Random, split: Split) -> Pair:
        """A pair of the split; equal random states give equal pairs, in every process.

        Draw each split from settings of its own. Pairs of a later split that an earlier one has are drawn again.
        """

    def pairs(self, split: Split) -> Sequence[Pair] | None:
        """All pairs of a split in a fixed order, where somebody else has made them; None: they are sampled."""
        return None if self.listed is None else self.listed[split]

    def draw(self, random: Random, split: Split) -> Pair:
        """A pair of the split: one of those that are listed, or else a sampled one.

        Raises:
            TaskError: none is listed.
        """
        if (listed := self.pairs(split)) is None:
            return self.sample(random, split)
        if not listed:
            raise TaskError(f"{type(self).__name__} lists no {split} pairs")
        return random.choice(listed)

    def control_task(self) -> Task | None:
        """The same pairs with arbitrary labels, bound as this task is; None: there is none.

        How far an intervention moves a model between arbitrary labels says how far it would move it anywhere.
        """
        return None

    def false_task(self) -> Task | None:
        """The same inputs under a causal model that the base model need not follow, bound as this task is.

        Its pairs interchange variables of the same names, so that the same interventions can be trained. What aligns
        with it too aligns with anything. None: there is none, and arbitrary labels stand in.
        """
        return None

    def counterfactual(self, pair: Pair) -> Any:
        """The output after the interchange: the pair's own, or the causal model's."""
        if pair.output is not None:
            return pair.output
        return self.causal_model.interchange(pair.base, pair.sources)[self.causal_model.output]

    def difference(self, pair: Pair) -> Difference | None:
        """How far the logits of two outputs should lie apart after the interchange; None: nothing says it."""
        return None

    @abstractmethod
    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        """The settings as the base model sees them."""

    def told(self, settings: Sequence[Setting], answers: Sequence[Sequence[int]]) -> ModelInputs:
        """The settings as the base model sees them where it is to give these answers, each of one class or several.

        A model that goes on from its own answers takes them from here, so that each place is answered after right ones.
        """
        return self.inputs(settings)

    @abstractmethod
    def label(self, output: Any) -> Label:
        """The class or token that stands for a value of the causal model's output, or the several of a sequence."""

    @property
    @abstractmethod
    def outputs(self) -> Sequence[Any]:
        """The values that the output can take, in a fixed order; :class:`~itrain.tasks.sequences.Sequences` where they
        are too many to list."""

    def question(self, setting: Setting) -> Question | None:
        """What the setting asks, over which cause and isolate are averaged; None: they are not."""
        return None

    def values(self, variable: str) -> Sequence[Any]:
        """The values of a variable, in a fixed order: the classes of a probe for it."""
        if variable in self.causal_model.inputs:
            return self.causal_model.inputs[variable]
        if variable == self.causal_model.output:
            return self.outputs
        raise TaskError(
            f"task {type(self).__name__} does not list the values of '{variable}'; let values() return them"
        )

    def identity(self, setting: Setting) -> Hashable:
        """What tells the setting from others, as the base model sees them: the values of all inputs, as text.

        Where the model does not see all of them, or where ``repr`` does not tell them apart, give something else.
        """
        return tuple(repr(setting[variable]) for variable in self.causal_model.inputs)

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Take the base model's tokenizer before the first rendering; tasks without text ignore it."""


class TextTask(Task):
    """A task in text: templates with named fields, whose tokens become the spans that positions name.

    A template is a format string such as ``{name} walked because``; each field is filled with the variable of that
    name, and ``@name`` in a site means its tokens. The answer is the token, or the tokens, that follow the text, or
    the one in place of the tokenizer's mask.
    """

    separator: str = " "
    """What stands between a prompt that ends in no space and its answer."""
    ending: str = ""
    """What follows an answer, which tells it from longer ones that begin with it: ``" ."`` where York and York Town are
    two outputs. It is predicted with the answer."""
    _tokenizer: PreTrainedTokenizerBase | None = None

    @abstractmethod
    def template(self, setting: Setting) -> str:
        """The template of a setting."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise TaskError(f"{type(self).__name__} has no tokenizer yet: call task.bind(base_model.tokenizer) first")
        return self._tokenizer

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if tokenizer is None:
            raise TaskError(
                f"{type(self).__name__} is a task in text, but the base model has no tokenizer; take a language model, "
                "or save its tokenizer beside its weights with tokenizer.save_pretrained(folder)"
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say where tokens are in the text; load the fast tokenizer"
            )
        self._tokenizer = tokenizer
        self._labels: dict[Any, Label] = {}

    def inputs(self, settings: Sequence[Setting], responses: Sequence[Sequence[int]] | None = None) -> ModelInputs:
        """The settings as prompts, each followed by a response if there are any.

        The tokenizer adds the special tokens that it adds to any text. Positions and spans count those before the
        prompt, and the prompt's tokens. Each token of a response is predicted at the token before it, (B, A); shorter
        responses repeat their first such token. Where the prompt has the tokenizer's mask, the answer stands there.

        Raises:
            TaskError: a prompt has a word that is not in the vocabulary, or two fields are one token.
        """
        texts, fields = zip(*(self._render(setting) for setting in settings), strict=True)
        encoded = encode(self.tokenizer, texts)
        for text, each in zip(texts, encoded, strict=True):
            self._require_known(text, each)
        prompts = [[*each.before, *each.tokens] for each in encoded]
        # Nothing is predicted at a response's last token.
        ids = [
            [*prompt, *response[:-1], *each.after]
            for prompt, response, each in zip(prompts, responses or [()] * len(prompts), encoded, strict=True)
        ]
        width = max(len(tokens) for tokens in ids)
        left = self.tokenizer.padding_side == "left"
        shifts = [width - len(tokens) if left else 0 for tokens in ids]
        input_ids = torch.full((len(ids), width), _padding(self.tokenizer))
        for row, (tokens, shift) in enumerate(zip(ids, shifts, strict=True)):
            input_ids[row, shift : shift + len(tokens)] = torch.tensor(tokens)
        tokens = torch.tensor([[shift, shift + len(row)] for row, shift in zip(prompts, shifts, strict=True)])
        stop = torch.tensor([shift + len(row) for row, shift in zip(ids, shifts, strict=True)])
        place = torch.arange(width)
        mask = (place >= tokens[:, :1]) & (place < stop[:, None])
        answer = torch.tensor(shifts) + torch.tensor([answer_place(self.tokenizer, each) for each in encoded])
        if responses is not None:
            ahead, count = torch.arange(max(map(len, responses))), torch.tensor([[len(r)] for r in responses])
            answer = answer[:, None] + ahead * (ahead < count)
        return ModelInputs(
            arguments={"input_ids": input_ids, "attention_mask": mask.long()},
            answer=answer,
            tokens=tokens,
            stop=None if torch.equal(stop, tokens[:, 1]) and responses is None else stop,
            spans=_stacked(
                [
                    {
                        name: (start + shift + len(each.before), end + shift + len(each.before))
                        for name, (start, end) in spans(self.tokenizer, of, each, text).items()
                    }
                    for of, each, text, shift in zip(fields, encoded, texts, shifts, strict=True)
                ]
            ),
            texts=texts,
            characters=_characters(encoded, shifts, width),
        )

    def label(self, output: str) -> Label:
        """The token, or the tokens, that continue a prompt with the output.

        Raises:
            TaskError: the output is not in the vocabulary, or changes how the prompt before it is split.
        """
        if output not in self._labels:
            self._labels[output] = self.answer(self.causal_model.sample(Random(0)), output)
        return self._labels[output]

    def answer(self, setting: Setting, output: str) -> Label:
        """The token, or the tokens, that stand for the output after the setting's prompt, or in place of its mask."""
        prompt, _ = self._render(setting)
        (encoded,) = encode(self.tokenizer, [prompt])
        self._require_known(prompt, encoded)
        answer_place(self.tokenizer, encoded)  # which refuses a prompt without one
        tokens = answer_tokens(self.tokenizer, prompt, f"{output}{self.ending}", self.separator)
        return tokens[0] if len(tokens) == 1 else tuple(tokens)

    def spelled(self, label: Sequence[int]) -> str:
        """What a label stands for, as the lines of a run show it."""
        return " | ".join(self.tokenizer.convert_ids_to_tokens(list(label)))

    def instruction(self, variable: str) -> str:
        """The words that tell a training which variable to find: its name, unless a task has better ones."""
        return variable.replace("_", " ")

    def identity(self, setting: Setting) -> Hashable:
        return self._render(setting)[0]

    def _render(self, setting: Setting) -> tuple[str, dict[str, tuple[int, int]]]:
        return fill(self.template(setting), self.causal_model.run(setting))

    def _require_known(self, text: str, encoded: Encoded) -> None:
        for word in unknown_words(self.tokenizer, text, encoded):
            raise TaskError(
                f"the prompt {shown(text)} has {shown(word)}, which is not in the model's vocabulary; use another word "
                "or model"
            )

    def is_one_token(self, word: str, *, follows: bool = False) -> bool:
        """Whether the word is one token of the vocabulary, first in a text or where it ``follows`` another word."""
        tokens = self._tokens(word, follows=follows)
        return len(tokens) == 1 and tokens[0] != self.tokenizer.unk_token_id

    def is_known(self, word: str) -> bool:
        """Whether the vocabulary has tokens for the word, however many."""
        tokens = self._tokens(word, follows=True)
        return bool(tokens) and self.tokenizer.unk_token_id not in tokens

    def _tokens(self, word: str, *, follows: bool) -> Sequence[int]:
        if follows:
            return continuation(self.tokenizer, f" {word}")
        return self.tokenizer(word, add_special_tokens=False)["input_ids"]


class ListedTask(TextTask):
    """A task in text whose pairs are listed: somebody else has made them, with their answers and their splits.

    A setting has the prompt's text, the answer and whatever else a row says of its run, each as an input of a causal
    model without mechanisms; each pair has its counterfactual output. Positions come from a setting's ``spans``, if it
    has some: ``{name: (first character of the prompt, one past the last)}``, as
    :func:`~itrain.tasks.spans.all_characters` finds them.
    """

    def template(self, setting: Setting) -> str:
        return setting["prompt"].replace("{", "{{").replace("}", "}}")

    def _render(self, setting: Setting) -> tuple[str, dict[str, tuple[int, int]]]:
        return setting["prompt"], dict(setting.get("spans", {}))

    @abstractmethod
    def pairs(self, split: Split) -> Sequence[Pair]: ...

    def sample(self, random: Random, split: Split) -> Pair:
        return self.draw(random, split)


class ClassTask(TextTask):
    """A task in text whose answer is a class of the whole text, as a pooled head gives it: the output's place."""

    def inputs(self, settings: Sequence[Setting], responses: Sequence[Sequence[int]] | None = None) -> ModelInputs:
        return replace(super().inputs(settings), answer=None)

    def label(self, output: Any) -> int:
        return list(self.outputs).index(output)

    def spelled(self, label: Sequence[int]) -> str:
        return str(self.outputs[label[0]])


def _stacked(rows: Sequence[Mapping[str, tuple[int, int]]]) -> dict[str, Int[Tensor, "batch 2"]]:
    """The spans that all rows have."""
    names = sorted(set(rows[0]).intersection(*rows[1:]))
    return {name: torch.tensor([row[name] for row in rows]) for name in names}


def _characters(encoded: Sequence[Encoded], shifts: Sequence[int], width: int) -> Int[Tensor, "batch width 2"]:
    """The characters of each token, in rows whose texts are moved to the right."""
    found = torch.zeros(len(encoded), width, 2, dtype=torch.int32)
    for row, each, shift in zip(found, encoded, shifts, strict=True):
        start = shift + len(each.before)
        row[start : start + len(each.offsets)] = torch.tensor(each.offsets, dtype=torch.int32).view(-1, 2)
    return found


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if isinstance(token, int))
