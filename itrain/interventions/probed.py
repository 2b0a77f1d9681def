"""The directions that a linear probe reads."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from itrain.interventions.directions import Directions, leading

STEPS = 1000
"""The most steps of the optimizer; a few dozen do."""


class ProbeDirections(Directions):
    """The weights of a logistic regression of the variable's value on the activation; for two values w.

    min mean CE(W h + b, value) + ||W||^2 / (2 C N), the regression of scikit-learn with ``C`` = inverse_strength, b
    free; of two values one row w says how likely the second is. For more values the principal directions of the rows. A
    baseline of Arora et al. 2024, "CausalGym", who take C from 0.1 for pythia-14m down to 1e-7 for pythia-12b.

    Args:
        rank: how many directions are taken.
        inverse_strength: C; smaller values hold the weights smaller.

    Raises:
        ValueError: the inverse strength is not above 0.
    """

    needs_classes: ClassVar[bool] = True

    def __init__(self, hidden_size: int, *, rank: int = 1, inverse_strength: float = 1e-3) -> None:
        super().__init__(hidden_size, rank=rank)
        if not 0 < inverse_strength < torch.inf:
            raise ValueError(f"inverse_strength is above 0, the less the stronger; got {inverse_strength}")
        self.inverse_strength = inverse_strength

    def find(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None
    ) -> Float[Tensor, "directions hidden"]:
        if values is None:
            raise ValueError("this direction needs the values of a variable, which these examples do not have")
        classes, of = values.unique(return_inverse=True)
        with torch.inference_mode(False), torch.enable_grad():
            weights = _regressed(activations.clone(), of.clone(), len(classes), self.inverse_strength)
        # One row is a direction of its own.
        return leading(weights if len(weights) == 1 else weights - weights.mean(0))


def _regressed(
    activations: Float[Tensor, "examples hidden"], of: Int[Tensor, " examples"], classes: int, inverse_strength: float
) -> Float[Tensor, "rows hidden"]:
    rows = classes if classes != 2 else 1
    weights = activations.new_zeros(rows, activations.shape[1], requires_grad=True)
    bias = activations.new_zeros(rows, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=STEPS, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = activations @ weights.T + bias
        scores = torch.cat([torch.zeros_like(scores), scores], 1) if rows == 1 else scores
        strength = weights.square().sum() / (2 * inverse_strength * len(of))
        found = cross_entropy(scores, of) + strength
        found.backward()
        return found

    optimizer.step(loss)  # type: ignore[arg-type]
    return weights.detach()
