"""Steering: one vector is added to the activation."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.interventions.base import Affine, Intervention, saved_lately


class SteeringVector(Intervention):
    """Adds a learned vector: h + alpha w. w starts as 0, so that at first nothing changes.

    Wu et al. 2025, "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders", there called SSV.

    Args:
        hidden_size: features of the activation.
        alpha: the strength, which may be changed after training: ``intervention.alpha = 2.0``. It is exported.
    """

    takes_source: ClassVar[bool] = False
    strength: Float[Tensor, ""]

    def __init__(self, hidden_size: int, *, alpha: float = 1.0) -> None:
        super().__init__()
        if not math.isfinite(alpha):
            raise ValueError(f"alpha={alpha}: give a finite number")
        self.hidden_size, self.rank = hidden_size, 1
        self.vector = nn.Parameter(torch.zeros(hidden_size))
        self.register_buffer("strength", torch.tensor(float(alpha)))
        saved_lately(self, "strength")

    @property
    def alpha(self) -> float:
        return self.strength.item()

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.strength.fill_(value)

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return base + (self.strength * self.vector).to(base.dtype)

    def affine(self) -> Affine:
        return Affine(constant=(self.strength * self.vector).detach().double())
