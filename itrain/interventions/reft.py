"""Representation finetuning: low-rank edits of the activation itself, with no source."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize

from itrain.interventions.base import Affine, Intervention, require_rank
from itrain.interventions.featurizers import Subspace
from itrain.interventions.orthogonal import orthonormal_


class LoReFT(Intervention):
    """Sets the coordinates in a learned subspace: h + R^T (W h + b - R h), R of orthonormal rows, (rank, hidden).

    W, (rank, hidden), starts as R and b, (rank,), as 0, so that at first nothing changes. pyreft's start at random, as
    a linear layer's do, so that the coordinates are lost at first.

    Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", eq. 2.

    Raises:
        ValueError: the rank is larger than the activation.
    """

    takes_source: ClassVar[bool] = False

    def __init__(self, hidden_size: int, *, rank: int = 4) -> None:
        super().__init__()
        self.hidden_size, self.rank = hidden_size, rank
        self.subspace = Subspace(hidden_size, rank=rank)
        self.weight = nn.Parameter(self.subspace.rows.detach().clone())
        self.bias = nn.Parameter(torch.zeros(rank))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        with parametrize.cached():
            rows = self.subspace.rows.to(base.dtype)
            return base + (_map(base, self.weight, self.bias) - base @ rows.T) @ rows

    def affine(self) -> Affine:
        rows = self.subspace.rows
        return Affine.low_rank(rows, self.weight - rows, self.bias)


class DiReFT(Intervention):
    """Adds a low-rank map of the activation: h + W2^T (W1 h + b), both matrices (rank, hidden).

    W1 and b start as 0, so that at first nothing changes; W2 starts with orthonormal rows.

    Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", eq. 3. pyreft calls this NodiReFT, and DiReFT
    the form whose W2 keeps orthonormal rows.

    Args:
        hidden_size: features of the activation.
        rank: rows of W1 and W2.
        orthonormal: keep the rows of W2 orthonormal.

    Raises:
        ValueError: the rank is larger than the activation.
    """

    takes_source: ClassVar[bool] = False

    def __init__(self, hidden_size: int, *, rank: int = 4, orthonormal: bool = False) -> None:
        super().__init__()
        require_rank(rank, hidden_size)
        self.hidden_size, self.rank = hidden_size, rank
        if orthonormal:
            orthonormal_(self, "projection", torch.randn(rank, hidden_size))
        else:
            self.projection = nn.Parameter(_rows(rank, hidden_size))
        self.weight = nn.Parameter(torch.zeros(rank, hidden_size))
        self.bias = nn.Parameter(torch.zeros(rank))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return base + _map(base, self.weight, self.bias) @ self.projection.to(base.dtype)

    def affine(self) -> Affine:
        return Affine.low_rank(self.projection, self.weight, self.bias)


class NoReFT(Intervention):
    """LoReFT without the constraint: h + W2^T (W1 h + b - W2 h), both matrices (rank, hidden) and free.

    W1 starts as W2, which starts with orthonormal rows, and b as 0, so that at first nothing changes.

    The ablation of Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", that pyreft calls NoReFT.

    Raises:
        ValueError: the rank is larger than the activation.
    """

    takes_source: ClassVar[bool] = False

    def __init__(self, hidden_size: int, *, rank: int = 4) -> None:
        super().__init__()
        require_rank(rank, hidden_size)
        self.hidden_size, self.rank = hidden_size, rank
        self.projection = nn.Parameter(_rows(rank, hidden_size))
        self.weight = nn.Parameter(self.projection.detach().clone())
        self.bias = nn.Parameter(torch.zeros(rank))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        projection = self.projection.to(base.dtype)
        return base + (_map(base, self.weight, self.bias) - base @ projection.T) @ projection

    def affine(self) -> Affine:
        return Affine.low_rank(self.projection, self.weight - self.projection, self.bias)


class ConsReFT(Intervention):
    """Sets the coordinates in a learned subspace to constants: h + R^T (b - R h), R of orthonormal rows.

    R is (rank, hidden); b, (rank,), starts as 0, so that at first the coordinates are erased.

    The ablation of Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", that pyreft calls ConsReFT.

    Raises:
        ValueError: the rank is larger than the activation.
    """

    takes_source: ClassVar[bool] = False

    def __init__(self, hidden_size: int, *, rank: int = 4) -> None:
        super().__init__()
        self.hidden_size, self.rank = hidden_size, rank
        self.subspace = Subspace(hidden_size, rank=rank)
        self.bias = nn.Parameter(torch.zeros(rank))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        with parametrize.cached():
            rows = self.subspace.rows.to(base.dtype)
            return base + (self.bias.to(base.dtype) - base @ rows.T) @ rows

    def affine(self) -> Affine:
        return Affine.low_rank(self.subspace.rows, -self.subspace.rows, self.bias)


class LobiReFT(Intervention):
    """Adds a vector of a learned subspace: h + R^T b, R of orthonormal rows, (rank, hidden).

    b, (rank,), starts as 0, so that at first nothing changes. R^T b is one vector whatever the rank, as that of
    :class:`~itrain.interventions.steering.SteeringVector`; what differs is its training.

    The ablation of Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", that pyreft calls LobiReFT.

    Raises:
        ValueError: the rank is larger than the activation.
    """

    takes_source: ClassVar[bool] = False

    def __init__(self, hidden_size: int, *, rank: int = 4) -> None:
        super().__init__()
        self.hidden_size, self.rank = hidden_size, rank
        self.subspace = Subspace(hidden_size, rank=rank)
        self.bias = nn.Parameter(torch.zeros(rank))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        rows = self.subspace.rows
        return base + (self.bias.to(rows.dtype) @ rows).to(base.dtype)

    def affine(self) -> Affine:
        return Affine(constant=(self.bias @ self.subspace.rows).detach().double())


def _rows(rank: int, hidden_size: int) -> Float[Tensor, "rank hidden"]:
    """Orthonormal rows at random."""
    return torch.linalg.qr(torch.randn(hidden_size, rank))[0].T.contiguous()


def _map(
    base: Float[Tensor, "*batch hidden"], weight: Float[Tensor, "rank hidden"], bias: Float[Tensor, " rank"]
) -> Float[Tensor, "*batch rank"]:
    return linear(base, weight.to(base.dtype), bias.to(base.dtype))
