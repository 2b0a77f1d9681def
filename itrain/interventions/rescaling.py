"""Rescaling: each feature is multiplied by a learned number, and another is added."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.interventions.base import Affine, Intervention


class RED(Intervention):
    """Learns a factor and a bias for each feature: l * h + b. l starts as 1 and b as 0, so that nothing changes.

    Wu et al. 2024, "Advancing Parameter Efficiency in Fine-tuning via Representation Editing"; b = 0 would be (IA)^3.
    """

    takes_source: ClassVar[bool] = False

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = self.rank = hidden_size
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return base * self.scale.to(base.dtype) + self.bias.to(base.dtype)

    def affine(self) -> Affine:
        return Affine(self.scale.detach().double().diag(), self.bias.detach().double())
