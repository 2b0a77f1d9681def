"""Erasure: the activation without what a linear map could tell of a variable, as amnesic probing asks for."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itrain.interventions.base import Intervention

NOTHING = 1e-4
"""Standard deviations between the means of values that nothing tells apart but rounding."""


class Erasure(Intervention):
    """Makes the means of a variable's values equal, at the least change: h - E (h - mu), E = S^1/2 P S^-1/2.

    S is the covariance of the training activations, with ``shrinkage`` * tr(S) / d added to its diagonal, and P
    projects onto the directions in which the values' means differ after whitening, S^-1/2 (mu_value - mu). No linear
    probe does better on what is left of the training examples than the most frequent value. Belrose et al. 2023,
    "LEACE: Perfect linear concept erasure in closed form"; Elazar et al. 2021, "Amnesic Probing".

    That a model does worse without a variable is no proof that it uses it: erasure takes along whatever else lies in
    these directions, also of a variable that is computed and never used. Compare with ``random_seed``.

    Args:
        hidden_size: features of the activation.
        shrinkage: share of the mean variance that is added to each feature's.
        random_seed: erase as many random directions of the whitened activations instead, drawn from this seed, which is
            Elazar et al.'s control; None: those of the variable.

    Raises:
        RuntimeError: it has not been fitted.
        ValueError: the shrinkage is not above 0, or the classes of the examples are needed but not given.
    """

    takes_source: ClassVar[bool] = False
    needs_classes: ClassVar[bool] = True
    fits_activations = True
    mean: Float[Tensor, " hidden"]
    erased: Float[Tensor, "hidden hidden"]

    def __init__(self, hidden_size: int, *, shrinkage: float = 1e-3, random_seed: int | None = None) -> None:
        super().__init__()
        if not 0 < shrinkage < torch.inf:
            raise ValueError(f"shrinkage is a share of the mean variance, above 0; got {shrinkage}")
        self.hidden_size = self.rank = hidden_size
        self.shrinkage, self.random_seed = shrinkage, random_seed
        self.register_buffer("mean", torch.full((hidden_size,), torch.nan))
        self.register_buffer("erased", torch.full((hidden_size, hidden_size), torch.nan))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        if self.mean.isnan().any():
            raise RuntimeError("what is erased is unknown: call fit(activations, values) first, or train, which does")
        return base - (base - self.mean) @ self.erased.T

    def fit(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None = None
    ) -> None:
        if values is None:
            raise ValueError("erasure needs the values of a variable, which these examples do not have")
        activations = activations.double()
        mean = activations.mean(0)
        centred = activations - mean
        covariance = centred.T @ centred / len(centred)
        variance = covariance.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        scales, axes = torch.linalg.eigh(covariance + self.shrinkage * variance * torch.eye(len(mean)).to(covariance))
        root = axes * scales.sqrt() @ axes.T
        whiten = axes / scales.sqrt() @ axes.T
        means = torch.stack([centred[values == value].mean(0) for value in values.unique()])
        _, strengths, directions = torch.linalg.svd(means @ whiten, full_matrices=False)
        directions = directions[strengths > NOTHING]
        if self.random_seed is not None:
            drawn = torch.randn(directions.T.shape, generator=torch.Generator().manual_seed(self.random_seed))
            directions = torch.linalg.qr(drawn.to(directions))[0].T
        self.mean.copy_(mean)
        self.erased.copy_(root @ directions.T @ directions @ whiten)
