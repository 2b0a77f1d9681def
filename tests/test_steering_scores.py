"""Steering scores: formulas, judges, and judgements from which figures are worked out again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from itrain.metrics import SteeringScore, WinRate, best_factor, held_out_score, overall_score, win_rate
from itrain.training.judgements import (
    Judged,
    Judgement,
    JudgementError,
    figures_of,
    judge_again,
    read_judgements,
    reference_scores,
    write_judgements,
)
from itrain.training.judges import Continuation, Judge, JudgeError, Verdict, WordJudge, require_ready, verdicts

# --- formulas


def test_the_overall_score_is_the_harmonic_mean_and_0_where_any_score_is() -> None:
    stats = pytest.importorskip("scipy.stats")
    scores = torch.randint(0, 3, (500, 3), generator=torch.Generator().manual_seed(0)).double()
    expected = [0.0 if 0 in row else float(stats.hmean(row)) for row in scores.tolist()]
    torch.testing.assert_close(overall_score(scores), torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)
    assert overall_score(torch.tensor([[2.0, 1.0, 1.0], [2.0, 2.0, 0.0]])).tolist() == pytest.approx([1.2, 0])


def axbench(table: np.ndarray) -> tuple[list[float], list[int]]:
    """As AxBench's own program does it, concept by concept: the factor of the first half, scored on the second."""
    scores, factors = [], []
    for concept in table:
        count = concept.shape[1]
        first = count - round(count * 0.5)
        factors.append(int(np.argmax([np.mean(row[:first]) for row in concept])))
        scores.append(float(np.mean(concept[factors[-1], first:])))
    return scores, factors


@pytest.mark.parametrize("instructions", [2, 9, 10])
def test_the_factor_is_chosen_on_one_half_and_scored_on_the_other(instructions: int) -> None:
    levels = torch.tensor([0.0, 1.0, 1.2, 1.5, 2.0], dtype=torch.float64)
    drawn = torch.randint(0, 5, (40, 14, instructions), generator=torch.Generator().manual_seed(1))
    found, (scores, factors) = held_out_score(levels[drawn]), axbench(levels[drawn].numpy())
    assert found.factor.tolist() == factors
    torch.testing.assert_close(found.score, torch.tensor(scores, dtype=torch.float64), rtol=1e-14, atol=0)


def test_of_equal_factors_the_first_is_chosen_and_both_halves_need_instructions() -> None:
    assert int(best_factor(torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.5, 0.5]]))) == 0
    with pytest.raises(ValueError, match=r"scored=0\.5 of 1 instructions leaves 1 to choose the factor on"):
        held_out_score(torch.ones(1, 2, 1))


@pytest.mark.parametrize("sizes", [(10,), (1, 7, 2), (3, 0, 7)])
def test_scores_and_win_rates_do_not_depend_on_batches_or_processes(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    scores = 2 * torch.rand(10, 3, dtype=torch.float64, generator=generator)
    reference = overall_score(scores).roll(1)
    reference[:2] = overall_score(scores)[:2]
    whole, parts = (SteeringScore(), WinRate()), [(SteeringScore(), WinRate()) for _ in sizes]
    whole[0].update(scores)
    whole[1].update(overall_score(scores), reference)
    for (score, wins), rows in zip(parts, torch.arange(10).split(list(sizes)), strict=True):
        score.update(scores[rows])
        wins.update(overall_score(scores[rows]), reference[rows])
    for at, metric in enumerate(whole):
        merged = parts[0][at]
        for name in metric._defaults:  # what processes add up
            setattr(merged, name, sum(getattr(part[at], name) for part in parts))
        assert {name: float(each) for name, each in merged.compute().items()} == {
            name: float(each) for name, each in metric.compute().items()
        }
    assert float(whole[0].compute()["overall"]) == pytest.approx(float(overall_score(scores).mean()), abs=1e-11)
    assert float(whole[0].compute()["fluency"]) == pytest.approx(float(scores[:, 2].mean()), abs=1e-11)


def test_a_tie_is_no_win() -> None:
    rates = win_rate(torch.tensor([1.0, 2.0, 0.0, 0.5]), torch.tensor([1.0, 1.0, 2.0, 0.5 + 1e-8]))
    assert {name: float(each) for name, each in rates.items()} == {"win": 0.25, "loss": 0.25, "tie": 0.5}


# --- judges


def continuation(text: str = "the cat is red", **given: Any) -> Continuation:
    known = {"concept": "red", "words": ["red"], "instruction": "Which cat ?", "unsteered": "the cat is old"}
    return Continuation(**{**known, "text": text, "perplexity": 3.0, "unsteered_perplexity": 3.0, **given})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (continuation(), (2, 2, 2)),
        (continuation("the cat is old"), (0, 2, 2)),
        (continuation("The cat " + "sat on it " * 20 + "Red"), (1, 0, 2)),
        (continuation("red red red"), (2, 0, 2)),
        (continuation("which dog fell there again red"), (2, 1, 2)),
        (continuation(perplexity=12.0), (2, 2, 1)),
        (continuation(perplexity=12.1), (2, 2, 0)),
        (continuation(perplexity=math.inf), (2, 2, 0)),
        (continuation("reddish cats", words=["Red Cross", "cats"]), (2, 0, 2)),
        (continuation("the red cross", words=["Red Cross"]), (2, 2, 2)),
        (continuation(""), (0, 0, 2)),
    ],
)
def test_the_word_judge_counts_mentions_related_words_and_perplexity(
    given: Continuation, expected: tuple[int, ...]
) -> None:
    assert tuple(WordJudge().judge([given])[0]) == expected


