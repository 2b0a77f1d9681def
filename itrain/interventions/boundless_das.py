"""Boundless distributed alignment search: interchange in a learned rotation, of a learned number of coordinates."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.bounds import require_at_least
from itrain.interventions.base import Intervention
from itrain.interventions.featurizers import Rotation, interchange
from itrain.interventions.masking import FixedMask, require_temperatures

RANGE = (1e-3, 1.0)
"""The range of beta, the share of the coordinates that are swapped."""


class BoundlessDAS(Intervention):
    """Swaps the first coordinates of a learned rotation, up to a learned boundary: R^T (M * R s + (1 - M) * R h).

    M_i = sigma(i / T) sigma((beta d - i) / T), for i = 1/2, 3/2, ..., d - 1/2 and beta held in [0.001, 1]; the
    temperature T goes linearly from the first to the second, in fp32, and penalty = ``boundary_weight`` * beta. It is
    evaluated with M_i = [i < beta d], as a :class:`~itrain.interventions.masking.FixedMask` whose rank is that of the
    subspace found.

    A step that leads beta out of its range ends at the range's end, where beta has the gradient by which it comes back.

    Wu et al. 2023, "Interpretability at Scale: Identifying Causal Mechanisms in Alpaca". pyvene's
    ``BoundlessRotatedSpaceIntervention`` differs: i counts from 0, so that the first coordinate is half swapped at any
    temperature; the temperature is a parameter, which an optimizer of all parameters trains; its schedule is in bf16;
    and evaluation uses the soft gates.

    Args:
        temperature: at the first and at the last step, in coordinates; the paper's 50 is for 4096 of them.
        boundary_lr: learning rate of beta.
        boundary_weight: the cost of swapping all coordinates, in nats.
        start: beta before training.

    Raises:
        ValueError: ``start`` is not in (0, 1], or a temperature is not above 0.
    """

    temperature: Float[Tensor, ""]

    def __init__(
        self,
        hidden_size: int,
        *,
        temperature: tuple[float, float] = (50.0, 0.1),
        boundary_lr: float = 1e-2,
        boundary_weight: float = 1.0,
        start: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 < start <= 1:
            raise ValueError(f"start is a share of the coordinates, above 0 and up to 1; got {start}")
        require_temperatures(temperature)
        require_at_least(0, boundary_lr=boundary_lr, boundary_weight=boundary_weight)
        self.hidden_size = self.rank = hidden_size
        self.hot, self.cold = temperature
        self.boundary_lr, self.boundary_weight = boundary_lr, boundary_weight
        self.rotation = Rotation(hidden_size)
        self.boundary = nn.Parameter(torch.tensor(float(start)))
        self.register_buffer("temperature", torch.tensor(float(self.hot)))

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        place = self._places()
        gate = torch.sigmoid(place / self.temperature)
        gate = gate * torch.sigmoid((self._share() * self.hidden_size - place) / self.temperature)
        return interchange(base, source, self.rotation, gate)

    @torch.no_grad()
    def anneal(self, progress: float) -> None:
        self.temperature.fill_((1 - progress) * self.hot + progress * self.cold)
        self.boundary.clamp_(*RANGE)

    def penalty(self) -> Float[Tensor, ""]:
        return self.boundary_weight * self._share()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": list(self.rotation.parameters())},
            {"params": [self.boundary], "lr": self.boundary_lr},
        ]

    def hardened(self) -> FixedMask:
        gate = self._places() < self._share() * self.hidden_size
        return FixedMask(self.hidden_size, featurizer=lambda _: self.rotation, gate=gate)

    def _places(self) -> Float[Tensor, " hidden"]:
        """The middle of each coordinate on a line of length d."""
        # Whole numbers above 256 have no bf16.
        dtype = torch.promote_types(self.boundary.dtype, torch.float32)
        return torch.arange(self.hidden_size, dtype=dtype, device=self.boundary.device) + 0.5

    def _share(self) -> Float[Tensor, ""]:
        # The gradient of a clamp is 0 outside the range, so that beta would stay there for good.
        return self.boundary.detach().clamp(*RANGE) + (self.boundary - self.boundary.detach())
