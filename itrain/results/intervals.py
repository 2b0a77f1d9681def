"""95% intervals of figures: over the pairs or examples that were sampled, and over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log, nan, sqrt
from statistics import NormalDist, fmean, harmonic_mean, stdev, variance
from typing import TYPE_CHECKING

from itrain.metrics import auroc_interval
from itrain.results.columns import (
    ANSWER_PROBABILITY,
    ANSWER_SPREAD,
    AREAS,
    AUROC,
    AUROC_SELECTIVITY,
    BASES_DISTINCT,
    CONTROL_ACCURACY,
    CONTROL_AUROC,
    CONTROL_TASK,
    COUNTED,
    DATA,
    EXAMPLES,
    ODDS,
    ODDS_SELECTIVITY,
    ODDS_SPREAD,
    PAIRS_CHANGING,
    PAIRS_DISTINCT,
    PAIRS_PRESERVING,
    PROBE_ACCURACY,
    RANK_FOUND,
    SELECTIVITY,
    UNBOUNDED,
    is_known,
)

if TYPE_CHECKING:
    import pandas

LEVEL = 0.95
MEANS: Mapping[str, tuple[str, str, str]] = {
    ANSWER_PROBABILITY: (ANSWER_SPREAD, EXAMPLES, "examples"),
    ODDS: (ODDS_SPREAD, PAIRS_CHANGING, "pairs"),
}
"""For figures that are means: the columns of their standard deviation and of their number, and what is counted."""
DIFFERENCES: Mapping[str, tuple[str, str]] = {
    SELECTIVITY: (PROBE_ACCURACY, CONTROL_ACCURACY),
    ODDS_SELECTIVITY: (ODDS, CONTROL_TASK + ODDS),
    AUROC_SELECTIVITY: (AUROC, CONTROL_AUROC),
}
"""For figures that are differences of two others: these."""
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""Student's t for 1 to 9 degrees of freedom."""

Ends = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95% interval, where pairs, examples or seeds give one."""

    value: float
    interval: Ends | None = None
    over: str = ""
    """What the interval is over, for example ``128 pairs`` or ``3 seeds, 384 pairs in all``."""
    form: str = ".2f"
    """How numbers are written."""

    def __str__(self) -> str:
        return self.short if self.interval is None else f"{self.short} ({self.between(' to ')})"

    @property
    def short(self) -> str:
        """The value alone, without the sign of what rounds to 0."""
        written = format(self.value, self.form)
        return written.removeprefix("-") if float(written) == 0 else written

    def between(self, separator: str) -> str:
        """The ends of the interval; nothing without one."""
        return separator.join(format(end, self.form) for end in self.interval or ())

    def above_chance(self, chance: float) -> Estimate | None:
        """(value - chance) / (1 - chance), 0 at chance and 1 where all is right; None where chance is right always."""
        if not chance < 1:
            return None

        def corrected(share: float) -> float:
            return (share - chance) / (1 - chance)

        ends = self.interval and (corrected(self.interval[0]), corrected(self.interval[1]))
        return Estimate(value=corrected(self.value), interval=ends, over=self.over, form=self.form)

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two figures, with the interval that it has where the two are independent.

        From the distances of each figure to the ends of its own interval (Newcombe 1998, method 10; Zou and Donner
        2008): ``d - sqrt((a - low_a)^2 + (high_b - b)^2)`` to ``d + sqrt((high_a - a)^2 + (b - low_b)^2)``.
        """
        value = self.value - other.value
        if self.interval is None or other.interval is None:
            return Estimate(value=value, form=self.form)
        (low, high), (other_low, other_high) = self.interval, other.interval
        down = sqrt((self.value - low) ** 2 + (other_high - other.value) ** 2)
        up = sqrt((high - self.value) ** 2 + (other.value - other_low) ** 2)
        over = ", ".join(dict.fromkeys((*self.over.split(", "), *other.over.split(", "))))
        return Estimate(value=value, interval=(value - down, value + up), over=over, form=self.form)


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What the sampling of pairs or examples alone leaves open of a mean over seeds."""

    ends: Ends
    variance: float
    """Of one seed's figure, on average."""
    count: float
    what: str
    over_odds: Ends | None = None
    """Of shares of three seeds or more: Student's interval over their log odds."""


