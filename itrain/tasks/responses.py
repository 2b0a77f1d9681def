"""Tasks with responses: prompts, and the text to learn after each."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ModelInputs
from itrain.tasks import TaskError
from itrain.tasks.base import SPLITS, Pair, Split, TextTask
from itrain.tasks.tokens import answer_tokens, continuation, fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


MARKED = re.compile(r"\{([a-z_]\w*)=([^{}]+)\}")
"""A span of a typed text: its name and its words."""


class ResponseTask(TextTask):
    """A task in text whose output is a response of any length.

    The response is the causal model's output followed by the end-of-text token. There are no variables to interchange;
    a pair is a base alone.
    """

    variables = ()
    concept: Sequence[str] = ()
    """The words that mention the concept that steering is to raise; none where responses have no concept."""

    @abstractmethod
    def settings(self, split: Split) -> Sequence[Setting]:
        """All settings of a split, in a fixed order; no two splits have the same prompt."""

    @property
    def concept_text(self) -> str:
        """The concept in words, for a judge."""
        return ", ".join(self.concept)

    def has_concept(self, setting: Setting) -> bool:
        """Whether the setting's response has the concept; others are there to tell it from them."""
        return True

    def rejected(self, setting: Setting) -> list[int] | None:
        """The tokens of a response to the same prompt without the concept, for preferences; None: there is none."""
        return None

    def instruction(self, prompt: str) -> str:
        """What a rendered prompt asks, without what a template adds to it."""
        return prompt

    @property
    def outputs(self) -> Sequence[str]:
        settings = (setting for split in SPLITS for setting in self.settings(split))
        return list(dict.fromkeys(self._output(setting) for setting in settings))

    def sample(self, random: Random, split: Split) -> Pair:
        return Pair(base=random.choice(self.settings(split)), sources={})

    @property
    def end(self) -> int:
        """The token that ends a response.

        Raises:
            ValueError: the tokenizer has none.
        """
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise ValueError(
                f"{type(self.tokenizer).__name__} has no end-of-text token to end a response; set eos_token"
            )
        return end

    @property
    def mentions(self) -> list[list[int]]:
        """The tokens of each of the concept's words, as a response begins with it and after another word.

        Raises:
            TaskError: a word is not in the vocabulary.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in self.concept:
            for form in (word, f" {word}"):
                tokens = tuple(continuation(self.tokenizer, form))
                if not tokens or self.tokenizer.unk_token_id in tokens:
                    raise TaskError(f"the concept's word {word!r} is not in the model's vocabulary; use another word")
                found[tokens] = None
        return [list(tokens) for tokens in found]

    def response(self, setting: Setting) -> list[int]:
        """The tokens of the setting's response and the one that ends it."""
        return self._ended(self._output(setting))

    def _ended(self, response: str) -> list[int]:
        label = self.label(response)
        return [*([label] if isinstance(label, int) else label), self.end]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a response, up to the token that ends it."""
        kept = list(tokens)
        return str(self.tokenizer.decode(kept[: kept.index(self.end)] if self.end in kept else kept))

    def _output(self, setting: Setting) -> str:
        return self.causal_model.run(setting)[self.causal_model.output]


class Prompts(ResponseTask):
    """Typed prompts, which have no responses. ``{name=Lisa} jumped`` is the text ``Lisa jumped`` with a span ``name``.

    Raises:
        TaskError: a span stands twice in a text, or has the name of another position.
    """

    def __init__(self, *, texts: Sequence[str] = ()) -> None:
        self.causal_model = CausalModel(inputs={"prompt": list(texts)}, mechanisms={}, output="prompt")

    def template(self, setting: Setting) -> str:
        return "{prompt}"

    def settings(self, split: Split) -> Sequence[Setting]:
        return [{"prompt": text} for text in self.causal_model.inputs["prompt"]]

    def _render(self, setting: Setting) -> tuple[str, dict[str, tuple[int, int]]]:
        marked = setting["prompt"]
        pieces = MARKED.split(marked)  # text, name, words, text, name, words, ..., text
        words = dict(zip(pieces[1::3], pieces[2::3], strict=True))
        plain = [piece.replace("{", "{{").replace("}", "}}") for piece in pieces[::3]]
        template = "".join(f"{text}{{{name}}}" for text, name in zip(plain, pieces[1::3], strict=False)) + plain[-1]
        return fill(template, words)


def typed(tokenizer: Tokenizer | None, texts: Sequence[str], continuations: Sequence[str] | None = None) -> ModelInputs:
    """Typed texts as a model is given them, each followed by its continuation if there are any.

    Raises:
        TaskError: a text has a word that is not in the vocabulary, or there is no tokenizer.
    """
    task = Prompts(texts=texts)
    task.bind(tokenizer)
    if continuations is None:
        return task.inputs(task.settings("test"))
    tokens = [
        answer_tokens(task.tokenizer, str(task.identity(setting)), after, task.separator)
        for setting, after in zip(task.settings("test"), continuations, strict=True)
    ]
    # The last token of a response is predicted and not run.
    return task.inputs(task.settings("test"), [[*each, each[-1]] for each in tokens])
