"""Strict accuracy: whether an answer stays where all that should not matter to it is resampled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from itrain.metrics.gathering import gather_counts
from itrain.metrics.interchange import UNUSED, is_right


def strict_accuracy(
    logits: Sequence[Float[Tensor, "batch ... vocabulary"]], label: Int[Tensor, "batch ..."]
) -> Float[Tensor, ""]:
    """1/(M N) sum_mn [the logits of pair n under the resampling of node m give its base's label].

    Args:
        logits: the answers under the resampling of each node alone.
        label: the answers of the bases as they are; those that are not known do not count.
    """
    known = is_known(label)
    return torch.stack([is_right(each, label)[known] for each in logits]).float().mean()


def is_known(label: Int[Tensor, "batch ..."]) -> Bool[Tensor, " batch"]:
    """Whether a pair's label says anything: that of a base may not be known."""
    return (label != UNUSED).view(len(label), -1).any(1)


class StrictAccuracy(Metric):
    """The mean over nodes of the share of answers that stay right when the node is resampled.

    A node is a part of the model that an alignment leaves to no variable. Gupta et al. 2024, "InterpBench:
    Semi-Synthetic Transformers for Evaluating Mechanistic Interpretability Techniques". The states are integers and sum
    over processes. The strict accuracy of no pairs is nan.
    """

    full_state_update = False
    higher_is_better = True
    right: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__(dist_sync_fn=gather_counts)
        for name in ("right", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "batch ... vocabulary"], label: Int[Tensor, "batch ..."]) -> None:
        """Add the answers on some bases while one node is resampled."""
        known = is_known(label)
        self.right += (is_right(logits, label) & known).sum()
        self.total += known.sum()

    def compute(self) -> Float[Tensor, ""]:
        return self.right / self.total
