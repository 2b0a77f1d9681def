"""Sizes of steering vectors: how long they are at a site at strength 1, from the activations of texts."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.placements import Placement
from itrain.training.interchange import Interchange

Scale = Literal["trained", "norm", "max_activation"]


def require_scale(scale: str) -> Scale:
    """What a strength of 1 is.

    Raises:
        ValueError: there is no such scale.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale={scale!r}: use {', '.join(get_args(Scale))}")
    return scale  # type: ignore[return-value]


def require_vector(placement: Placement, intervention: Intervention, scale: str) -> None:
    """Refuse an intervention that is no vector, as far as it is known before it is fitted.

    Raises:
        ValueError: naming the site.
    """
    try:
        found = intervention.hardened().affine()
    except RuntimeError:  # it is fitted later
        return
    if found is None or found.matrix is not None or found.constant is None:
        raise ValueError(
            f"site '{placement}': {type(intervention).__name__} is no vector that is added, and scale={scale} "
            "sets the length of one; use scale=trained, or intervention=steering"
        )


class Sizes:
    """By what each placement's vector is multiplied to be as long as the scale says.

    Args:
        interchange: its interventions are vectors that are added.
        scale: ``norm``, the mean norm of the activations, or ``max_activation``, the largest one along the vector.
    """

    def __init__(self, interchange: Interchange, scale: Scale) -> None:
        self.interchange, self.scale = interchange, scale
        self.vectors: dict[Placement, Float[Tensor, " hidden"]] = {}
        for placement, each in interchange.trained.items():
            require_vector(placement, each, scale)
            affine = each.hardened().affine()
            assert affine is not None and affine.constant is not None, "it is a vector"
            if not bool(affine.constant.any()):
                raise ValueError(f"site '{placement}': the vector is 0, which has no direction; train it first")
            self.vectors[placement] = affine.constant.float()
        self._sums = dict.fromkeys(self.vectors, 0.0)
        self._tokens = dict.fromkeys(self.vectors, 0)
        self._largest = dict.fromkeys(self.vectors, -torch.inf)

    @torch.no_grad()
    def update(self, inputs: ModelInputs) -> None:
        """Take texts into account."""
        found = self.interchange.network.read(inputs, [each.write for each in self.vectors])
        for placement, vector in self.vectors.items():
            rows, _ = self.interchange.rows(found[placement.write], inputs, placement.write)
            rows = rows.float()
            along = rows @ (vector / vector.norm()).to(rows)
            self._sums[placement] += float(rows.norm(dim=-1).double().sum())
            self._tokens[placement] += len(rows)
            self._largest[placement] = max(self._largest[placement], float(along.max()))

    def compute(self) -> list[float]:
        """What each placement's vector is multiplied by.

        Raises:
            ValueError: no activation along a vector is above 0.
        """
        return [self._length(placement) / float(vector.norm()) for placement, vector in self.vectors.items()]

    def _length(self, placement: Placement) -> float:
        if self.scale == "norm":
            return self._sums[placement] / self._tokens[placement]
        if self._largest[placement] <= 0:
            raise ValueError(
                f"site '{placement}': no activation of the training texts along the vector is above 0, so there is no "
                "largest one to go by; use scale=norm"
            )
        return self._largest[placement]
