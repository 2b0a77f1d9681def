"""Counterfactual latents: an edited activation is to be one that the unedited model has in a like situation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from itrain.bounds import require_at_least
from itrain.data import CounterfactualBatch
from itrain.interventions.base import Intervention
from itrain.objectives.base import Objective, Outcome
from itrain.placements import Placement

Form: TypeAlias = Literal["sum", "mean"]
Within: TypeAlias = Literal["activation", "subspaces"]
Projection: TypeAlias = Callable[[Tensor], Tensor]


class CounterfactualLatent(Objective):
    """|h - n|^2 / 2 - cos(h, n) / 2 of an edited activation h and a natural one n, the mean over tokens and sites.

    n is the activation of an unedited input whose variables have the values that the edit is to give them, without a
    gradient. Grant et al. 2025, "Addressing divergent representations from causal interventions on neural networks".

    Args:
        form: ``sum`` is the paper's loss; ``mean`` that of the authors' code, |h - n|^2 / D + 1 - cos(h, n), whose
            size does not grow with the D features.
        within: ``activation`` compares all of h; ``subspaces`` compares what the intervention swaps of it, and sums
            over the task's variables: h and n are replaced by A^-1 M A h and A^-1 M A n, with M a variable's features.
        naturals: over how many natural inputs n is averaged.
        weight: as in :class:`~itrain.objectives.base.Objective`.

    Raises:
        ValueError: an argument is another, or ``subspaces`` are asked of an intervention that swaps nothing.
    """

    needs_edited: ClassVar[bool] = True

    def __init__(
        self, *, form: Form = "sum", within: Within = "activation", naturals: int = 1, weight: float = 1.0
    ) -> None:
        super().__init__(weight=weight)
        require_at_least(1, naturals=naturals)
        if form not in ("sum", "mean"):
            raise ValueError(f"form={form!r}: use 'sum' or 'mean'")
        if within not in ("activation", "subspaces"):
            raise ValueError(f"within={within!r}: use 'activation' or 'subspaces'")
        self.form: Form = form
        self.within: Within = within
        self.naturals = naturals

    def forward(self, outcome: Outcome) -> Float[Tensor, " batch"]:
        # Of several placements of one site, the last one's activation has the edits of all.
        final = {placement.write: (placement, each.after) for placement, each in outcome.edited.items()}
        if self.within == "activation":
            losses = [self._whole(placement, edited, outcome) for placement, edited in final.values()]
        else:
            losses = [self._parts(each, final[each.write][1], outcome) for each in outcome.edited]
        return sum(losses) / len(losses)  # type: ignore[return-value]

    def require(self, batch: CounterfactualBatch) -> None:
        if len(batch.natural) < self.naturals:
            raise ValueError(
                f"the pairs have {len(batch.natural)} natural inputs each, and naturals={self.naturals} are averaged; "
                "take the pairs from a CounterfactualDataModule, and let the training prepare them"
            )

    def _whole(self, placement: Placement, edited: Tensor, outcome: Outcome) -> Float[Tensor, " batch"]:
        edited, natural = self._compared(placement, edited, outcome)
        return _over_tokens(self.distance(edited, natural), placement, edited, outcome)

    def _parts(self, placement: Placement, edited: Tensor, outcome: Outcome) -> Float[Tensor, " batch"]:
        edited, natural = self._compared(placement, edited, outcome)
        losses = [self.distance(of(edited), of(natural).detach()) for of in _projections(placement, outcome)]
        return _over_tokens(torch.stack(losses).sum(0), placement, edited, outcome)

    def _compared(self, placement: Placement, edited: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        """The edited activation and the natural one, in fp32 or more."""
        exact = torch.promote_types(edited.dtype, torch.float32)
        return edited.to(exact), outcome.natural(placement.write, self.naturals).to(exact)

    def distance(
        self, edited: Float[Tensor, "*batch features"], natural: Float[Tensor, "*batch features"]
    ) -> Float[Tensor, " *batch"]:
        """The loss of each activation."""
        squares, cosine = (edited - natural).square(), cosine_similarity(edited, natural, dim=-1)
        return (squares.sum(-1) - cosine) / 2 if self.form == "sum" else squares.mean(-1) + 1 - cosine


def _over_tokens(
    losses: Float[Tensor, "batch ..."], placement: Placement, edited: Tensor, outcome: Outcome
) -> Float[Tensor, " batch"]:
    """The mean over the tokens that each example has."""
    inputs, at = outcome.batch.base, placement.write
    if losses.ndim == 1 or inputs.tokens is None or not inputs.are_tokens(at, edited):
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses
    present = inputs.present(at).to(losses.device, non_blocking=True)
    return losses.where(present, 0).sum(1) / present.sum(1)


def _projections(placement: Placement, outcome: Outcome) -> Iterator[Projection]:
    """What the placement's intervention swaps of an activation, for each variable that it serves."""
    intervention = outcome.interventions[placement]
    if not intervention.takes_source:
        raise ValueError(
            f"site '{placement}': {type(intervention).__name__} swaps no features of a source, so that within="
            "'subspaces' has none to compare; use within='activation'"
        )
    served = [variable for variable in outcome.batch.variables if placement.serves(variable)]
    for edit in dict.fromkeys(intervention.edit_for(variable) for variable in served):
        yield lambda activation, edit=edit: _swapped(edit, intervention, activation)


def _swapped(edit: Callable[[Tensor, Tensor], Tensor], intervention: Intervention, activation: Tensor) -> Tensor:
    """What swapping features into 0 gives: their part of the activation, in a linear basis."""
    shape = activation.shape
    seen = activation if shape[-1] == intervention.hidden_size else activation.flatten(1)
    return edit(torch.zeros_like(seen), seen).view(shape)
