"""Interchange intervention accuracy (IIA): whether an answer is right, and the share of the pairs where it is."""

from __future__ import annotations

from math import inf
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric

from itrain.metrics.gathering import gather_counts

Rule = Literal["argmax", "pairwise"]
RULES: tuple[Rule, ...] = ("argmax", "pairwise")
UNUSED = -100
"""Pads a label of several tokens where another example's is longer, as in torch's own losses."""


def likeliest(logits: Float[Tensor, "batch ... vocabulary"]) -> Int[Tensor, "batch ..."]:
    """The index of the largest logit; -1 where the largest is NaN or -inf, so that a dead model is never right."""
    largest, index = logits.max(-1)
    return index.where(largest > -inf, -1)


def is_right(
    logits: Float[Tensor, "batch ... vocabulary"],
    label: Int[Tensor, "batch ..."],
    contrast: Int[Tensor, "batch ..."] | None = None,
    rule: Rule = "argmax",
) -> Bool[Tensor, " batch"]:
    """Whether the logits give the label: ``argmax`` over all outputs, ``pairwise`` logit[label] > logit[contrast].

    A label of several tokens is right by ``argmax`` if each token is, given the right tokens before it, and by
    ``pairwise`` if it wins at the first place where both have tokens and these differ. One that begins the other cannot
    be told from it, and is not right. NaN logits are never right.

    Raises:
        ValueError: the pairwise rule is asked for without contrast labels.
    """
    if rule == "argmax":
        right = (likeliest(logits) == label) | (label == UNUSED)
        return right if right.ndim == 1 else right.all(-1)
    if contrast is None:
        raise ValueError("the pairwise rule needs contrast labels to compare with")
    rows: tuple[Tensor, ...] = (torch.arange(len(label), device=label.device),)
    if label.ndim == 2:
        both = (label != UNUSED) & (contrast != UNUSED)
        # Where they differ nowhere this is the first place, at which the label does not win against itself.
        rows += (((label != contrast) & both).long().argmax(1),)
        label, contrast = label[rows], contrast[rows]
    return logits[(*rows, label)] > logits[(*rows, contrast)]


def beats(
    logits: Float[Tensor, "batch ... vocabulary"], label: Int[Tensor, "batch ..."], others: Int[Tensor, "others ..."]
) -> Bool[Tensor, "batch others"]:
    """Whether the logits prefer the label to each of the others, as the pairwise rule of :func:`is_right` does.

    No logits are copied, however many others there are.
    """
    rows = torch.arange(len(label), device=label.device)[:, None]
    if label.ndim == 1:
        return logits[rows, label[:, None]] > logits[:, others]
    one, other = label[:, None], others[None]
    fork = ((one != other) & (one != UNUSED) & (other != UNUSED)).long().argmax(2)
    # As in is_right, a label that begins the other does not win against itself.
    ours, theirs = label.gather(1, fork), others.expand(len(label), -1, -1).gather(2, fork[..., None])[..., 0]
    return logits[rows, fork, ours] > logits[rows, fork, theirs]


class InterchangeAccuracy(Metric):
    """Interchange intervention accuracy (IIA) of one rule, split into label-changing and label-preserving pairs.

    IIA = 1/N sum_n [rule holds for the counterfactual label of pair n]. Isolate pairs ask for another variable than the
    one interchanged. Where there are such pairs, isolate is their IIA, cause is that of the others, and
    disentangle = (cause + isolate) / 2. The states are integers and sum over processes, so the result does not depend
    on how the pairs were divided. The IIA of no pairs is nan.

    Geiger et al. 2024, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations", eq. 6; Huang et al. 2024, "RAVEL: Evaluating Interpretability Methods on Disentangling Language
    Model Representations", section 3.
    """

    full_state_update = False
    higher_is_better = True
    right: Tensor
    pairs: Tensor

    def __init__(self, *, rule: Rule) -> None:
        super().__init__(dist_sync_fn=gather_counts)
        self.rule: Rule = rule
        for name in ("right", "pairs"):
            self.add_state(name, torch.zeros(2, 2, dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        logits: Float[Tensor, "batch ... vocabulary"],
        label: Int[Tensor, "batch ..."],
        contrast: Int[Tensor, "batch ..."],
        changes: Bool[Tensor, " batch"],
        isolates: Bool[Tensor, " batch"] | None = None,
    ) -> None:
        right = is_right(logits, label, contrast, self.rule)
        cells = one_hot(changes.long() if isolates is None else 2 * isolates + changes, 4)
        # Not cells[right]: how many rows that has, an accelerator would be waited for to tell.
        self.right += (cells * right[:, None]).sum(0).view(2, 2)
        self.pairs += cells.sum(0).view(2, 2)

    def compute(self) -> dict[str, Tensor]:
        """``iia``, ``iia_changing``, ``iia_preserving``, the numbers of pairs behind the last two, and where some pairs
        isolate ``cause``, ``isolate`` and ``disentangle``."""
        preserving, changing = self.right.sum(0) / self.pairs.sum(0)
        figures = {
            "iia": self.right.sum() / self.pairs.sum(),
            "iia_changing": changing,
            "iia_preserving": preserving,
            "pairs_changing": self.pairs[:, 1].sum(),
            "pairs_preserving": self.pairs[:, 0].sum(),
        }
        if self.pairs[1].any():
            cause, isolate = self.right.sum(1) / self.pairs.sum(1)
            figures |= {"cause": cause, "isolate": isolate, "disentangle": (cause + isolate) / 2}
        return figures
