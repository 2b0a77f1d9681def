"""Cause, isolate and disentangle: how well one attribute of an entity is swapped, and how well the others are left."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, nan
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from itrain.metrics.gathering import gather_counts
from itrain.metrics.interchange import Rule, is_right


class Asked(Protocol):
    """What a prompt asks of an entity: an attribute of its type, in some wording."""

    @property
    def entity_type(self) -> str: ...

    @property
    def attribute(self) -> str: ...


class Disentangled(NamedTuple):
    """Cause, isolate and their mean, disentangle."""

    cause: float
    isolate: float

    @property
    def disentangle(self) -> float:
        return (self.cause + self.isolate) / 2


def disentangled(
    right: Int[Tensor, " questions"], pairs: Int[Tensor, " questions"], asked: Sequence[Asked], swapped: Sequence[str]
) -> Disentangled:
    """Cause and isolate of the variables that are swapped together, from the right pairs of each question.

    cause = mean_types mean_attributes mean_prompts right / pairs over the attributes that are swapped, isolate the same
    over all others. A question without pairs is left out; the mean of none is nan.

    Huang et al. 2024, "RAVEL: Evaluating Interpretability Methods on Disentangling Language Model Representations",
    section 3.
    """
    shares: dict[bool, dict[str, dict[str, list[float]]]] = {True: {}, False: {}}
    for question, hits, count in zip(asked, right.tolist(), pairs.tolist(), strict=True):
        if count:
            of_type = shares[question.attribute in swapped].setdefault(question.entity_type, {})
            of_type.setdefault(question.attribute, []).append(hits / count)
    cause, isolate = (
        _mean([_mean([_mean(prompts) for prompts in attributes.values()]) for attributes in each.values()])
        for each in (shares[True], shares[False])
    )
    return Disentangled(cause, isolate)


def disentangled_pair(cause_a: float, cause_b: float, isolate_ab: float, isolate_ba: float) -> float:
    """SAEBench's score of two attributes: (cause_A + cause_B + isolate_AB + isolate_BA) / 4.

    isolate_AB swaps A and asks for B. It is the mean of disentangle over both attributes, each of which has the other
    alone to leave as it is. Karvonen et al. 2025, "SAEBench: A Comprehensive Benchmark for Sparse Autoencoders in
    Language Model Interpretability".
    """
    return (cause_a + cause_b + isolate_ab + isolate_ba) / 4


class Disentanglement(Metric):
    """Cause, isolate and disentangle of each set of swapped variables, and their means over these sets.

    The state counts pairs by set and question. It is of integers and sums over processes, so the result does not depend
    on how the pairs were divided.

    Args:
        groups: the sets of variables that are swapped together.
        asked: what the pairs' bases may ask.
        rule: when an answer is right.
    """

    full_state_update = False
    higher_is_better = True
    right: Tensor
    pairs: Tensor

    def __init__(self, *, groups: Sequence[Sequence[str]], asked: Sequence[Asked], rule: Rule) -> None:
        super().__init__(dist_sync_fn=gather_counts)
        self.groups, self.asked = [tuple(group) for group in groups], list(asked)
        self.rule: Rule = rule
        for name in ("right", "pairs"):
            zeros = torch.zeros(len(self.groups), len(self.asked), dtype=torch.long)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(
        self,
        logits: Float[Tensor, "batch ... vocabulary"],
        label: Int[Tensor, "batch ..."],
        contrast: Int[Tensor, "batch ..."],
        group: Int[Tensor, " batch"],
        question: Int[Tensor, " batch"],
    ) -> None:
        right: Bool[Tensor, " batch"] = is_right(logits, label, contrast, self.rule)
        cells = (group * len(self.asked) + question).to(right.device, non_blocking=True)
        self.right.view(-1).index_add_(0, cells, right.long())
        self.pairs.view(-1).index_add_(0, cells, torch.ones_like(cells))

    def compute(self) -> dict[str, Tensor]:
        """``cause``, ``isolate`` and ``disentangle``; of several sets also of each, as ``color/cause``.

        A set of which no pair asks for another attribute, as one of all attributes, or none for its own, has the figure
        that is known, and does not count in the means. Nothing where no set has both.
        """
        right, pairs = self.right.cpu(), self.pairs.cpu()
        found = [disentangled(right[place], pairs[place], self.asked, group) for place, group in enumerate(self.groups)]
        whole = [each for each in found if not isnan(each.disentangle)]
        if not whole:
            return {}
        every = Disentangled(_mean([each.cause for each in whole]), _mean([each.isolate for each in whole]))
        places = {"": every}
        if len(self.groups) > 1:
            places |= {f"{'+'.join(group)}/": each for group, each in zip(self.groups, found, strict=True)}
        return {
            f"{place}{name}": torch.tensor(value, dtype=torch.float64)
            for place, each in places.items()
            for name in ("cause", "isolate", "disentangle")
            if not isnan(value := getattr(each, name))
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else nan
