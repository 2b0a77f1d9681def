"""Closed-form directions: subspaces found without a gradient, interchanged like learned ones."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itrain.interventions.base import Intervention, require_rank


class Directions(Intervention):
    """Swaps the coordinates in a subspace that is computed from activations: h + R^T (R s - R h), R (rank, hidden).

    Where activations or classes span fewer directions than the rank, the other rows are 0 and swap nothing.

    Raises:
        RuntimeError: it has not been fitted.
        ValueError: the classes of the examples are needed but not given.
    """

    fits_activations = True
    rows: Float[Tensor, "rank hidden"]

    def __init__(self, hidden_size: int, *, rank: int = 1) -> None:
        super().__init__()
        require_rank(rank, hidden_size)
        self.hidden_size, self.rank = hidden_size, rank
        self.register_buffer("rows", torch.full((rank, hidden_size), torch.nan))

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        if self.rows.isnan().any():
            raise RuntimeError("the directions are unknown: call fit(activations, values) first, or train, which does")
        return base + (source - base) @ self.rows.T @ self.rows

    def fit(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None = None
    ) -> None:
        found = self.find(activations.double(), values)[: self.rank]
        self.rows.zero_()
        self.rows[: len(found)] = torch.linalg.qr(found.T)[0].T.to(self.rows.dtype)

    @abstractmethod
    def find(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None
    ) -> Float[Tensor, "directions hidden"]:
        """Linearly independent directions, the most important first."""


class PrincipalDirections(Directions):
    """The directions of the largest variance, whatever the variable's value: eigenvectors of the covariance."""

    def find(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None
    ) -> Float[Tensor, "directions hidden"]:
        return leading(activations - activations.mean(0))


class PairDifferences(Directions):
    """The directions in which random pairs of activations differ most: principal directions of (h - h') / |h - h'|.

    Examples are paired at random, each once, by the seed. Linear artificial tomography: Zou et al. 2023,
    "Representation Engineering: A Top-Down Approach to AI Transparency", in the form of AxBench's LAT.

    Args:
        rank: how many directions are taken.
        seed: of the pairs.
    """

    def __init__(self, hidden_size: int, *, rank: int = 1, seed: int = 0) -> None:
        super().__init__(hidden_size, rank=rank)
        self.seed = seed

    def find(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None
    ) -> Float[Tensor, "directions hidden"]:
        order = torch.randperm(len(activations), generator=torch.Generator().manual_seed(self.seed))
        first, second = activations[order.to(activations.device)][: len(order) // 2 * 2].chunk(2)
        differences = first - second
        lengths = differences.norm(dim=1, keepdim=True)
        unit = (differences / lengths.clamp(min=torch.finfo(lengths.dtype).tiny))[lengths[:, 0] > 0]
        if not len(unit):
            raise ValueError("PairDifferences finds no direction: no two activations that it pairs differ")
        return leading(unit - unit.mean(0))


class MeanDifference(Directions):
    """The directions in which the means of the variable's values differ; for two values mu_1 - mu_0.

    Marks and Tegmark 2024, "The Geometry of Truth"; for more values the principal directions of their means.
    """

    needs_classes: ClassVar[bool] = True

    def find(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None
    ) -> Float[Tensor, "directions hidden"]:
        means, _ = _by_class(activations, values)
        return leading(means - means.mean(0))


class LinearDiscriminant(Directions):
    """The directions that separate the variable's values best: leading v of S_b v = l S_w v.

    S_w is the covariance within, S_b that between the classes; S_w has ``shrinkage`` * tr(S_w) / d added to its
    diagonal. Fisher 1936, "The Use of Multiple Measurements in Taxonomic Problems".

    Args:
        rank: how many directions are taken.
        shrinkage: share of the mean variance that is added to the diagonal of S_w.

    Raises:
        ValueError: the shrinkage is negative, or it is 0 and S_w has no inverse.
    """

    needs_classes: ClassVar[bool] = True

    def __init__(self, hidden_size: int, *, rank: int = 1, shrinkage: float = 1e-3) -> None:
        super().__init__(hidden_size, rank=rank)
        if not 0 <= shrinkage < torch.inf:
            raise ValueError(f"shrinkage is a share of the mean variance within classes, 0 or more; got {shrinkage}")
        self.shrinkage = shrinkage

    def find(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None
    ) -> Float[Tensor, "directions hidden"]:
        means, of = _by_class(activations, values)
        rest = activations - means[of]
        within = rest.T @ rest / len(rest)
        variance, size = within.diagonal().mean(), activations.square().mean()
        one = torch.eye(len(within), dtype=within.dtype, device=within.device)
        # Activations that vary within a class by rounding alone have no metric of their own.
        within = within + self.shrinkage * variance * one if variance > 1e-24 * size else one
        if (rank := int(torch.linalg.matrix_rank(within, hermitian=True))) < len(within):
            raise ValueError(
                f"LinearDiscriminant: the covariance within classes has rank {rank} for {len(within)} features, so it "
                f"has no inverse; give it a shrinkage above {self.shrinkage:g} (intervention.shrinkage=1e-3) or more "
                "examples"
            )
        lower = torch.linalg.cholesky(within)
        # In whitened coordinates, h = L w, the best directions are the principal ones of the means.
        whitened = torch.linalg.solve_triangular(lower, (means[of] - activations.mean(0)).T, upper=False).T
        return torch.linalg.solve_triangular(lower.T, leading(whitened).T, upper=True).T


def _by_class(
    activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None
) -> tuple[Float[Tensor, "classes hidden"], Int[Tensor, " examples"]]:
    """The mean of each class, and the index of each example's class."""
    if values is None:
        raise ValueError("this direction needs the values of a variable, which these examples do not have")
    _, of, counts = values.unique(return_inverse=True, return_counts=True)
    sums = activations.new_zeros(len(counts), activations.shape[1]).index_add_(0, of, activations)
    return sums / counts[:, None], of


def leading(centred: Float[Tensor, "rows hidden"]) -> Float[Tensor, "directions hidden"]:
    """The right singular vectors whose singular values are not 0."""
    _, strengths, directions = torch.linalg.svd(centred, full_matrices=False)
    return directions[strengths > strengths.max() * 1e-8]
