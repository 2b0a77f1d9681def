"""Bases that no gradient has a part in: singular vectors, centres of clusters and random directions."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.bounds import require_at_least
from itrain.interventions.base import require_rank
from itrain.interventions.clusters import cluster_centres
from itrain.interventions.featurizers import Featurizer


class FittedBasis(Featurizer):
    """Coordinates along fitted directions: features = P (h - mu), error = h - V^T features, V P V = V.

    Raises:
        RuntimeError: it has not been fitted.
    """

    fits_activations = True
    rows: Float[Tensor, "features hidden"]
    """V, the directions."""
    duals: Float[Tensor, "features hidden"]
    """P^T: what gives a direction's coordinate."""
    mean: Float[Tensor, " hidden"]

    def __init__(self, hidden_size: int, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        for name in ("rows", "duals"):
            self.register_buffer(name, torch.full((num_features, hidden_size), torch.nan))
        self.register_buffer("mean", torch.full((hidden_size,), torch.nan))

    def fit(self, activations: Float[Tensor, "examples hidden"]) -> None:
        rows, mean = self.find(activations.double())
        self.rows.copy_(rows)
        self.duals.copy_(torch.linalg.pinv(rows).T)
        self.mean.copy_(mean)

    @abstractmethod
    def find(
        self, activations: Float[Tensor, "examples hidden"]
    ) -> tuple[Float[Tensor, "features hidden"], Float[Tensor, " hidden"]]:
        """The directions, and what is subtracted from an activation before its coordinates are taken."""

    def encode(
        self, activation: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "*batch hidden"]]:
        if self.mean.isnan().any():
            raise RuntimeError("the directions are unknown: call fit(activations) first, or train, which does")
        features = (activation - self.mean) @ self.duals.T
        return features, activation - features @ self.rows

    def decode(
        self, features: Float[Tensor, "*batch features"], error: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return features @ self.rows + error


class SingularVectors(FittedBasis):
    """Coordinates along right singular vectors of the activations as they are, not centred: features = V h.

    The basis of MIB's DBM+SVD (Mueller et al. 2025), which leaves out the last vector and fits source activations too.
    Of activations that were centred they are the principal components, for which there is
    :class:`~itrain.interventions.featurizers.PrincipalComponents`.

    Args:
        hidden_size: features of the activation.
        rank: how many vectors, those of the largest singular values; the error has the rest. None: all.

    Raises:
        ValueError: the rank is larger than the activation.
    """

    def __init__(self, hidden_size: int, *, rank: int | None = None) -> None:
        count = hidden_size if rank is None else rank
        require_rank(count, hidden_size)
        super().__init__(hidden_size, count)

    def find(
        self, activations: Float[Tensor, "examples hidden"]
    ) -> tuple[Float[Tensor, "features hidden"], Float[Tensor, " hidden"]]:
        vectors = torch.linalg.eigh(activations.T @ activations).eigenvectors.T.flip(0)
        return vectors[: self.num_features], activations.new_zeros(activations.shape[1])


class ClusterCentres(FittedBasis):
    """Coordinates along the directions from the mean to the centres of clusters: h - mu = V^T features + the rest.

    V has unit rows (m_i - mu) / |m_i - mu|, m_i k-means' centres. They are not orthogonal, so that the features are
    those of least squares, and of the least norm where the directions are not linearly independent.

    Args:
        hidden_size: features of the activation.
        clusters: how many.
        restarts, seed: as in :class:`~itrain.interventions.clusters.ClusterDifference`.
    """

    def __init__(self, hidden_size: int, *, clusters: int = 8, restarts: int = 10, seed: int = 0) -> None:
        require_at_least(2, clusters=clusters)
        require_at_least(1, restarts=restarts)
        super().__init__(hidden_size, clusters)
        self.restarts, self.seed = restarts, seed

    def find(
        self, activations: Float[Tensor, "examples hidden"]
    ) -> tuple[Float[Tensor, "features hidden"], Float[Tensor, " hidden"]]:
        centres = cluster_centres(activations, self.num_features, restarts=self.restarts, seed=self.seed)
        mean = activations.mean(0)
        return torch.nn.functional.normalize(centres - mean, dim=1), mean


class RandomBasis(Featurizer):
    """Coordinates in a random orthonormal basis of the whole space, drawn from the seed: features = R h.

    The error is what the precision of R leaves.

    Args:
        seed: of the draw.
    """

    rows: Float[Tensor, "hidden hidden"]

    def __init__(self, hidden_size: int, *, seed: int = 0) -> None:
        super().__init__()
        self.num_features = hidden_size
        drawn = torch.randn(hidden_size, hidden_size, generator=torch.Generator().manual_seed(seed))
        columns, triangle = torch.linalg.qr(drawn)
        # With these signs each rotation is as likely as any other.
        self.register_buffer("rows", (columns * triangle.diagonal().sign()).T.contiguous())

    def encode(
        self, activation: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch hidden"]]:
        features = activation @ self.rows.T
        return features, activation - features @ self.rows

    def decode(
        self, features: Float[Tensor, "*batch hidden"], error: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return features @ self.rows + error
