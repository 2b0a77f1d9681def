"""Maps from an activation to features and back, and the one formula that swaps features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from itrain.interventions.base import require_rank
from itrain.interventions.orthogonal import orthonormal_


class Featurizer(nn.Module, ABC):
    """Encodes an activation as features and an error, from which it decodes without loss: decode(encode(h)) = h.

    One that is not ``exact`` drops a part of the error by its user's choice; an edit then changes the activation also
    where it swaps no feature.
    """

    num_features: int
    exact: bool = True
    """Whether decode(encode(h)) = h."""
    fits_activations: bool = False
    """Whether :meth:`fit` must see activations before the first run."""
    trains_nonlinear_map: ClassVar[bool] = False
    """Whether it is trained and not linear: such a map may align anything with anything, so that a run fits controls
    beside it."""
    capacity: ClassVar[str | None] = None
    """The setting that bounds what it can express, of which controls try lower values; None: there is none."""
    linear: ClassVar[Callable[..., Featurizer] | None] = None
    """The linear map of the same use, which controls try; None: there is none."""

    def fit(self, activations: Float[Tensor, "examples hidden"]) -> None:
        """Learn closed-form statistics from base activations, where ``fits_activations`` says so."""

    @abstractmethod
    def encode(
        self, activation: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "*batch hidden"]]:
        """Features of the activation, and the part of it that they do not describe."""

    @abstractmethod
    def decode(
        self, features: Float[Tensor, "*batch features"], error: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        """The activation with these features."""


class Identity(Featurizer):
    """The activation's own coordinates, its neurons: features = h, with no error."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.num_features = hidden_size

    def encode(
        self, activation: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch hidden"]]:
        return activation, torch.zeros_like(activation)

    def decode(
        self, features: Float[Tensor, "*batch hidden"], error: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return features + error


class PrincipalComponents(Featurizer):
    """Coordinates along principal components, the largest first: features = V (h - mu), with no error; V is square.

    Raises:
        RuntimeError: it has not been fitted.
    """

    fits_activations = True
    rows: Float[Tensor, "hidden hidden"]
    mean: Float[Tensor, " hidden"]

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.num_features = hidden_size
        self.register_buffer("rows", torch.full((hidden_size, hidden_size), torch.nan))
        self.register_buffer("mean", torch.full((hidden_size,), torch.nan))

    def fit(self, activations: Float[Tensor, "examples hidden"]) -> None:
        self.mean.copy_(activations.mean(0))
        self.rows.copy_(torch.linalg.eigh(activations.T.cov(correction=0)).eigenvectors.T.flip(0))

    def encode(
        self, activation: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch hidden"]]:
        if self.mean.isnan().any():
            raise RuntimeError("the components are unknown: call fit(activations) first, or train, which does")
        return (activation - self.mean) @ self.rows.T, torch.zeros_like(activation)

    def decode(
        self, features: Float[Tensor, "*batch hidden"], error: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return features @ self.rows + self.mean + error


class Subspace(Featurizer):
    """Coordinates in a learned subspace: features = R h, error = h - R^T R h; R (rank, hidden) has orthonormal rows."""

    rows: Float[Tensor, "rank hidden"]

    def __init__(self, hidden_size: int, *, rank: int) -> None:
        super().__init__()
        require_rank(rank, hidden_size)
        self.num_features = rank
        orthonormal_(self, "rows", torch.randn(rank, hidden_size))

    def encode(
        self, activation: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch rank"], Float[Tensor, "*batch hidden"]]:
        features = activation @ self.rows.T
        return features, activation - features @ self.rows

    def decode(
        self, features: Float[Tensor, "*batch rank"], error: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return error + features @ self.rows


class Rotation(Featurizer):
    """Coordinates in a learned orthonormal basis of the whole space: features = R h, with no error; R is square."""

    rows: Float[Tensor, "hidden hidden"]

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.num_features = hidden_size
        orthonormal_(self, "rows", torch.randn(hidden_size, hidden_size))

    def encode(
        self, activation: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch hidden"]]:
        return activation @ self.rows.T, torch.zeros_like(activation)

    def decode(
        self, features: Float[Tensor, "*batch hidden"], error: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return features @ self.rows + error


def interchange(
    base: Float[Tensor, "*batch hidden"],
    source: Float[Tensor, "*batch hidden"],
    featurizer: Featurizer,
    gate: Float[Tensor, " features"] | float = 1.0,
) -> Float[Tensor, "*batch hidden"]:
    """The base with the source's features where the gate is 1: decode((1 - g) f(base) + g f(source), error(base)).

    Geiger et al. 2024, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations", eq. 4, with a gate from 0 to 1 in place of a choice of coordinates.
    """
    with parametrize.cached():
        features, error = featurizer.encode(base)
        replacement, _ = featurizer.encode(source)
        return featurizer.decode(features + gate * (replacement - features), error)
