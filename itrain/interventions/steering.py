"""Steering: one vector is added to the activation, learned or found in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from itrain.bounds import require_at_least
from itrain.interventions.base import Affine, Intervention, saved_lately
from itrain.interventions.directions import Directions, MeanDifference
from itrain.interventions.featurizers import Subspace


class SteeringVector(Intervention):
    """Adds a learned vector: h + alpha w. w starts as 0, so that at first nothing changes.

    Wu et al. 2025, "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders", there called SSV.

    Args:
        hidden_size: features of the activation.
        alpha: the strength, which may be changed after training: ``intervention.alpha = 2.0``. It is exported.

    Raises:
        ValueError: alpha is not finite.
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


class UnitVector(Intervention):
    """Adds a learned vector of length 1: h + w, |w| = 1. w starts in a random direction.

    How long the vector is where it steers says a strength; in training
    :class:`~itrain.training.magnitudes.TopLatents` does.

    The w of ReFT-r1: Wu et al. 2025, "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders".
    """

    takes_source: ClassVar[bool] = False

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size, self.rank = hidden_size, 1
        self.subspace = Subspace(hidden_size, rank=1)

    @property
    def vector(self) -> Float[Tensor, " hidden"]:
        return self.subspace.rows[0]

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return base + self.vector.to(base.dtype)

    def affine(self) -> Affine:
        return Affine(constant=self.vector.detach().double())


class FactoredVector(Intervention):
    """Adds a vector that is learned with its factor: h + a w.

    A factor of its own learns how long the vector is as fast as where it points, so that none is chosen afterwards.
    w starts as 0, so that at first nothing changes, unless ``start`` says otherwise.

    Bao et al. 2026, "Towards Steering without Sacrifice: Principled Training of Steering Vectors for Prompt-only
    Interventions" (arXiv 2605.05983), which edits a few tokens of the prompt alone: PrOSV. Their a starts from a
    multiple of sqrt(d), and their w at random; recipe=prosv_axbench has their numbers.

    Args:
        hidden_size: features of the activation, d.
        factor: what a starts from.
        factor_lr: the learning rate of a; None: that of the optimizer.
        start: w starts uniform between -start / sqrt(d) and start / sqrt(d).

    Raises:
        ValueError: the factor is 0 or not finite, or the learning rate or the start is negative.
    """

    takes_source: ClassVar[bool] = False

    def __init__(
        self, hidden_size: int, *, factor: float = 4.0, factor_lr: float | None = None, start: float = 0.0
    ) -> None:
        super().__init__()
        if not factor or not math.isfinite(factor):
            raise ValueError(f"factor={factor}: give a finite number other than 0, or nothing is learned")
        require_at_least(0, factor_lr=factor_lr, start=start)
        self.hidden_size, self.rank, self.factor_lr = hidden_size, 1, factor_lr
        self.factor = nn.Parameter(torch.tensor(float(factor)))
        self.vector = nn.Parameter(torch.zeros(hidden_size))
        if start:
            bound = start / math.sqrt(hidden_size)
            nn.init.uniform_(self.vector, -bound, bound)

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return base + (self.factor * self.vector).to(base.dtype)

    def parameter_groups(self) -> list[dict[str, Any]]:
        own = {} if self.factor_lr is None else {"lr": self.factor_lr}
        return [{"params": [self.vector]}, {"params": [self.factor], **own}]

    def affine(self) -> Affine:
        return Affine(constant=(self.factor * self.vector).detach().double())


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