def test_the_word_judge_needs_words_and_bounds_in_order() -> None:
    with pytest.raises(JudgeError, match=r"judge WordJudge.* fails: ValueError: the task names no word"):
        verdicts(WordJudge(), [continuation(words=[])])
    with pytest.raises(ValueError, match="fluency: the bounds"):
        WordJudge(fluency=(1.0, 4.0))


class Fixed(Judge):
    """Says what it is told to."""

    def __init__(self, said: Any = (), *, broken: bool = False) -> None:
        self.said, self.broken, self.batches = said, broken, []

    def check(self) -> None:
        if self.broken:
            raise ConnectionError("no server\nanswers at port 80")

    def judge(self, continuations: Sequence[Continuation]) -> Any:
        self.batches.append(len(continuations))
        if self.broken:
            raise TimeoutError("after 60 s\nof waiting")
        return self.said


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([], "gives 0 verdicts for 1 continuations; give one for each"),
        (None, "gives a NoneType for 1 continuations"),
        ([(2, 2)], r"gives '\(2, 2\)' for the continuation 'the cat is red' of 'Which cat \?'; give Verdict"),
        ([(2, 2, 3)], "each from 0 to 2"),
        ([(2, 2, math.nan)], "each from 0 to 2"),
        (["222"], "gives '222'"),
    ],
)
def test_what_is_no_verdict_is_one_line_that_names_judge_and_text(said: Any, message: str) -> None:
    with pytest.raises(JudgeError, match=message) as caught:
        verdicts(Fixed(said), [continuation()])
    assert "judge Fixed" in str(caught.value) and "\n" not in str(caught.value)


def test_a_judge_that_fails_is_one_line_before_the_run_and_in_it() -> None:
    for act in (lambda judge: verdicts(judge, [continuation()]), require_ready):
        with pytest.raises(JudgeError, match=r"^judge Fixed fails: (TimeoutError|ConnectionError): .* (of|answers)"):
            act(Fixed(broken=True))
    with pytest.raises(JudgeError, match="judge: str is none; give an instance of a subclass of itrain"):
        require_ready("WordJudge")  # type: ignore[arg-type]


# --- judgements


def judged(tmp_path: Path) -> tuple[Path, list[Judgement]]:
    """Four prompts, two to choose on, where strength 2 is the best of 1, 2 and 10, and two to score."""
    found: list[Judgement] = []
    for split in ("validation", "test"):
        part = Judged(WordJudge(), split=split, concept="red", words=["red"])
        for place, text in {
            "unsteered": "the cat is old",
            "strength_1": "the cat is old",
            "strength_2": "the cat is red",
            "strength_10": "red red",
            "random_vector/strength_2": "the dog is red",
        }.items():
            texts, asked = [text, "the cat is red"], [f"{split} {number} ?" for number in range(2)]
            part.add(place, torch.tensor([7, 9]), asked, texts, [1.0, math.inf if place == "strength_10" else 1.0])
        found += part.found
    return write_judgements(tmp_path / "judgements.jsonl", found), found


def test_a_file_of_judgements_gives_the_figures_again(tmp_path: Path) -> None:
    file, found = judged(tmp_path)
    assert read_judgements(file) == found
    figures = figures_of(read_judgements(file))
    assert figures["strength"] == 2 and figures["steering_score"] == 2
    row = json.loads(file.read_text().splitlines()[0])
    assert row["judge"].startswith("WordJudge(") and row["steering_score"] == 0 and row["split"] == "validation"


def test_a_file_is_judged_again_in_batches_by_another_judge(tmp_path: Path) -> None:
    file, found = judged(tmp_path)
    judge = Fixed([Verdict(1, 1, 1)] * 5)
    again = judge_again(file, judge, batch_size=5)
    assert judge.batches == [5] * 4 and {each.judge for each in again} == {"Fixed"}
    assert [each.continuation for each in again] == [each.continuation for each in found]
    assert figures_of(again)["steering_score"] == 1 and figures_of(again)["strength"] == 1
    with pytest.raises(JudgementError, match=r"was scored by WordJudge\(.*\) and this run is by Fixed; judge it again"):
        reference_scores(file, judge)


def test_a_damaged_file_is_named_with_its_line(tmp_path: Path) -> None:
    file, _ = judged(tmp_path)
    lines = file.read_text().splitlines()
    for number, broken in ((3, lines[2][:-5]), (4, "[]"), (5, lines[4].replace('"concept_score"', '"score"'))):
        file.write_text("\n".join([*lines[: number - 1], broken]) + "\n")
        with pytest.raises(JudgementError, match=rf"judgements\.jsonl' line {number} is no judgement"):
            read_judgements(file)
    with pytest.raises(JudgementError, match=r"there is no file of judgements '.*nope'; a run with training.judge"):
        read_judgements(tmp_path / "nope")
    with pytest.raises(JudgementError, match="no steered continuations of the validation split"):
        figures_of([])
