"""Scaling: how much of an intervention's effect is applied where it acts after its training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.interventions.base import Affine, Intervention


class Scaled(Intervention):
    """An intervention with so much of its effect: base + strength * (f(base, source) - base).

    Args:
        intervention: f, as evaluated.
        strength: 1 is the intervention as it is, 0 none of it.
    """

    def __init__(self, intervention: Intervention, *, strength: float) -> None:
        super().__init__()
        self.inner, self.strength = intervention, strength
        self.hidden_size, self.rank = intervention.hidden_size, intervention.rank
        self.takes_source = intervention.takes_source  # type: ignore[misc]

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"] | None
    ) -> Float[Tensor, "*batch hidden"]:
        return base + self.strength * (self.inner(base, source) - base)

    def edit_for(self, variable: str) -> Callable[[Tensor, Tensor | None], Tensor]:
        edit = self.inner.edit_for(variable)
        return lambda base, source: base + self.strength * (edit(base, source) - base)

    def affine(self) -> Affine | None:
        found = self.inner.affine()
        if found is None:
            return None
        matrix, constant = found
        if matrix is not None:
            one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
            matrix = one + self.strength * (matrix - one)
        return Affine(matrix, None if constant is None else self.strength * constant)

    def extra_repr(self) -> str:
        return f"strength={self.strength:g}"
