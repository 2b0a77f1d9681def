"""Steering: one vector is added to the activation."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.interventions.base import Intervention


class SteeringVector(Intervention):
    """Adds a learned vector: h + alpha w. w starts as 0, so that at first nothing changes.

    Wu et al. 2025, "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders", there called SSV.

    Args:
        hidden_size: features of the activation.
        alpha: the strength, which may be changed after training: ``intervention.alpha``.
    """

    takes_source: ClassVar[bool] = False

    def __init__(self, hidden_size: int, *, alpha: float = 1.0) -> None:
        super().__init__()
        self.hidden_size, self.rank, self.alpha = hidden_size, 1, alpha
        self.vector = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return base + self.alpha * self.vector.to(base.dtype)
