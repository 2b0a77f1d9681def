"""What a run says of the divergence of intervened from natural activations."""

from __future__ import annotations

from math import nan

from itrain.results.columns import BEFORE, DIVERGENCE, NATURAL_DIVERGENCE, ROUND_TRIP, TEST
from itrain.results.parts import Results

OF_DIVERGENCE = frozenset({DIVERGENCE, NATURAL_DIVERGENCE, ROUND_TRIP})


def _beside(intervened: float, natural: float) -> str:
    """Both as text, with as many digits as tell them apart."""
    return (
        f"{intervened:.3g} (between natural ones: {natural:.3g})"
        if intervened == intervened
        else "too few pairs to compare"
    )


def divergence_lines(results: Results) -> list[str]:
    """A line for each site, and where there are several one for their mean."""
    lines = []
    for key, value in results.items():
        place, figure, site = (*key.split("/", 2), "", "")[:3]
        if place != TEST or figure != DIVERGENCE:
            continue
        said = _beside(value, results.get(f"{TEST}/{NATURAL_DIVERGENCE}" + (f"/{site}" if site else ""), nan))
        start = results.get(key.replace(TEST, BEFORE, 1))
        where = f" at {site}" if site else ""
        before = "" if start is None else f"; before training: {start:.3g}"
        lines.append(f"divergence of intervened from natural activations{where}: {said}{before}")
    if (lost := results.get(f"{TEST}/{ROUND_TRIP}")) is not None:
        lines.append(f"lost to rounding by the map and its inverse: {lost:.2g} of the largest feature")
    return lines
