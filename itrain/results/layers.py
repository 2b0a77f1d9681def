"""A method over all layers: the best position of each, as benchmarks aggregate their maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from itrain.results.columns import LAYER, PLACE

if TYPE_CHECKING:
    import pandas


def mean_over_layers(fits: pandas.DataFrame, figure: str) -> float | None:
    """The mean over layers of a figure at the best position of each; None where there is one layer.

    1/L sum_l max_p figure(l, p), with the mean over seeds and ranks at each site. Mueller et al. 2025, "MIB", section
    4; Arora et al. 2024, "CausalGym", section 4, take the mean over tasks of it.
    """
    found: Any = fits.loc[fits[figure].notna()].groupby(PLACE, sort=False)[figure].mean()
    layers = found.groupby(level=LAYER).max()
    return float(layers.mean()) if len(layers) > 1 else None
