"""The size of edits: what an edit changes is to be little."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from itrain.objectives.base import Objective, Outcome


class EditSize(Objective):
    """How far edits move activations, relative to their length: the mean over placements of |new - h|_p / |h|_2.

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
        sizes = []
        for before, after in outcome.edited.values():
            moved, there = (each.flatten(1) for each in (after - before, before))
            length = there.detach().norm(dim=1)
            sizes.append(moved.norm(p=self.norm, dim=1) / length.clamp(min=1e-12))
        return sum(sizes) / len(sizes)  # type: ignore[return-value]