def estimated(fits: pandas.DataFrame, figure: str) -> Estimate:
    """The mean of a figure over the fits of one site, one for each seed, with its 95% interval.

    Pairs and seeds are both samples. Over pairs, a share has Wilson's interval, with all seeds' pairs counted
    together; a mean of probabilities or of odds has Student's, an AUROC Newcombe's over texts of both classes, and
    selectivity that of a difference. Where seeds differ by more than their pairs explain (their variance is above
    the mean variance that the sampling of pairs gives each), each end is the farthest one of this interval and of
    Student's over seeds; of shares of three seeds or more also of Student's over their log odds, as shares near 0
    or 1 lie unevenly about their mean. So equal seeds leave the interval of their pairs, and seeds that differ
    widely are not averaged away. Of 3 to 5 seeds with 64 to 256 pairs it covers in 91% to 97% of cases; of two
    seeds, in 82% to 96%. Near 0 or 1 it covers less where seeds differ widely: of log odds with a deviation of 1.5
    about a share of 0.98, in 83% to 91%, and in 74% to 80% of two seeds. The interval of one seed is over its pairs
    alone. Figures that count nothing have Student's interval over seeds.
    """
    fits = fits.loc[fits[figure].notna()]
    values = [float(value) for value in fits[figure]]
    form = ".2f" if is_known(figure) else ".3g"
    sampled, over, ends = _sampled(fits, figure), [], None
    if len(values) > 1:
        over.append(f"{len(values)} seeds")
    if sampled is not None:
        over.append(f"{sampled.count:.0f} {sampled.what}" + (" in all" if len(values) > 1 else ""))
        ends = sampled.ends
    if len(values) > 1 and variance(values) > (0 if sampled is None else sampled.variance):
        found = [ends, over_seeds(values), None if sampled is None else sampled.over_odds]
        lows, highs = zip(*filter(None, found), strict=True)
        ends = min(lows), max(highs)
    if ends is None:
        return Estimate(value=fmean(values), form=form)
    if is_known(figure) and figure.split("/")[-1] not in UNBOUNDED:
        # Selectivity is a difference of shares; the others are shares, or the count of a rank.
        lowest, highest = -1.0 if figure in DIFFERENCES else 0.0, inf if figure == RANK_FOUND else 1.0
        ends = (max(ends[0], lowest), min(ends[1], highest))
    return Estimate(value=fmean(values), interval=ends, over=", ".join(over), form=form)


def of_run(figures: Mapping[str, float], figure: str) -> Ends | None:
    """The interval of a figure of one run over its pairs or examples; None where these are not counted."""
    import pandas

    if not isfinite(figures.get(figure, nan)):
        return None
    return estimated(pandas.DataFrame([dict(figures)]), figure).interval


def over_pairs(share: float, pairs: float) -> Ends:
    """Wilson's interval of a share of independent pairs or examples (Wilson 1927).

    ``(share + z^2 / 2n +- z sqrt(share (1 - share) / n + z^2 / 4n^2)) / (1 + z^2 / n)``
    """
    half = _Z**2 / (2 * pairs)
    width = _Z * sqrt(share * (1 - share) / pairs + (half / _Z) ** 2)
    return max(0.0, (share + half - width) / (1 + 2 * half)), min(1.0, (share + half + width) / (1 + 2 * half))


def over_seeds(values: Sequence[float]) -> Ends:
    """Student's interval of the mean of two or more seeds: ``mean +- t s / sqrt(n)``."""
    width = _student(len(values) - 1) * stdev(values) / sqrt(len(values))
    return fmean(values) - width, fmean(values) + width


def _sampled(fits: pandas.DataFrame, figure: str) -> Sampled | None:
    if figure in DIFFERENCES:
        return _difference(fits, *DIFFERENCES[figure])
    if figure in AREAS:
        return _area(fits, figure)
    return _mean(fits, figure) if figure.split("/")[-1] in MEANS else _share(fits, figure)


def _difference(fits: pandas.DataFrame, upper: str, lower: str) -> Sampled | None:
    found = [_sampled(fits, name) if name in fits else None for name in (upper, lower)]
    if None in found:
        return None
    first, second = (each for each in found if each is not None)
    means = [
        Estimate(value=float(fits[name].mean()), interval=each.ends) for name, each in ((upper, first), (lower, second))
    ]
    ends = means[0].minus(means[1]).interval
    assert ends is not None, "both have an interval"
    return Sampled(ends=ends, variance=first.variance + second.variance, count=first.count, what=first.what)


