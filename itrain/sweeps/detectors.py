"""Rows of a sweep about detectors: a row for each detector and site, with its controls and shifts beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from itrain.results.columns import AUROC, AUROC_SPREAD, GAP, TEST
from itrain.sweeps.grid import Fit
from itrain.training.detecting import RANDOM
from itrain.training.monitoring import Monitoring


def of_detectors(
    figures: Mapping[str, float], fits: Sequence[Fit], training: Monitoring, batches: Iterable[Any]
) -> dict[str, dict[str, float]]:
    """The figures of each fit, of several concepts their means; ``batches`` are the training texts, for the gap."""
    trained, found = training.areas(batches), {}
    for fit in fits:
        own = _under(figures, f"/{training.told(fit.detector, str(fit.site))}")
        random = _under(figures, f"/{training.told(RANDOM, str(fit.site))}")
        beside = {f"{RANDOM}/{figure}": random[figure] for figure in (AUROC, AUROC_SPREAD) if figure in random}
        gap = trained[fit.detector, str(fit.site)] - own[AUROC]
        found[fit.name] = {**own, **beside, GAP: gap}
    return found


def _under(figures: Mapping[str, float], end: str) -> dict[str, float]:
    """The figures whose names have this end, without it: those of the test set, then ``shift/<name>/<figure>``."""
    return {
        key.removeprefix(f"{TEST}/").removesuffix(end): value for key, value in figures.items() if key.endswith(end)
    }
