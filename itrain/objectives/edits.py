"""The size of edits: what an edit changes is to be little."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from itrain.inputs import ModelInputs
from itrain.objectives.base import Objective, Outcome
from itrain.placements import Placement


class EditSize(Objective):
    """How far edits move activations: the mean over placements of |new - h|_p, in the activations' own unit.

    The norm is of all the tokens that an example has at the placement together.

    Args:
        norm: p, 1 for edits of few features, 2 for short ones.
        weight: as in :class:`~itrain.objectives.base.Objective`.

    Raises:
        ValueError: the norm is another.
    """

    needs_edited: ClassVar[bool] = True

    def __init__(self, *, norm: Literal[1, 2] = 2, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        if norm not in (1, 2):
            raise ValueError(f"norm={norm}: use 1 or 2")
        self.norm = norm

    def forward(self, outcome: Outcome) -> Float[Tensor, " batch"]:
        moved = {
            placement: _own(after - before, outcome.batch.base, placement)
            for placement, (before, after) in outcome.edited.items()
        }
        sizes = [each.flatten(1).norm(p=self.norm, dim=1) for each in moved.values()]
        return sum(sizes) / len(sizes)  # type: ignore[return-value]


def _own(
    moved: Float[Tensor, "batch *places features"], inputs: ModelInputs, placement: Placement
) -> Float[Tensor, "batch *places features"]:
    """What is moved of each example, with 0 in the places of tokens that it lacks, where others stand in."""
    site = placement.write
    if inputs.tokens is None or not inputs.are_tokens(site, moved):
        return moved
    present = inputs.present(site).to(moved.device, non_blocking=True)
    return moved * present.view(*present.shape, *[1] * (moved.ndim - 2))
