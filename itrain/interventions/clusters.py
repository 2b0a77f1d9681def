"""Directions between clusters of activations, whatever the variable's value."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itrain.interventions.directions import Directions, leading

STEPS = 300
"""The most steps from one start."""


class ClusterDifference(Directions):
    """The directions in which the centres of rank + 1 clusters differ; for rank 1 m_1 - m_0 of two.

    The clusters are k-means' of the lowest sum of squares from ``restarts`` starts, each by k-means++ from the seed
    (Arthur and Vassilvitskii 2007). A baseline of Arora et al. 2024, "CausalGym".

    Args:
        rank: one less than there are clusters.
        restarts: how often k-means starts; the best end is taken.
        seed: of the starts.
    """

    def __init__(self, hidden_size: int, *, rank: int = 1, restarts: int = 10, seed: int = 0) -> None:
        super().__init__(hidden_size, rank=rank)
        if restarts < 1:
            raise ValueError(f"restarts: clusters have 1 start or more; got {restarts}")
        self.restarts, self.seed = restarts, seed

    def find(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None
    ) -> Float[Tensor, "directions hidden"]:
        centres = cluster_centres(activations, self.rank + 1, restarts=self.restarts, seed=self.seed)
        return leading(centres - centres.mean(0))


def cluster_centres(
    activations: Float[Tensor, "examples hidden"], count: int, *, restarts: int, seed: int
) -> Float[Tensor, "clusters hidden"]:
    """The centres of k-means' clusters of the lowest sum of squares from so many starts, each by k-means++."""
    generator = torch.Generator().manual_seed(seed)
    starts = [_start(activations, count, generator) for _ in range(restarts)]
    return min((_clustered(activations, start) for start in starts), key=lambda found: found[1])[0]


def _start(
    activations: Float[Tensor, "examples hidden"], count: int, generator: torch.Generator
) -> Float[Tensor, "clusters hidden"]:
    """Examples, each drawn with the square of its distance to those drawn before."""
    chosen = [int(torch.randint(len(activations), (), generator=generator))]
    for _ in range(count - 1):
        far = torch.cdist(activations, activations[chosen]).amin(1).square().cpu()
        chosen.append(int(torch.multinomial(far, 1, generator=generator)) if far.any() else chosen[0])
    return activations[chosen]


def _clustered(
    activations: Float[Tensor, "examples hidden"], centres: Float[Tensor, "clusters hidden"]
) -> tuple[Float[Tensor, "clusters hidden"], float]:
    """The centres that no step moves any more, and the sum of squared distances to them."""
    for _ in range(STEPS):
        of = torch.cdist(activations, centres).argmin(1)
        counts = of.bincount(minlength=len(centres))[:, None]
        means = torch.zeros_like(centres).index_add_(0, of, activations) / counts.clamp(min=1)
        moved = torch.where(counts > 0, means, centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres, float(torch.cdist(activations, centres).amin(1).square().sum())
