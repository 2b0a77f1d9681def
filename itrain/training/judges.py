"""Judges of steered text: whether it has the concept, follows the instruction, and reads well."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

from itrain.trust import shown

TOP = 2.0
"""The highest score of an aspect."""


class JudgeError(ValueError):
    """A judge failed, or gave something else than a score of each aspect for each continuation."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a judge is given of a generation.

    Args:
        concept: what the continuation is steered towards, in words.
        words: the words that mention the concept, where the task names some.
        instruction: the prompt that is continued.
        text: the continuation.
        unsteered: the continuation of the same prompt by the untouched model.
        perplexity: of the continuation, under the untouched model.
        unsteered_perplexity: the same of the unsteered one.
    """

    concept: str
    words: Sequence[str]
    instruction: str
    text: str
    unsteered: str
    perplexity: float
    unsteered_perplexity: float


class Verdict(NamedTuple):
    """A judge's scores of a continuation, each from 0 to 2."""

    concept: float
    """0: the concept is absent, 1: it is there but slight or awkward, 2: it is there in full."""
    instruct: float
    """0: the text has nothing to do with the instruction, 1: little, 2: much."""
    fluency: float
    """0: the text cannot be read, 1: it has errors, 2: it is fluent."""


class Judge(ABC):
    """Scores continuations, a batch at a time.

    A subclass may ask a model. Its constructor takes keyword arguments alone, so that a configuration can name it:
    ``training.judge={_target_: my_package.MyJudge, ...}``.
    """

    @property
    def name(self) -> str:
        """What results call the judge: its class and, where they matter, its settings."""
        return type(self).__name__

    def check(self) -> None:
        """Asked before a run: raise where the judge cannot work, for example because a server does not answer."""

    @abstractmethod
    def judge(self, continuations: Sequence[Continuation]) -> Sequence[Verdict]:
        """The scores of each continuation, in order."""


def verdicts(judge: Judge, continuations: Sequence[Continuation]) -> list[Verdict]:
    """What the judge says of the continuations.

    Raises:
        JudgeError: it fails, or what it says is no score of each aspect for each continuation.
    """
    try:
        given: Any = judge.judge(continuations)
    except Exception as error:
        raise _failure(judge, error) from error
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(continuations):
        what = f"{len(given)} verdicts" if isinstance(given, Sequence) else f"a {type(given).__name__}"
        raise JudgeError(f"judge {judge.name} gives {what} for {len(continuations)} continuations; give one for each")
    return [_checked(judge, each, of) for each, of in zip(given, continuations, strict=True)]


def require_ready(judge: Judge) -> None:
    """Refuse a judge that cannot work.

    Raises:
        JudgeError: it is none, or says that it cannot.
    """
    if not isinstance(judge, Judge):
        raise JudgeError(
            f"judge: {type(judge).__name__} is none; give an instance of a subclass of {Judge.__module__}.Judge"
        )
    try:
        judge.check()
    except Exception as error:
        raise _failure(judge, error) from error


def _failure(judge: Judge, error: Exception) -> JudgeError:
    return JudgeError(f"judge {judge.name} fails: {type(error).__name__}: {' '.join(str(error).split())}")


def _checked(judge: Judge, given: Any, of: Continuation) -> Verdict:
    scores = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    numbers = [each for each in scores if isinstance(each, int | float) and isfinite(each) and 0 <= each <= TOP]
    if len(scores) != len(Verdict._fields) or len(numbers) != len(scores):
        raise JudgeError(
            f"judge {judge.name} gives {shown(str(given))} for the continuation {shown(of.text)} of "
            f"{shown(of.instruction)}; give Verdict(concept, instruct, fluency), each from 0 to {TOP:g}"
        )
    return Verdict(*map(float, numbers))


class WordJudge(Judge):
    """Scores without a model: by the concept's words, words of the unsteered answer, and perplexity.

    Words are compared without case. A score is 2 from the second bound of its aspect on, 1 from the first, else 0.

    Args:
        concept: bounds of the share of the continuation's words that mention the concept. The first is exceeded.
        instruct: bounds of the share of the other words that the instruction or the unsteered answer has.
        fluency: bounds of the perplexity as a ratio to that of the unsteered answer, from above: 1 up to the first, 2
            up to the second.

    Raises:
        ValueError: bounds are not in order.
    """

    def __init__(
        self,
        *,
        concept: tuple[float, float] = (0.0, 0.02),
        instruct: tuple[float, float] = (0.1, 0.3),
        fluency: tuple[float, float] = (4.0, 2.0),
    ) -> None:
        for name, (first, second) in {"concept": concept, "instruct": instruct, "fluency": fluency[::-1]}.items():
            if not 0 <= first <= second:
                raise ValueError(f"{name}: the bounds of the scores 1 and 2 are not in order; give two, 0 or more")
        self.concept, self.instruct, self.fluency = concept, instruct, fluency

    @property
    def name(self) -> str:
        bounds: Mapping[str, tuple[float, float]] = vars(self)
        return f"WordJudge({', '.join(f'{name}={one:g}:{two:g}' for name, (one, two) in bounds.items())})"

    def judge(self, continuations: Sequence[Continuation]) -> list[Verdict]:
        return [self._of(each) for each in continuations]

    def _of(self, each: Continuation) -> Verdict:
        if not each.words:
            raise ValueError("the task names no word that mentions the concept; set task.concept or task.words")
        said = _words(each.text)
        at = _mentions(said, [_words(word) for word in each.words])
        others = [word for place, word in enumerate(said) if place not in at]
        known = {*_words(each.instruction), *_words(each.unsteered)}
        mentioned = len(at) / max(len(said), 1)
        related = sum(word in known for word in others) / max(len(others), 1)
        ratio = each.perplexity / each.unsteered_perplexity
        return Verdict(
            concept=float((mentioned > self.concept[0]) + (mentioned > 0 and mentioned >= self.concept[1])),
            instruct=float(sum(related >= bound for bound in self.instruct)),
            fluency=float(sum(ratio <= bound for bound in self.fluency)),
        )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _mentions(said: Sequence[str], words: Sequence[Sequence[str]]) -> set[int]:
    """The places of the text's words that belong to a mention."""
    return {
        start + offset
        for word in words
        for start in range(len(said) - len(word) + 1)
        if word and list(said[start : start + len(word)]) == list(word)
        for offset in range(len(word))
    }
