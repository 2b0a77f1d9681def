"""Logit differences: by how much one answer wins over another, and what an intervention leaves of it (FLDD)."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from itrain.metrics.gathering import gather_counts
from itrain.metrics.interchange import UNUSED


def logit_difference(
    logits: Float[Tensor, "batch ... vocabulary"],
    label: Int[Tensor, "batch ..."],
    other: Int[Tensor, "batch ..."],
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, " batch"]:
    """logit[label] - logit[other], which is log p(label) - log p(other).

    Labels of several tokens are compared at the first place where both have tokens and these differ, given the same
    tokens before it. NaN where there is no such place: the labels are equal, or one begins the other.
    """
    label, other = label.view(len(label), -1), other.view(len(other), -1)
    apart = _apart(label, other)
    fork = apart.long().argmax(1, keepdim=True)
    logits = logits.view(len(logits), -1, logits.shape[-1]).take_along_dim(fork[..., None], 1)[:, 0]
    upper, lower = (
        logits.take_along_dim(each.take_along_dim(fork, 1).clamp(min=0), 1)[:, 0].to(dtype) for each in (label, other)
    )
    return (upper - lower).where(apart.any(1), torch.nan)


def _apart(label: Int[Tensor, "batch tokens"], other: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """Where both labels have tokens and these differ."""
    return (label != other) & (label != UNUSED) & (other != UNUSED)


def fldd(clean: Float[Tensor, " *figures"], intervened: Float[Tensor, " *figures"]) -> Float[Tensor, " *figures"]:
    """100 (1 - LD_intervened / LD_clean), in percent: 0 where nothing moves, 100 at a tie, more where it is reversed.

    The fractional logit difference decrease of Makelov et al. 2024, "Is This the Subspace You Are Looking for?". Their
    code divides means: both logit differences, of the base's answer over the counterfactual one, are means over pairs
    before they are divided, so that no pair with a small clean difference decides the figure.
    """
    return 100 * (1 - intervened / clean)


class OfChanging(Metric):
    """What becomes of the preferences of label-changing pairs, from the clean run to the intervened one.

    A pair of which one label begins the other has no preference, and is left out.

    Sums are kept in ``dtype`` over all processes: in fp64 how pairs are divided changes the last of 16 digits at most.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dist_sync_fn=gather_counts)
        self.kept_in = dtype
        self.add_state("sums", torch.zeros(2, dtype=dtype), dist_reduce_fx="sum")

    def update(
        self,
        clean: Float[Tensor, "batch ... vocabulary"],
        logits: Float[Tensor, "batch ... vocabulary"],
        base_label: Int[Tensor, "batch ..."],
        label: Int[Tensor, "batch ..."],
    ) -> None:
        """Add pairs, given the base model's own logits on the bases and those under the intervention."""
        changes = _apart(base_label.view(len(label), -1), label.view(len(label), -1)).any(1)
        before, after = (logit_difference(each, base_label, label, self.kept_in) for each in (clean, logits))
        self.add(before, after, changes)

    @abstractmethod
    def add(
        self, before: Float[Tensor, " batch"], after: Float[Tensor, " batch"], changes: Bool[Tensor, " batch"]
    ) -> None:
        """Add the logit differences of pairs, clean and intervened, and whether the label changes."""


class LogitDifference(OfChanging):
    """The mean logit differences of the base's answer over the counterfactual one, clean and intervened, and FLDD.

    Over pairs whose label changes; the figures of no pairs are nan.
    """

    pairs: Tensor

    def __init__(self, *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype=dtype)
        self.add_state("pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def add(
        self, before: Float[Tensor, " batch"], after: Float[Tensor, " batch"], changes: Bool[Tensor, " batch"]
    ) -> None:
        self.sums += torch.stack([before, after]).where(changes, 0).sum(1)
        self.pairs += changes.sum()

    def compute(self) -> dict[str, Tensor]:
        """``logit_difference_clean``, ``logit_difference`` and ``fldd``."""
        clean, intervened = self.sums / self.pairs
        return {
            "logit_difference_clean": clean,
            "logit_difference": intervened,
            "fldd": fldd(clean, intervened),
        }
