"""Judgements: a judge's scores of each continuation, kept so that figures can be worked out and judged again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, distributed

from itrain.files import write_text
from itrain.metrics import ASPECTS, SteeringScore, WinRate, best_factor, overall_score
from itrain.training.judges import TOP, Continuation, Judge, Verdict, verdicts
from itrain.trust import shown

FILE = "judgements.jsonl"
SCORE, STEERED = "steering_score", "strength_"
"""The figure of a place, beside one for each aspect, and what the names of the steered places begin with."""
_PERPLEXITIES = ("perplexity", "unsteered_perplexity")
MOST = 1e300
"""What stands in a file for a perplexity that is not finite."""


class JudgementError(ValueError):
    """A file of judgements cannot be read, or does not fit what it is compared with."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A continuation with its scores.

    Args:
        split: ``validation``, on which the strength is chosen, or ``test``.
        place: how it was steered: ``unsteered``, ``strength_0.5`` or ``random_vector/strength_0.5``.
        example: tells the prompts of a split apart.
        continuation: what the judge was given.
        verdict: the scores.
        judge: who gave them.
    """

    split: str
    place: str
    example: int
    continuation: Continuation
    verdict: Verdict
    judge: str

    @property
    def overall(self) -> float:
        return float(overall_score(torch.tensor(self.verdict, dtype=torch.float64)))

    def row(self) -> dict[str, Any]:
        """The judgement as a line of a file."""
        given = asdict(self.continuation)
        for name in ("perplexity", "unsteered_perplexity"):
            given[name] = given[name] if isfinite(given[name]) else MOST
        scores = {f"{name}_score": score for name, score in self.verdict._asdict().items()}
        own = {"split": self.split, "place": self.place, "example": self.example}
        return {**own, **given, "judge": self.judge, **scores, SCORE: self.overall}


class Judged:
    """The judgements of the continuations of a split, by place, with their mean scores.

    Args:
        judge: scores them.
        split: which.
        concept: what is steered towards, in words.
        words: those that mention it.
    """

    def __init__(self, judge: Judge, *, split: str, concept: str, words: Sequence[str]) -> None:
        self.judge, self.split, self.concept, self.words = judge, split, concept, list(words)
        self.scores: dict[str, SteeringScore] = {}
        self.found: list[Judgement] = []
        self._unsteered: dict[int, tuple[str, float]] = {}

    def add(
        self,
        place: str,
        keys: Int[Tensor, " batch"],
        instructions: Sequence[str],
        texts: Sequence[str],
        losses: Sequence[float],
    ) -> None:
        """Judge a batch of a place, the unsteered ones first.

        Args:
            place: how they were steered.
            keys: tell the prompts apart.
            instructions, texts: the prompts and their continuations.
            losses: the mean of -log p over each continuation's tokens, under the untouched model.
        """
        perplexities = torch.tensor(losses, dtype=torch.float64).exp().tolist()
        at = keys.tolist()
        if place == "unsteered":
            self._unsteered |= dict(zip(at, zip(texts, perplexities, strict=True), strict=True))
        given = []
        for key, instruction, text, perplexity in zip(at, instructions, texts, perplexities, strict=True):
            unsteered, start = self._unsteered[key]
            given.append(
                Continuation(
                    concept=self.concept,
                    words=self.words,
                    instruction=instruction,
                    text=text,
                    unsteered=unsteered,
                    perplexity=perplexity,
                    unsteered_perplexity=start,
                )
            )
        said = verdicts(self.judge, given)
        if place not in self.scores:
            self.scores[place] = SteeringScore().to(keys.device)
        self.scores[place].update(torch.tensor(said, dtype=torch.float64))
        self.found += [
            Judgement(
                split=self.split, place=place, example=key, continuation=each, verdict=verdict, judge=self.judge.name
            )
            for key, each, verdict in zip(at, given, said, strict=True)
        ]

    def compute(self) -> dict[str, Tensor]:
        """The mean scores of each place over all processes, such as ``strength_0.5/steering_score``."""
        return {f"{place}/{name}": value for place, each in self.scores.items() for name, value in _named(each)}


def figures_of(judgements: Iterable[Judgement]) -> dict[str, float]:
    """A run's figures by its judgements: the strength with the best validation score, and its mean test scores.

    Raises:
        JudgementError: there are no steered continuations of one of the two splits.
    """
    listed = list(judgements)
    chosen = chosen_place(listed)
    metric = SteeringScore()
    if rows := [each.verdict for each in listed if (each.split, each.place) == ("test", chosen)]:
        metric.update(torch.tensor(rows, dtype=torch.float64))
    else:
        raise JudgementError(f"the judgements have no test continuations at {chosen}")
    return {"strength": float(chosen.removeprefix(STEERED))} | {name: float(value) for name, value in _named(metric)}


def chosen_place(judgements: Iterable[Judgement]) -> str:
    """The steered place with the highest mean overall score on the validation split; of equal ones the weakest.

    Raises:
        JudgementError: there are no steered continuations of the validation split.
    """
    scores: dict[str, list[float]] = {}
    for each in judgements:
        if each.split == "validation" and each.place.startswith(STEERED):
            scores.setdefault(each.place, []).append(each.overall)
    if not scores:
        raise JudgementError("the judgements have no steered continuations of the validation split")
    places = sorted(scores, key=lambda place: float(place.removeprefix(STEERED)))
    means = torch.tensor([sum(scores[place]) / len(scores[place]) for place in places], dtype=torch.float64)
    return places[int(best_factor(means[:, None]))]


def win_rates(ours: Sequence[Judgement], reference: Mapping[str, float], place: str) -> dict[str, Tensor]:
    """How often the overall score of a continuation is above the reference's of the same instruction.

    Raises:
        JudgementError: the reference lacks an instruction.
    """
    metric = WinRate()
    for each in ours:
        instruction = each.continuation.instruction
        if instruction not in reference:
            raise JudgementError(
                f"reference '{place}': it has no test continuation of {instruction!r}; run the reference on the same "
                "task, seed and sizes"
            )
        metric.update(torch.tensor([each.overall]), torch.tensor([reference[instruction]]))
    return {f"{name}_rate": value for name, value in metric.compute().items()}


def reference_scores(path: str | Path, judge: Judge) -> dict[str, float]:
    """The overall score of each test instruction at the strength that another run has chosen.

    Raises:
        JudgementError: the file is damaged, or another judge has scored it.
    """
    listed = read_judgements(path)
    for each in listed:
        if each.judge != judge.name:
            raise JudgementError(
                f"reference '{path}' was scored by {each.judge} and this run is by {judge.name}; judge it again: "
                "itrain.training.judgements.judge_again"
            )
    chosen = chosen_place(listed)
    return {
        each.continuation.instruction: each.overall for each in listed if each.split == "test" and each.place == chosen
    }


def judge_again(path: str | Path, judge: Judge, *, batch_size: int = 256) -> list[Judgement]:
    """The continuations of a file, scored by another judge."""
    listed = read_judgements(path)
    found: list[Judgement] = []
    for start in range(0, len(listed), batch_size):
        batch = listed[start : start + batch_size]
        said = verdicts(judge, [each.continuation for each in batch])
        found += [replace(each, verdict=one, judge=judge.name) for each, one in zip(batch, said, strict=True)]
    return found


def write_judgements(path: str | Path, judgements: Iterable[Judgement]) -> Path:
    """Write a JSONL file, a judgement a line."""
    rows = (json.dumps(each.row(), ensure_ascii=False, allow_nan=False) for each in judgements)
    write_text(Path(path), "".join(f"{row}\n" for row in rows))
    return Path(path)


def read_judgements(path: str | Path) -> list[Judgement]:
    """The judgements of a file.

    Raises:
        JudgementError: it is not there or damaged, naming the line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise JudgementError(f"there is no file of judgements '{path}'; a run with training.judge writes {FILE}")
    found = []
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                found.append(_read(f"'{path}' line {number}", line))
    return found


