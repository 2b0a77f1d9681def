"""Divergence: how far intervened activations lie from natural ones, beside how far natural ones lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from geomloss import SamplesLoss
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from itrain.metrics.gathering import gather_counts

Distance = Literal["energy", "sinkhorn"]
"""``energy``: E|x - y| - E|x - x'| / 2 - E|y - y'| / 2; ``sinkhorn``: the optimal transport that the paper takes."""

CONSTANT = 1e-6
"""A feature whose deviation is at most this share of its mean and of the other features' deviation is constant."""


class Points(NamedTuple):
    """Activations, each with what tells it apart wherever and in whatever order it is computed."""

    values: Float[Tensor, "points features"]
    keys: Int[Tensor, " points"]
    """Random 64-bit numbers, on the CPU; those with the smallest are the sample."""
    second: Bool[Tensor, " points"]
    """Whether its pair belongs to the second of two disjoint halves, on the CPU."""

    def of(self, half: bool) -> Points:
        rows = (self.second == half).nonzero()[:, 0]
        return Points(self.values[rows.to(self.values.device, non_blocking=True)], self.keys[rows], self.second[rows])


def divergence(
    sample: Float[Tensor, "points features"],
    reference: Float[Tensor, "others features"],
    *,
    natural: Float[Tensor, "naturals features"] | None = None,
    by: Distance = "energy",
) -> Float[Tensor, ""]:
    """The distance between two samples of activations, in natural deviations: L(z(sample), z(reference)) / sqrt(d).

    z(h) = (h - mean) / deviation, feature by feature, with those of ``natural`` on both sides; None: of the reference.
    With statistics of its own on each side, a shift and a rescaling would be invisible. A feature that is constant in
    the natural ones counts in the root mean square deviation of all features, or as it is where all are constant.

    L is geomloss's: the energy distance (half of the square of scipy's), or the debiased Sinkhorn divergence with cost
    |x - y|^2 / 2 and blur 0.05 of Grant et al. 2025, "Addressing divergent representations from causal interventions on
    neural networks". Samples of equal size can be compared: both distances are above 0 for two samples of one
    distribution, the Sinkhorn divergence far above, the energy distance by about E|x - x'| / n.

    Raises:
        ValueError: a sample is empty.
    """
    natural = reference if natural is None else natural
    if not (len(sample) and len(reference) and len(natural)):
        raise ValueError("divergence: a sample is empty; give activations on both sides")
    sample, reference, natural = map(_exact, (sample, reference, natural))
    deviation, mean = torch.std_mean(natural, 0, correction=0)
    typical = deviation.square().mean().sqrt()
    constant = deviation <= CONSTANT * (mean.abs() + typical)
    unit = typical if not constant.all() else torch.ones_like(typical)
    deviation = deviation.where(~constant, unit)
    loss = SamplesLoss(by, p=2, blur=0.05, backend="tensorized")
    distance = loss((sample - mean) / deviation, (reference - mean) / deviation)
    return distance / sample.shape[1] ** 0.5


