"""Interchanges without training: the ceiling and the floor for a learned one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.interventions.base import Intervention, require_rank


class FullVector(Intervention):
    """Swaps the whole activation: s. Also called activation patching; no subspace at the site can carry more."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = self.rank = hidden_size

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return source


class RandomSubspace(Intervention):
    """Swaps the coordinates in a fixed random subspace: h + R^T (R s - R h), R drawn from the seed, (rank, hidden).

    Args:
        rank: dimensions of the subspace.
        seed: of the draw.
    """

    rows: Float[Tensor, "rank hidden"]

    def __init__(self, hidden_size: int, *, rank: int = 1, seed: int = 0) -> None:
        super().__init__()
        require_rank(rank, hidden_size)
        self.hidden_size, self.rank = hidden_size, rank
        columns = torch.linalg.qr(torch.randn(hidden_size, rank, generator=torch.Generator().manual_seed(seed)))[0]
        self.register_buffer("rows", columns.T.contiguous())

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return base + (source - base) @ self.rows.T @ self.rows
