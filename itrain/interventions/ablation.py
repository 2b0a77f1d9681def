"""Ablations: the activation is replaced by one that carries no information about the example."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itrain.interventions.base import Affine, Intervention


class Zero(Intervention):
    """Replaces the activation by 0."""

    takes_source: ClassVar[bool] = False

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = self.rank = hidden_size

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return torch.zeros_like(base)

    def affine(self) -> Affine:
        return Affine(torch.zeros(self.hidden_size, self.hidden_size, dtype=torch.float64))


class Mean(Intervention):
    """Replaces the activation by its mean over the training examples, mu = 1/N sum_n h_n.

    Raises:
        RuntimeError: it has not been fitted.
    """

    takes_source: ClassVar[bool] = False
    fits_activations = True
    mean: Float[Tensor, " hidden"]

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = self.rank = hidden_size
        self.register_buffer("mean", torch.full((hidden_size,), torch.nan))

    def fit(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None = None
    ) -> None:
        self.mean.copy_(activations.mean(0))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return self._known().expand_as(base)

    def affine(self) -> Affine:
        mean = self._known().double()
        return Affine(mean.new_zeros(self.hidden_size, self.hidden_size), mean)

    def _known(self) -> Float[Tensor, " hidden"]:
        if self.mean.isnan().any():
            raise RuntimeError("the mean is unknown: call fit(activations) first, or train, which does")
        return self.mean