class Divergence(Metric):
    """Divergence of intervened from natural activations, and of natural ones from each other, on samples of one size.

    Pairs are divided into two disjoint halves. ``divergence`` compares intervened activations of the first half with
    natural ones of the second, and ``natural_divergence``, the baseline, natural ones of both; the statistics are those
    of all natural ones. Activations that an intervention leaves in their distribution are at the baseline.

    A state holds the ``points`` activations with the smallest keys, so the sample, and with it the result, does not
    depend on how the pairs were divided among batches and processes. Both are nan where a half is empty.

    Args:
        by: the distance, as in :func:`divergence`.
        points: the most activations of a sample.
    """

    full_state_update = False
    higher_is_better = False
    intervened: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    intervened_keys: list[Tensor]
    first_keys: list[Tensor]
    second_keys: list[Tensor]

    def __init__(self, *, by: Distance = "energy", points: int = 1000) -> None:
        super().__init__(dist_sync_fn=gather_counts)
        if points < 1:
            raise ValueError(f"points: a sample has 1 or more activations; got {points}")
        self.by: Distance = by
        self.points = points
        for name in ("intervened", "first", "second"):
            self.add_state(name, [], dist_reduce_fx="cat")
            self.add_state(f"{name}_keys", [], dist_reduce_fx="cat")

    def update(self, intervened: Points, natural: Points) -> None:
        """Take up activations; of the intervened ones those of the first half are compared."""
        for name, points in (
            ("intervened", intervened.of(False)),
            ("first", natural.of(False)),
            ("second", natural.of(True)),
        ):
            self._keep(name, points)

    def _keep(self, name: str, points: Points) -> None:
        """Take up activations in a state."""
        keys = points.keys.to(points.values.device, non_blocking=True)
        values = [*getattr(self, name), points.values.detach().float()]
        kept = _smallest(torch.cat(values), torch.cat([*getattr(self, f"{name}_keys"), keys]), self.points)
        setattr(self, name, [kept[0]])
        setattr(self, f"{name}_keys", [kept[1]])

    def compute(self) -> dict[str, Tensor]:
        """``divergence`` and ``natural_divergence``."""
        intervened, first, second = self._samples()
        size = min(len(intervened), len(first), len(second))
        if not size:
            return dict.fromkeys(("divergence", "natural_divergence"), torch.tensor(torch.nan, device=self.device))
        natural = torch.cat([first, second])
        return {
            name: divergence(each[:size], second[:size], natural=natural, by=self.by)
            for name, each in (("divergence", intervened), ("natural_divergence", first))
        }

    def _samples(self) -> list[Float[Tensor, "points features"]]:
        """Intervened activations of the first half, and natural ones of either."""
        return [
            _smallest(dim_zero_cat(getattr(self, name)), dim_zero_cat(getattr(self, f"{name}_keys")), self.points)[0]
            for name in ("intervened", "first", "second")
        ]


class RowDivergence(Divergence):
    """The same of chosen features in their own unit: what a causal model's variables are read from.

    ``row_divergence`` is the debiased Sinkhorn divergence with cost |x - y|^2 / 2 and blur 0.05, which the paper calls
    row-space EMD, of intervened activations from natural ones of the values that the pairs' interchanges lead to.
    ``natural_row_divergence``, its baseline, is that of other natural ones of these values. Values are as frequent on
    both sides, because moving them between clusters would outweigh all else.

    Args:
        features: which features of an activation are compared.
        points: the most activations of a sample.

    Raises:
        ValueError: no features are named, or the activations have fewer.
    """

    def __init__(self, *, features: Sequence[int], points: int = 1000) -> None:
        super().__init__(by="sinkhorn", points=points)
        if not features or min(features) < 0:
            raise ValueError(f"row_features={list(features)}: name features of the activation, counted from 0")
        self.features = list(features)

    def update(self, intervened: Points, natural: Points, other: Points) -> None:  # type: ignore[override]
        """Take up, of each pair, the intervened activation and two natural ones of its counterfactual values."""
        if (count := intervened.values.shape[-1]) <= max(self.features):
            raise ValueError(f"row_features={self.features}: the activation has {count} features, counted from 0")
        for name, each in (("intervened", intervened), ("second", natural), ("first", other)):
            self._keep(name, each._replace(values=each.values[:, self.features]))

    def compute(self) -> dict[str, Tensor]:
        """``row_divergence`` and ``natural_row_divergence``."""
        intervened, first, second = map(_exact, self._samples())
        size = min(len(intervened), len(first), len(second))
        loss = SamplesLoss("sinkhorn", p=2, blur=0.05, backend="tensorized")
        named = {"row_divergence": intervened, "natural_row_divergence": first}
        nan = torch.tensor(torch.nan, device=self.device)
        return {name: loss(each[:size], second[:size]) if size else nan for name, each in named.items()}


def _exact(values: Tensor) -> Tensor:
    """The values in fp64, which MPS does not have."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def _smallest(
    values: Float[Tensor, "points features"], keys: Int[Tensor, " points"], count: int
) -> tuple[Float[Tensor, "kept features"], Int[Tensor, " kept"]]:
    """The points with the smallest keys, in the keys' order."""
    kept, order = keys.sort(stable=True)
    return values[order[:count]], kept[:count]
