"""95% intervals of figures: over pairs or examples, and over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING

from itrain.results.columns import COUNTED, RANK_FOUND, SELECTIVITY, is_known

if TYPE_CHECKING:
    import pandas

LEVEL = 0.95
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""Student's t for 1 to 9 degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95% interval, where pairs, examples or seeds give one."""

    value: float
    interval: tuple[float, float] | None = None
    over: str = ""
    """What the interval is over, for example ``3 seeds`` or ``128 pairs``."""
    form: str = ".2f"
    """How numbers are written."""

    def __str__(self) -> str:
        return self.short if self.interval is None else f"{self.short} ({self.between(' to ')})"

    @property
    def short(self) -> str:
        """The value alone."""
        return format(self.value, self.form)

    def between(self, separator: str) -> str:
        """The ends of the interval; nothing without one."""
        return separator.join(format(end, self.form) for end in self.interval or ())


def estimated(fits: pandas.DataFrame, figure: str) -> Estimate:
    """The mean of a figure over seeds; of one seed, the share of its label-changing pairs or of its examples."""
    values = [float(value) for value in fits[figure].dropna()]
    form = ".2f" if is_known(figure) else ".3g"
    if len(values) > 1:
        low, high = over_seeds(values)
        if is_known(figure):
            # Selectivity is a difference of shares; the others are shares, or the count of a rank.
            low = max(low, -1.0 if figure == SELECTIVITY else 0.0)
            high = min(high, inf if figure == RANK_FOUND else 1.0)
        return Estimate(value=fmean(values), interval=(low, high), over=f"{len(values)} seeds", form=form)
    counted, what = COUNTED.get(figure, ("", ""))
    count = float(fits[counted].iloc[0]) if counted in fits else 0
    if count > 0:
        return Estimate(value=values[0], interval=over_pairs(values[0], count), over=f"{count:.0f} {what}")
    return Estimate(value=values[0], form=form)


def over_pairs(share: float, pairs: float) -> tuple[float, float]:
    """Wilson's interval of a share of independent pairs or examples (Wilson 1927).

    ``(share + z^2 / 2n +- z sqrt(share (1 - share) / n + z^2 / 4n^2)) / (1 + z^2 / n)``
    """
    half = _Z**2 / (2 * pairs)
    width = _Z * sqrt(share * (1 - share) / pairs + (half / _Z) ** 2)
    return max(0.0, (share + half - width) / (1 + 2 * half)), min(1.0, (share + half + width) / (1 + 2 * half))


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval of the mean of two or more seeds: ``mean +- t s / sqrt(n)``."""
    width = _student(len(values) - 1) * stdev(values) / sqrt(len(values))
    return fmean(values) - width, fmean(values) + width


def _student(freedom: int) -> float:
    if freedom <= len(_T):
        return _T[freedom - 1]
    # Cornish and Fisher's expansion, within 0.003 from here on.
    first = (_Z**3 + _Z) / 4
    second = (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    return _Z + first / freedom + second / freedom**2
