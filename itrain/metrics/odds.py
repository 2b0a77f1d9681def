"""Odds: how far an interchange moves the model's preference between two answers, and selectivity against a control."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from itrain.metrics.differences import OfChanging, logit_difference


def odds(
    clean: Float[Tensor, "batch ... vocabulary"],
    logits: Float[Tensor, "batch ... vocabulary"],
    base_label: Int[Tensor, "batch ..."],
    label: Int[Tensor, "batch ..."],
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, " batch"]:
    """log p(y_b) - log p(y_s) of the clean run + log p(y_s) - log p(y_b) of the intervened one, in nats.

    y_b is the base's label, y_s the counterfactual one. 0 where nothing moves; as large as the clean preference at a
    tie. Labels of several tokens are compared as in :func:`~itrain.metrics.differences.logit_difference`.

    Arora, Jurafsky and Potts 2024, "CausalGym: Benchmarking causal interpretability methods on linguistic tasks".
    """
    before, after = (logit_difference(each, base_label, label, dtype) for each in (clean, logits))
    return before - after


class Odds(OfChanging):
    """The mean odds over pairs whose label changes, their spread, and the share of pairs whose preference is reversed.

    ``iia_flip`` counts pairs in which the clean run prefers the base's label and the intervened one the counterfactual
    label, as a share of all. The figures of no pairs are nan.
    """

    higher_is_better = True
    counts: Tensor

    def __init__(self, *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype=dtype)
        self.add_state("counts", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    def add(
        self, before: Float[Tensor, " batch"], after: Float[Tensor, " batch"], changes: Bool[Tensor, " batch"]
    ) -> None:
        moved = (before - after).where(changes, 0)
        self.sums += torch.stack([moved.sum(), (moved**2).sum()])
        self.counts += torch.stack([changes.sum(), (changes & (before > 0) & (after < 0)).sum()])

    def compute(self) -> dict[str, Tensor]:
        """``odds``, ``odds_spread`` (their standard deviation over pairs) and ``iia_flip``."""
        pairs, flipped = self.counts
        mean, square = self.sums / pairs
        return {"odds": mean, "odds_spread": (square - mean**2).clamp(min=0).sqrt(), "iia_flip": flipped / pairs}
