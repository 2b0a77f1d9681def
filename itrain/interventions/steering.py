"""Steering: one vector is added to the activation, learned or found in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from itrain.interventions.base import Affine, Intervention, saved_lately
from itrain.interventions.directions import Directions, MeanDifference


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


class SteeringDirection(Intervention):
    """Adds a direction that is found in closed form: h + w, |w| = 1, from activations with the concept and without.

    A direction that needs classes is found between the two: ``MeanDifference`` is AxBench's DiffMean,
    ``LinearDiscriminant`` a supervised one. Another is found in the activations with the concept alone:
    ``PrincipalDirections`` is its PCA. w points to where the mean with the concept lies, where there are both.

    Args:
        hidden_size: features of the activation.
        direction: builds what finds the direction.
    """

    takes_source: ClassVar[bool] = False
    fits_activations = True
    needs_classes: ClassVar[bool] = True
    vector: Float[Tensor, " hidden"]

    def __init__(self, hidden_size: int, *, direction: Callable[[int], Directions] = MeanDifference) -> None:
        super().__init__()
        self.hidden_size, self.rank = hidden_size, 1
        self.direction = direction
        self.register_buffer("vector", torch.full((hidden_size,), torch.nan))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return base + self._known().to(base.dtype)

    def fit(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None = None
    ) -> None:
        """Find the direction; ``values`` are 0 without the concept, all others have it."""
        finds = self.direction(self.hidden_size)
        name, between = type(finds).__name__, finds.needs_classes
        if values is None:
            raise ValueError(f"{name} needs to know which activations have the concept")
        exact, has = activations.double(), values != 0
        if between and bool(has.all()):
            raise ValueError(
                f"{name} is a direction between texts with the concept and others, and there are none of the others; "
                "add some to the training data: task.negatives=true"
            )
        found = finds.find(exact if between else exact[has], has.long() if between else None)
        if not len(found):
            raise ValueError(f"{name} finds no direction: the activations do not differ")
        vector = found[0] / found[0].norm()
        if not bool(has.all()):
            apart = exact[has].mean(0) - exact[~has].mean(0)
            vector = vector if float(vector @ apart) >= 0 else -vector
        self.vector.copy_(vector)

    def affine(self) -> Affine:
        return Affine(constant=self._known().detach().double())

    def _known(self) -> Float[Tensor, " hidden"]:
        if self.vector.isnan().any():
            raise RuntimeError("the direction is unknown: call fit(activations, values) first, or train, which does")
        return self.vector