def _read(place: str, line: bytes) -> Judgement:
    try:
        row = json.loads(line)
        given = {name: row[name] for name in Continuation.__dataclass_fields__}
        own = {name: row[name] for name in ("split", "place", "judge")}
        texts = {name: value for name, value in {**given, **own}.items() if name not in (*_PERPLEXITIES, "words")}
        if wrong := [name for name, value in texts.items() if not isinstance(value, str)]:
            raise ValueError(f"{wrong[0]} is {shown(texts[wrong[0]])}, and no text")
        if not isinstance(given["words"], list) or not all(isinstance(word, str) for word in given["words"]):
            raise ValueError(f"words is {shown(given['words'])}, and no list of texts")
        scores = Verdict(*(_number(row, f"{name}_score", TOP) for name in ASPECTS))
        for name in _PERPLEXITIES:
            given[name] = inf if given[name] == MOST else _number(row, name, MOST)
        example = row["example"]
        if type(example) is not int:
            raise ValueError(f"example is {shown(example)}, and no whole number")
        if own["place"].startswith(STEERED) and not isfinite(float(own["place"].removeprefix(STEERED))):
            raise ValueError(f"place is {shown(own['place'])}, which has no strength")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise JudgementError(f"{place} is no judgement: {type(error).__name__}: {error}") from error
    return Judgement(example=example, continuation=Continuation(**given), verdict=scores, **own)


def _number(row: Mapping[str, Any], name: str, most: float) -> float:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(f"{name} is {shown(value)}, and no number from 0 to {most:g}")
    return float(value)


def gathered(found: Sequence[Judgement]) -> list[Judgement]:
    """The judgements of all processes, each once, in one order."""
    parts: list[Any] = [list(found)]
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        parts = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, list(found))
    unique = {(each.split, each.place, each.example): each for part in parts for each in part}
    return [unique[key] for key in sorted(unique)]


def _named(metric: SteeringScore) -> list[tuple[str, Tensor]]:
    found = metric.compute()
    return [(SCORE, found["overall"].float()), *((f"{name}_score", found[name].float()) for name in ASPECTS)]
