"""Interchange intervention accuracy and probe accuracy: a function and a torchmetrics class side by side."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

Rule = Literal["argmax", "pairwise"]
RULES: tuple[Rule, ...] = ("argmax", "pairwise")


def is_right(
    logits: Float[Tensor, "batch vocabulary"],
    label: Int[Tensor, " batch"],
    contrast: Int[Tensor, " batch"] | None = None,
    rule: Rule = "argmax",
) -> Bool[Tensor, " batch"]:
    """Whether the logits give the label: ``argmax`` over all outputs, ``pairwise`` logit[label] > logit[contrast].

    Raises:
        ValueError: the pairwise rule is asked for without contrast labels.
    """
    if rule == "argmax":
        return logits.argmax(-1) == label
    if contrast is None:
        raise ValueError("the pairwise rule needs the label to compare with")
    rows = torch.arange(len(label), device=label.device)
    return logits[rows, label] > logits[rows, contrast]


class InterchangeAccuracy(Metric):
    """Interchange intervention accuracy (IIA) of one rule, split into label-changing and label-preserving pairs.

    IIA = 1/N sum_n [rule holds for the counterfactual label of pair n]. The states are integers and sum over processes,
    so the result does not depend on how the pairs were divided. A split without pairs is nan.

    Geiger et al. 2024, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations", eq. 6.
    """

    full_state_update = False
    higher_is_better = True
    right: Tensor
    pairs: Tensor

    def __init__(self, *, rule: Rule) -> None:
        super().__init__()
        self.rule: Rule = rule
        for name in ("right", "pairs"):
            self.add_state(name, torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        logits: Float[Tensor, "batch vocabulary"],
        label: Int[Tensor, " batch"],
        contrast: Int[Tensor, " batch"],
        changes: Bool[Tensor, " batch"],
    ) -> None:
        right = is_right(logits, label, contrast, self.rule)
        self.right += torch.stack([(right & ~changes).sum(), (right & changes).sum()])
        self.pairs += torch.stack([(~changes).sum(), changes.sum()])

    def compute(self) -> dict[str, Tensor]:
        """``iia``, ``iia_changing``, ``iia_preserving``, and the numbers of pairs behind the last two."""
        preserving, changing = self.right / self.pairs
        return {
            "iia": self.right.sum() / self.pairs.sum(),
            "iia_changing": changing,
            "iia_preserving": preserving,
            "pairs_changing": self.pairs[1],
            "pairs_preserving": self.pairs[0],
        }
