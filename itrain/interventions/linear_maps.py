"""Alignment by a linear map that need not be a rotation: it may read one direction and write another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.interventions.blocks import Blocks
from itrain.interventions.featurizers import Featurizer

LEAST = 0.1
"""The least eigenvalue of the map, so that its inverse stays small."""


class LinearMap(Featurizer):
    """Coordinates under a learned symmetric map: features = A h, with no error; A = M M^T + 0.1 I is positive definite.

    It starts near the identity, and so near the activation's own first features: where these carry the variables, a
    good start is no finding. Grant 2025, "Model Alignment Search", whose signs of columns change no interchange and are
    left out.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.num_features = hidden_size
        self.factor = nn.Parameter(torch.randn(hidden_size, hidden_size) / hidden_size**0.5)

    @property
    def matrix(self) -> Float[Tensor, "hidden hidden"]:
        # Torch inverts in fp32 at least.
        factor = self.factor.to(torch.promote_types(self.factor.dtype, torch.float32))
        return factor @ factor.T + LEAST * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)

    def encode(
        self, activation: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch hidden"]]:
        return activation @ self.matrix, torch.zeros_like(activation)

    def decode(
        self, features: Float[Tensor, "*batch hidden"], error: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return features @ torch.linalg.inv(self.matrix) + error


class LinearDAS(Blocks):
    """Swaps blocks of coordinates of one learned linear map: A^-1 (m * A s + (1 - m) * A h), A positive definite.

    ``blocks`` gives each variable its number of coordinates; see :class:`~itrain.interventions.blocks.Blocks`. A
    rotation writes along the direction that it reads; this map need not, so that it can leave correlations of a
    variable with others as they are.

    Args:
        blocks: the number of coordinates of each variable, or of all of them.
    """

    def __init__(self, hidden_size: int, *, blocks: int | Mapping[str, int] = 1) -> None:
        super().__init__(hidden_size, blocks=blocks)
        self.map = LinearMap(hidden_size)

    @property
    def featurizer(self) -> Featurizer:
        return self.map

    def untrained(self) -> LinearDAS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LinearDAS(self.hidden_size, blocks=self.blocks)
