"""Cross entropy: the counterfactual label is to be likely."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from itrain.metrics import UNUSED
from itrain.objectives.base import Objective, Outcome, mean_of_used


class CrossEntropy(Objective):
    """-log p(counterfactual label), the mean over its tokens.

    Geiger et al. 2024, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations", eq. 5.
    """

    def forward(self, outcome: Outcome) -> Float[Tensor, " batch"]:
        return answer_loss(outcome.logits, outcome.batch.counterfactual_label)


def answer_loss(
    logits: Float[Tensor, "batch ... vocabulary"], label: Int[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """The cross entropy of each pair's label, in nats: the mean over its tokens."""
    losses = cross_entropy(logits.movedim(-1, 1), label, reduction="none", ignore_index=UNUSED)
    return losses if losses.ndim == 1 else mean_of_used(losses, label != UNUSED)
