"""Distributions: the answer under the edits is to be distributed as that of another run."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor, logaddexp
from torch.nn.functional import kl_div, log_softmax

from itrain.data import CounterfactualBatch
from itrain.metrics import UNUSED
from itrain.objectives.base import Objective, Outcome, mean_of_used, require_one_source, require_source_answers

Target: TypeAlias = Literal["source", "base"]


class DistributionObjective(Objective):
    """A divergence of the answer's distribution q under the edits from p, that of an unedited run.

    Args:
        target: whose distribution p is: the source's, as where a prompt says what the edit is to do, or the base's,
            where nothing may change. Of isolate pairs it is the base's in either case.
        weight: as in :class:`~itrain.objectives.base.Objective`.

    Raises:
        ValueError: the target is another, or pairs do not have one source, of one answer token, that answers as the
            edit should.
    """

    def __init__(self, *, target: Target = "source", weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        if target not in ("source", "base"):
            raise ValueError(f"target={target!r}: use 'source' or 'base'")
        self.target: Target = target

    def forward(self, outcome: Outcome) -> Float[Tensor, " batch"]:
        target = outcome.source_logits() if self.target == "source" else outcome.base_logits()
        losses = self.divergence(log_softmax(target.to(outcome.logits), -1), log_softmax(outcome.logits, -1))
        return losses if losses.ndim == 1 else mean_of_used(losses, outcome.batch.counterfactual_label != UNUSED)

    @abstractmethod
    def divergence(
        self, target: Float[Tensor, "batch ... vocabulary"], found: Float[Tensor, "batch ... vocabulary"]
    ) -> Float[Tensor, "batch ..."]:
        """The divergence, from log p and log q."""

    def require(self, batch: CounterfactualBatch) -> None:
        if self.target == "source":
            require_one_source(batch)
            require_source_answers(batch)


class KL(DistributionObjective):
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)), in nats."""

    def divergence(
        self, target: Float[Tensor, "batch ... vocabulary"], found: Float[Tensor, "batch ... vocabulary"]
    ) -> Float[Tensor, "batch ..."]:
        return _kl(target, found)


class JensenShannon(DistributionObjective):
    """JS(p, q) = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats, from 0 to log 2.

    The distribution matching of concept DAS, towards the source's distribution (arXiv 2602.05234).
    """

    def divergence(
        self, target: Float[Tensor, "batch ... vocabulary"], found: Float[Tensor, "batch ... vocabulary"]
    ) -> Float[Tensor, "batch ..."]:
        middle = logaddexp(target, found) - math.log(2)
        return (_kl(target, middle) + _kl(found, middle)) / 2


def _kl(p: Float[Tensor, "batch ... vocabulary"], q: Float[Tensor, "batch ... vocabulary"]) -> Tensor:
    return kl_div(q, p, reduction="none", log_target=True).sum(-1)
