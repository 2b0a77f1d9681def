"""The size of edits: what an edit changes is to be little."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from itrain.objectives.base import Objective, Outcome


class EditSize(Objective):
    """How far edits move activations: the mean over placements of |new - h|_p, in the activations' own unit.

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
        sizes = [(after - before).flatten(1).norm(p=self.norm, dim=1) for before, after in outcome.edited.values()]
        return sum(sizes) / len(sizes)  # type: ignore[return-value]