def _share(fits: pandas.DataFrame, figure: str) -> Sampled | None:
    counted, what = COUNTED.get(figure, ("", ""))
    counts, shares = _counts(fits, counted), [float(share) for share in fits[figure]]
    if not counts or not all(0 <= share <= 1 for share in shares):
        return None
    different = _different(fits, counted, counts)
    what, counts = (what, counts) if different == counts else (f"different {what}", different)
    # Each seed has the same weight in the mean, however many pairs it has.
    ends = over_pairs(fmean(shares), len(counts) * harmonic_mean(counts))
    spread = fmean(share * (1 - share) / max(count - 1, 1) for share, count in zip(shares, counts, strict=True))
    odds = _over_odds(shares, counts) if len(shares) > 2 else None
    return Sampled(ends=ends, variance=spread, count=sum(counts), what=what, over_odds=odds)


def _area(fits: pandas.DataFrame, figure: str) -> Sampled | None:
    """Over the texts of both classes, with those of all seeds counted together."""
    positives, negatives = (_counts(fits, column) for column in AREAS[figure])
    if not positives or not negatives:
        return None
    areas, count = [float(area) for area in fits[figure]], len(fits)
    both = harmonic_mean(positives), harmonic_mean(negatives)
    ends = auroc_interval(fmean(areas), round(count * both[0]), round(count * both[1]))
    # Of one seed: the square of a half width in deviations, of an interval as wide as that of its texts alone.
    low, high = auroc_interval(fmean(areas), *map(round, both))
    texts = sum(positives) + sum(negatives)
    return Sampled(ends=ends, variance=((high - low) / 2 / _Z) ** 2, count=texts, what="texts")


def _over_odds(shares: Sequence[float], counts: Sequence[float]) -> Ends:
    """Student's interval of the mean log odds, half a pair added to either side, as shares."""
    sides = [(share * count + 0.5, (1 - share) * count + 0.5) for share, count in zip(shares, counts, strict=True)]
    low, high = over_seeds([log(right / wrong) for right, wrong in sides])
    return 1 / (1 + exp(-low)), 1 / (1 + exp(-high))


def _mean(fits: pandas.DataFrame, figure: str) -> Sampled | None:
    before, separator, mean = figure.rpartition("/")
    spread_of, counted, what = MEANS[mean]
    spreads = before + separator + spread_of
    counts = _counts(fits, before + separator + counted) or _counts(fits, counted)
    if counted == PAIRS_CHANGING and counts:
        counts = _different(fits, counted, counts)
    if not counts or min(counts) < 2 or spreads not in fits or fits[spreads].isna().any():
        return None
    spread = fmean(each**2 / (count - 1) for each, count in zip(fits[spreads], counts, strict=True))
    value = float(fits[figure].mean())
    width = _student(round(sum(counts)) - len(counts)) * sqrt(spread / len(counts))
    return Sampled(ends=(value - width, value + width), variance=spread, count=sum(counts), what=what)


def _counts(fits: pandas.DataFrame, column: str) -> list[float]:
    """The number of pairs or examples of each fit; empty where it is not known of all of them."""
    counts = [float(count) for count in fits[column]] if column in fits else []
    return counts if all(isfinite(count) and count > 0 for count in counts) else []


def _different(fits: pandas.DataFrame, column: str, counts: list[float]) -> list[float]:
    """How many of the counted pairs or examples are different ones; repeated ones tell nothing new.

    Of label-changing pairs, as many as of all pairs; where the table does not say, all of them.
    """
    if column == PAIRS_CHANGING:
        known, others = _counts(fits, DATA + PAIRS_DISTINCT), _counts(fits, PAIRS_PRESERVING)
        others = others or [0.0] * len(counts)
        shares = [each / (count + other) for each, count, other in zip(known, counts, others, strict=False)]
    else:
        known = _counts(fits, DATA + BASES_DISTINCT) if column == EXAMPLES else []
        shares = [each / count for each, count in zip(known, counts, strict=False)]
    return [count * min(share, 1.0) for count, share in zip(counts, shares, strict=True)] if shares else counts


def _student(freedom: int) -> float:
    if freedom <= len(_T):
        return _T[freedom - 1]
    # Cornish and Fisher's expansion, within 0.003 from here on.
    first = (_Z**3 + _Z) / 4
    second = (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    return _Z + first / freedom + second / freedom**2
