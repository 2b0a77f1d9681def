"""Steering scores: judged continuations, the factor chosen on some instructions and scored on others, and win rates.

Tensor letters: C concepts, F factors, I instructions, A aspects.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from itrain.metrics.gathering import gather_counts

ASPECTS = ("concept", "instruct", "fluency")
"""What a judge scores, each from 0 to 2: the concept is there, the text is on the instruction, it reads well."""
STEP = 2.0**-40
"""The precision in which scores are added up."""
TIE = 1e-6
"""The difference between two overall scores up to which neither wins."""


def overall_score(scores: Float[Tensor, "*batch aspects"]) -> Float[Tensor, "*batch"]:
    """The harmonic mean of each continuation's aspects, A / sum_a 1 / s_a; 0 where any of them is 0.

    Wu et al. 2025, "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders", section 3.2.
    """
    positive = (scores > 0).all(-1)
    means = scores.shape[-1] / scores.clamp(min=torch.finfo(scores.dtype).tiny).reciprocal().sum(-1)
    return means.where(positive, 0.0)


def best_factor(overall: Float[Tensor, "*concepts factors instructions"]) -> Int[Tensor, "*concepts"]:
    """The index of the factor with the highest mean score over instructions; of equal ones the first."""
    means = overall.mean(-1)
    # Not argmax, which may give any of several largest ones.
    return (means == means.amax(-1, keepdim=True)).long().argmax(-1)


class HeldOut(NamedTuple):
    """A method's score for each concept, and the index of the factor at which it was scored."""

    score: Float[Tensor, " concepts"]
    factor: Int[Tensor, " concepts"]


def held_out_score(overall: Float[Tensor, "concepts factors instructions"], *, scored: float = 0.5) -> HeldOut:
    """Choose each concept's factor on its first instructions, and score it on the others.

    Args:
        overall: the overall score of the continuation of each instruction at each factor, for each concept.
        scored: the share of the instructions that are scored, the last ones.

    Raises:
        ValueError: one of the two parts has no instructions.
    """
    count = overall.shape[-1]
    chosen_on = count - round(count * scored)
    if not 0 < chosen_on < count:
        raise ValueError(
            f"scored={scored} of {count} instructions leaves {chosen_on} to choose the factor on; both parts need one"
        )
    factor = best_factor(overall[..., :chosen_on])
    at_factor = overall[torch.arange(len(overall), device=overall.device), factor, chosen_on:]
    return HeldOut(at_factor.mean(-1), factor)


class SteeringScore(Metric):
    """The mean over continuations of their overall score, and of each aspect's.

    The states are integers, sums in steps of 2^-40, and add up over processes, so that the result does not depend on
    how the continuations were divided. The score of no continuations is nan.
    """

    full_state_update = False
    higher_is_better = True
    sums: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__(dist_sync_fn=gather_counts)
        self.add_state("sums", torch.zeros(1 + len(ASPECTS), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Float[Tensor, "batch aspects"]) -> None:
        exact = scores.cpu().double()  # which not all accelerators have
        steps = (torch.cat([overall_score(exact)[:, None], exact], 1) / STEP).round().long()
        self.sums += steps.sum(0).to(self.sums.device)
        self.count += len(scores)

    def compute(self) -> dict[str, Tensor]:
        """``overall`` and one figure for each of the aspects."""
        means = self.sums.cpu().double() * STEP / self.count.cpu()
        return dict(zip(("overall", *ASPECTS), means, strict=True))


class WinRate(Metric):
    """How often a continuation's overall score is above that of a reference method for the same instruction.

    ``win``, ``loss`` and ``tie`` are shares of the continuations and sum to 1; a tie is no win. They are counted in
    integers, so that the result does not depend on how the continuations were divided.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self) -> None:
        super().__init__(dist_sync_fn=gather_counts)
        self.add_state("counts", torch.zeros(3, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, overall: Float[Tensor, " batch"], reference: Float[Tensor, " batch"]) -> None:
        ahead = overall - reference
        self.counts += torch.stack([ahead >= TIE, ahead <= -TIE, ahead.abs() < TIE]).sum(1).to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(("win", "loss", "tie"), self.counts / self.counts.sum(), strict=True))


def win_rate(overall: Float[Tensor, " batch"], reference: Float[Tensor, " batch"]) -> dict[str, Tensor]:
    """The shares of continuations that win, lose and tie against those of a reference method; see :class:`WinRate`."""
    metric = WinRate().to(overall.device)
    metric.update(overall, reference)
    return metric.compute()
