"""Orthonormal rows: the one parametrisation behind subspaces and rotations."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer


class OrthonormalRows(nn.Module):
    """R = (Q sign(diag U))^T with A^T = Q U the reduced QR decomposition of the free parameter A, (rank, hidden).

    R R^T = 1 whatever A is, so weight decay, which only rescales A, cannot harm it: torch's own ``orthogonal`` decays
    the +-1 that its Householder form keeps in the parameter and returns R = 0 after one step of AdamW. A = R where A
    has orthonormal rows already, as it has between steps under :func:`retract_after_steps`. The decomposition runs in
    fp32 at least; torch has no kernel for less.
    """

    def forward(self, parameter: Float[Tensor, "rank hidden"]) -> Float[Tensor, "rank hidden"]:
        columns, triangle = torch.linalg.qr(parameter.to(torch.promote_types(parameter.dtype, torch.float32)).T)
        return (columns * torch.where(triangle.diagonal() < 0, -1.0, 1.0)).T

    def right_inverse(self, rows: Float[Tensor, "rank hidden"]) -> Float[Tensor, "rank hidden"]:
        return rows


def orthonormal_(module: nn.Module, name: str, rows: Float[Tensor, "rank hidden"]) -> None:
    """Give the module a trainable matrix ``name`` with orthonormal rows, starting from the span of ``rows``.

    ``module.<name> = R`` sets it, and ``parametrize.cached()`` computes it once for several uses.
    """
    start = OrthonormalRows()(rows)
    module.register_parameter(name, nn.Parameter(start))
    parametrize.register_parametrization(module, name, OrthonormalRows())


def retract_after_steps(optimizer: Optimizer, module: nn.Module) -> None:
    """End each step of the optimizer with a retraction A := R(A) of the module's orthonormal rows.

    R stays the same, but later steps keep their size. R moves by the step relative to A, and A grows with every step,
    since its gradient is orthogonal to it; without the retraction, the learning rate would in effect fade early. Absil
    et al. 2008, "Optimization Algorithms on Matrix Manifolds", section 4.1.
    """
    found = [each for each in module.modules() if isinstance(each, parametrize.ParametrizationList)]
    learned = [each for each in found if isinstance(each[0], OrthonormalRows)]

    @torch.no_grad()
    def retract(*_: Any) -> None:
        for each in learned:
            # A parameter without a gradient took no step, and stays the same to the last bit.
            if each.original.grad is not None:
                each.original.copy_(each[0](each.original))

    optimizer.register_step_post_hook(retract)
