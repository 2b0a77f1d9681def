"""Logit differences: of two answers, one is to be ahead, or ahead by as much as a causal model says."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from itrain.bounds import require_at_least
from itrain.data import CounterfactualBatch
from itrain.metrics import UNUSED
from itrain.objectives.base import Objective, Outcome, mean_of_used


class LogitMargin(Objective):
    """How far the counterfactual label's logit falls short of being ``margin`` ahead of the contrast's.

    loss = max(0, margin - (l(counterfactual label) - l(contrast label))), in logits; without a margin it is
    -(l(counterfactual label) - l(contrast label)), which has no lower bound. Of answers of several tokens it is the
    mean over those tokens of the counterfactual label that the contrast has too.

    Args:
        margin: in logits; None: none.
        weight: as in :class:`~itrain.objectives.base.Objective`.
    """

    def __init__(self, *, margin: float | None = None, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        require_at_least(0, margin=margin)
        self.margin = margin

    def forward(self, outcome: Outcome) -> Float[Tensor, " batch"]:
        batch = outcome.batch
        ahead = _difference(outcome.logits, batch.counterfactual_label, batch.contrast_label)
        return -ahead if self.margin is None else (self.margin - ahead).clamp(min=0)


class LogitDifferenceError(Objective):
    """The squared error of the difference of two answers' logits: (l(more) - l(less) - difference)^2.

    What it should be after the interchange, and of which two answers, the task says: ``Task.difference``. In MIB's
    indirect object identification it is a linear function of the variables, and this is the loss of its baselines.

    Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark", section 4.
    """

    def forward(self, outcome: Outcome) -> Float[Tensor, " batch"]:
        batch = outcome.batch
        self.require(batch)
        assert batch.difference is not None and batch.compared is not None
        more, less = batch.compared.unbind(1)
        found = _difference(outcome.logits, more, less)
        return (found - batch.difference.to(found)).square()

    def require(self, batch: CounterfactualBatch) -> None:
        if batch.difference is None:
            raise ValueError(
                "the task does not say by how much which answer's logit should be ahead; let its difference() say so, "
                "or train by cross entropy"
            )


def _difference(
    logits: Float[Tensor, "batch ... vocabulary"], more: Int[Tensor, "batch ..."], less: Int[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """l(more) - l(less), the mean over the tokens that both have."""
    both = (more != UNUSED) & (less != UNUSED)
    indices = [each.where(both, 0).unsqueeze(-1) for each in (more, less)]
    first, second = (logits.gather(-1, each)[..., 0] for each in indices)
    return (first - second) * both if both.ndim == 1 else mean_of_used(first - second, both)
