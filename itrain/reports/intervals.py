"""How far a figure of a sweep may be from what it estimates: 95% intervals over pairs or examples and over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist, fmean, stdev

LEVEL = 0.95
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""Student's t for 1 to 9 degrees of freedom."""


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
    # Cornish and Fisher's expansion, which by now is within 0.003.
    first = (_Z**3 + _Z) / 4
    second = (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    return _Z + first / freedom + second / freedom**2
