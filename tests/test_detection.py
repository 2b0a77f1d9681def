"""Detection measures beside scikit-learn, scipy and closed forms, and the same however texts are divided."""

from __future__ import annotations

from itertools import pairwise
from math import inf, isnan

import numpy
import pytest
import torch
from scipy.stats import beta, binom
from sklearn.metrics import f1_score, roc_auc_score, roc_curve

from itrain.metrics import (
    AUROC,
    DetectionF1,
    Scored,
    ThresholdAt,
    auroc,
    auroc_interval,
    exact_interval,
    rates_above,
    threshold_at,
    threshold_interval,
)


def drawn(count: int = 400, seed: int = 0, *, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, generator=generator) < 0.3).long()
    scores = torch.randn(count, generator=generator, dtype=torch.float64) + labels
    return (scores * 2).round() if ties else scores, labels


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-9])
def test_auroc_is_scikit_learns(ties: bool, scale: float) -> None:
    for seed in range(5):
        scores, labels = drawn(seed=seed, ties=ties)
        expected = roc_auc_score(labels.numpy(), (scores * scale).numpy())
        assert abs(float(auroc(scores * scale, labels)) - expected) < 1e-14


def test_auroc_of_one_class_and_of_equal_scores() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0])
    assert isnan(auroc(scores, torch.tensor([1, 1, 1]))) and isnan(auroc(scores, torch.tensor([0, 0, -1])))
    assert isnan(auroc(scores[:0], torch.tensor([], dtype=torch.long)))
    assert auroc(torch.zeros(4), torch.tensor([0, 1, 1, 0])) == 0.5
    assert auroc(scores, torch.tensor([-1, 0, 1])) == 1  # the unlabelled text is left out


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.7, 9.0])
def test_f1_is_scikit_learns_and_weighs_classes_as_asked(threshold: float) -> None:
    scores, labels = drawn(ties=True)
    found, alarms = rates_above(scores, labels, threshold), (scores > threshold).long()
    assert found.f1() == pytest.approx(f1_score(labels, alarms), abs=1e-14)
    negatives = int((labels == 0).sum())
    for rate in (0.5, 0.01):
        # Positives weighted so that they are this share of all.
        weight = rate / (1 - rate) * negatives / int((labels == 1).sum())
        weights = labels.double() * (weight - 1) + 1
        assert found.f1(rate) == pytest.approx(f1_score(labels, alarms, sample_weight=weights), abs=1e-12)
    assert isnan(rates_above(scores, torch.zeros_like(labels), inf).f1())


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.05, 0.5])
@pytest.mark.parametrize("ties", [False, True])
def test_a_threshold_lets_through_what_is_asked_and_none_lower_does(rate: float, ties: bool) -> None:
    scores, labels = drawn(2000, ties=ties)
    negatives = scores[labels == 0]
    threshold = threshold_at(negatives, rate)
    assert (negatives > threshold).double().mean() <= rate
    lower = negatives[negatives < threshold].max()
    assert (negatives > lower).double().mean() > rate
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    best = max(share for share in fpr if share <= rate)  # scikit-learn alarms at scores from the threshold on
    assert float((negatives > threshold).double().mean()) == pytest.approx(best, abs=1e-14)
    assert rates_above(scores, labels, threshold).true_positive == pytest.approx(max(tpr[fpr == best]), abs=1e-14)


def test_a_threshold_needs_negatives_and_a_rate() -> None:
    with pytest.raises(ValueError, match="there are none"):
        threshold_at(torch.tensor([]), 0.01)
    with pytest.raises(ValueError, match="got 1"):
        threshold_at(torch.tensor([1.0]), 1)
    assert threshold_at(torch.arange(100.0), 0.29) == 70  # 0.29 * 100 is below 29 in fp64


def test_the_exact_interval_is_that_of_the_beta_distribution() -> None:
    for hits, count in ((0, 10), (1, 100), (5, 500), (37, 40), (40, 40), (9, 5000)):
        low, high = exact_interval(hits / count, count)
        assert low == pytest.approx(beta.ppf(0.025, hits, count - hits + 1) if hits else 0, abs=1e-12)
        assert high == pytest.approx(beta.ppf(0.975, hits + 1, count - hits) if hits < count else 1, abs=1e-12)
    assert exact_interval(float("nan"), 0) == (0, 1)


def test_the_interval_of_a_threshold_is_of_order_statistics() -> None:
    negatives = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).double()
    low, high = threshold_interval(negatives, 0.01)
    counts = numpy.arange(1001)
    assert binom.cdf(counts, 1000, 0.99)[int(low)] <= 0.025 < binom.cdf(counts, 1000, 0.99)[int(low) + 1]
    assert binom.sf(int(high), 1000, 0.99) <= 0.025 < binom.sf(int(high) - 1, 1000, 0.99)
    assert low <= threshold_at(negatives, 0.01) <= high
    assert threshold_interval(negatives[:367], 0.01)[1] == inf > threshold_interval(negatives[:368], 0.01)[1]


def test_the_interval_of_an_auroc_covers_it() -> None:
    generator, covered = torch.Generator().manual_seed(0), 0
    true = 0.9213503964748575  # Phi(2 / sqrt(2))
    for _ in range(400):
        scores = torch.randn(80, generator=generator) + 2 * (torch.arange(80) < 40)
        low, high = auroc_interval(float(auroc(scores, (torch.arange(80) < 40).long())), 40, 40)
        covered += low <= true <= high
    assert 0.92 <= covered / 400 <= 0.99
    low, high = auroc_interval(1.0, 50, 50)
    assert 0.9 < low < 0.97 and high == 1  # no point, as a normal approximation would have it
    value, (low, high) = 0.8, auroc_interval(0.8, 30, 60)
    for end in (low, high):
        rest = (30 + 60) / 2 - 1
        spread = end * (1 - end) * (1 + rest * ((1 - end) / (2 - end) + end / (1 + end))) / (30 * 60)
        assert abs(value - end) == pytest.approx(1.959963984540054 * spread**0.5, abs=1e-9)


def test_measures_do_not_depend_on_how_texts_are_divided() -> None:
    """The states of two processes with uneven batches, merged as torchmetrics merges them."""
    first, labels = drawn(101)
    scores = torch.stack([first, -first, torch.zeros_like(first)], 1)
    labels = labels[:, None].expand(-1, 3)
    for make in (
        lambda: AUROC(columns=3),
        lambda: DetectionF1(threshold=0.5, positive_rate=0.01, columns=3),
        lambda: ThresholdAt(rate=0.05, columns=3),
    ):
        whole, parts = make(), [make(), make()]
        whole.update(scores, labels)
        bounds = [0, 7, 60, 60, 101]
        for number, (start, stop) in enumerate(pairwise(bounds)):
            parts[number % 2].update(scores[start:stop], labels[start:stop])
        merged = make()
        merged.scores = [row for part in parts for row in part.scores]
        merged.labels = [row for part in parts for row in part.labels]
        merged._update_count = 1
        assert torch.equal(merged.compute(), whole.compute()) and whole.compute().dtype == torch.float64
    expected = [roc_auc_score(labels[:, 0], scores[:, column]) for column in range(3)]
    found = AUROC(columns=3)
    found.update(scores, labels)
    assert found.compute().tolist() == pytest.approx(expected, abs=1e-14)


def test_a_single_score_keeps_its_axes() -> None:
    scored = Scored()
    scored.update(torch.tensor([2.5]), torch.tensor([1]))
    ((scores, labels),) = scored.each()
    assert scores.tolist() == [2.5] and labels.tolist() == [1]
