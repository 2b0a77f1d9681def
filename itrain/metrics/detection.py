"""Detection: how well scores tell texts with a concept from those without, and what a threshold lets through.

Scores and labels are gathered whole from all processes, and all sums are counts, so that a figure does not depend on
how the texts were divided. torchmetrics' own AUROC is not used: it squashes scores outside of 0 to 1 by a sigmoid,
batch by batch, which makes ties of large scores, adds up areas in fp32, and calls the AUROC of a single class 0.

A column holds the scores of one detector.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan, sqrt
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from itrain.metrics.gathering import gather_counts

LEVEL = 0.95
"""Of all intervals."""


class Rates(NamedTuple):
    """The shares of texts above a threshold, and of how many they are."""

    true_positive: float
    false_positive: float
    positives: int
    negatives: int

    def f1(self, positive_rate: float | None = None) -> float:
        """The harmonic mean of precision and recall where a share of the texts is positive; None: that of these texts.

        F1 = 2 r TPR / (r TPR + (1 - r) FPR + r), for a share r of positives; 0.5 weighs both classes alike.
        """
        share = self.positives / max(self.positives + self.negatives, 1) if positive_rate is None else positive_rate
        alarms = share * self.true_positive + (1 - share) * self.false_positive
        return 2 * share * self.true_positive / (alarms + share) if alarms + share else nan


def auroc(scores: Float[Tensor, " texts"], labels: Int[Tensor, " texts"]) -> Float[Tensor, ""]:
    """The probability that a text with the concept has the higher score, ties counted half; NaN for a single class.

    AUROC = (#{s+ > s-} + #{s+ = s-} / 2) / (N+ N-), in fp64. Texts that are labelled neither 0 nor 1 are left out.
    """
    positive, negative = scores[labels == 1], scores[labels == 0].sort().values
    # Counts of pairs are exact in 64-bit integers; each tie is counted once from either side.
    wins = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    pairs = 2 * len(positive) * len(negative)
    return torch.tensor(int(wins.sum()) / pairs if pairs else nan, dtype=torch.float64)


def rates_above(scores: Float[Tensor, " texts"], labels: Int[Tensor, " texts"], threshold: float) -> Rates:
    """The shares of texts with and without the concept whose scores are above the threshold; NaN of no texts."""
    found = []
    for value in (1, 0):
        chosen = scores[labels == value]
        found.append((int((chosen > threshold).sum()), len(chosen)))
    (hits, positives), (alarms, negatives) = found
    return Rates(hits / positives if positives else nan, alarms / negatives if negatives else nan, positives, negatives)


def threshold_at(negatives: Float[Tensor, " texts"], rate: float) -> float:
    """The lowest threshold above which at most this share of the negatives lies: one of their own scores.

    Raises:
        ValueError: there are no negatives, or the rate is not at least 0 and below 1.
    """
    if not len(negatives):
        raise ValueError("a threshold at a false-positive rate needs texts without the concept, and there are none")
    if not 0 <= rate < 1:
        raise ValueError(f"a false-positive rate is at least 0 and below 1; got {rate}")
    # Rounding must not let rate * n fall below a whole number that it is.
    above = int(rate * len(negatives) + 1e-9)
    return float(negatives.sort(descending=True).values[above])


def threshold_of_youden(scores: Float[Tensor, " texts"], labels: Int[Tensor, " texts"]) -> float:
    """The threshold above which alarms tell the two classes apart best: it maximises J = TPR - FPR.

    Halfway between the lowest score that raises an alarm and the highest that raises none; of equal J the one with the
    fewest alarms. Equal scores raise an alarm together or not at all. Where no threshold has J > 0 it is the highest
    score, above which none lies. Youden 1950, "Index for rating diagnostic tests". Texts that are labelled neither 0
    nor 1 are left out.

    Raises:
        ValueError: a class has no texts, so that one of the rates is not known.
    """
    positive, negative = (scores[labels == value] for value in (1, 0))
    for what, found in (("with", positive), ("without", negative)):
        if not len(found):
            raise ValueError(
                f"Youden's threshold needs texts with and without the concept, and there are none {what} it"
            )
    levels = torch.cat([positive, negative]).unique()  # rising
    above = [len(each) - torch.searchsorted(each.sort().values, levels, right=True) for each in (positive, negative)]
    # J N+ N- in whole numbers, of alarms above each level; the highest level raises none, and has 0.
    j = above[0] * len(negative) - above[1] * len(positive)
    at = int((j == j.max()).nonzero()[-1])
    if at == len(levels) - 1:
        return float(levels[at])
    # In the scores' own precision, in which no rounding may move the middle up to the higher one.
    low, high = levels[at], levels[at + 1]
    middle = low + (high - low) / 2
    return float(middle if middle < high else low)


def threshold_interval(negatives: Float[Tensor, " texts"], rate: float, level: float = LEVEL) -> tuple[float, float]:
    """Where the threshold lies that lets through the rate of *all* negatives, from this sample of them.

    Between two order statistics, whatever the scores' distribution (Conover 1999, section 3.2); -inf or inf where the
    sample is too small to bound it, as 1 % of fewer than 368 negatives is from above.
    """
    order, count = negatives.double().sort().values.tolist(), len(negatives)
    below = binomial_cdf(count, 1 - rate)  # of how many negatives lie below the threshold
    tail = (1 - level) / 2
    low = max((number for number in range(1, count + 1) if below[number - 1] <= tail), default=0)
    high = min((number for number in range(1, count + 1) if 1 - below[number - 1] <= tail), default=count + 1)
    return (order[low - 1] if low else -inf), (order[high - 1] if high <= count else inf)


def exact_interval(share: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share: it covers at least as often as it says, at any share.

    A false-positive rate of 1 % rests on few alarms, for which Wilson's approximation may cover too seldom.
    """
    if not count or share != share:
        return 0.0, 1.0
    hits, tail = round(share * count), (1 - level) / 2
    low = 0.0 if hits == 0 else _root(lambda p: 1 - float(binomial_cdf(count, p)[hits - 1]) - tail)
    high = 1.0 if hits == count else _root(lambda p: tail - float(binomial_cdf(count, p)[hits]))
    return low, high


def auroc_interval(value: float, positives: int, negatives: int, level: float = LEVEL) -> tuple[float, float]:
    """The interval of an AUROC, by the score method, which keeps within 0 and 1 and is no point at either.

    The A with |value - A| = z sqrt(A (1 - A) (1 + (n - 1) ((1 - A) / (2 - A) + A / (1 + A))) / (N+ N-)), for
    n = (N+ + N-) / 2. Newcombe 2006, "Confidence intervals for an effect size measure based on the Mann-Whitney
    statistic. Part 2", method 5, from Hanley and McNeil 1982.
    """
    if not positives or not negatives or value != value:
        return 0.0, 1.0
    z, rest = NormalDist().inv_cdf((1 + level) / 2), (positives + negatives) / 2 - 1

    def width(area: float) -> float:
        spread = area * (1 - area) * (1 + rest * ((1 - area) / (2 - area) + area / (1 + area)))
        return z * sqrt(max(spread, 0.0) / (positives * negatives))

    low = 0.0 if value == 0 else _root(lambda area: width(area) - (value - area), 0.0, value)
    high = 1.0 if value == 1 else _root(lambda area: (area - value) - width(area), value, 1.0)
    return low, high


def binomial_cdf(count: int, share: float) -> Float[Tensor, " counts"]:
    """P(X <= k) for k = 0 .. count of count draws that each hit with the probability ``share``, in fp64."""
    k = torch.arange(count + 1, dtype=torch.float64)
    ways = (
        torch.lgamma(torch.tensor(count + 1.0, dtype=torch.float64)) - torch.lgamma(k + 1) - torch.lgamma(count - k + 1)
    )
    p = torch.tensor(share, dtype=torch.float64)
    log = ways + torch.xlogy(k, p) + torch.xlogy(count - k, 1 - p)
    return log.exp().cumsum(0).clamp(max=1.0)


def _root(function: Callable[[float], float], low: float = 0.0, high: float = 1.0) -> float:
    """Where a function that rises through 0 between two ends is 0, to the last digits."""
    for _ in range(60):
        middle = (low + high) / 2
        if function(middle) > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2


Column = tuple[Float[Tensor, " texts"], Int[Tensor, " texts"]]
"""Scores and labels of one detector."""


class Scored(Metric):
    """Scores and labels of texts, gathered from all processes.

    Args:
        columns: the number of detectors that score each text.
    """

    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self, *, columns: int = 1) -> None:
        super().__init__(dist_sync_fn=gather_counts)
        self.columns = columns
        # Flat, so that what a process without texts has, which is one empty axis, joins those of others.
        for name in ("scores", "labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Float[Tensor, "batch ..."], labels: Int[Tensor, "batch ..."]) -> None:
        self.scores.append(scores.detach().flatten())
        # As numbers of the scores' own kind, which hold -1, 0 and 1 exactly.
        self.labels.append(labels.to(scores).flatten())

    def compute(self) -> Float[Tensor, "2 texts columns"]:
        """All scores, and their labels, in no particular order of texts."""
        scores, labels = (dim_zero_cat(each) for each in (self.scores, self.labels))
        return torch.stack([scores, labels]).view(2, -1, self.columns)

    def each(self) -> list[Column]:
        """The scores and labels of each detector, of the texts of all processes."""
        return self._split(self.compute())

    def _columns(self) -> list[Column]:
        """The same of the texts that are here, which within ``compute`` are those of all processes."""
        return self._split(Scored.compute(self))

    def _split(self, found: Tensor) -> list[Column]:
        scores, labels = found.view(2, -1, self.columns)
        return list(zip(scores.unbind(1), labels.long().unbind(1), strict=True))


class AUROC(Scored):
    """The area under the curve of true over false positives of each detector; see :func:`auroc`."""

    higher_is_better = True

    def compute(self) -> Float[Tensor, " columns"]:
        return torch.stack([auroc(*column) for column in self._columns()])


class DetectionF1(Scored):
    """F1 of each detector above a threshold; see :meth:`Rates.f1`.

    Args:
        threshold: a score above it says that the text has the concept.
        positive_rate: the share of texts with the concept that is assumed; None: as it is.
        columns: as in :class:`Scored`.
    """

    higher_is_better = True

    def __init__(self, *, threshold: float, positive_rate: float | None = None, columns: int = 1) -> None:
        super().__init__(columns=columns)
        self.threshold, self.positive_rate = threshold, positive_rate

    def compute(self) -> Float[Tensor, " columns"]:
        found = [rates_above(*column, self.threshold).f1(self.positive_rate) for column in self._columns()]
        return torch.tensor(found, dtype=torch.float64)


class ThresholdAt(Scored):
    """The threshold of each detector at a false-positive rate; see :func:`threshold_at`.

    Args:
        rate: the share of texts without the concept that may lie above it.
        columns: as in :class:`Scored`.
    """

    def __init__(self, *, rate: float = 0.01, columns: int = 1) -> None:
        super().__init__(columns=columns)
        self.rate = rate

    def compute(self) -> Float[Tensor, " columns"]:
        found = [threshold_at(scores[labels == 0], self.rate) for scores, labels in self._columns()]
        return torch.tensor(found, dtype=torch.float64)
