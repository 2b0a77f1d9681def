"""Distributed alignment search: interchange in a learned subspace or a block of a learned rotation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.interventions.base import Intervention
from itrain.interventions.blocks import Blocks
from itrain.interventions.featurizers import Featurizer, Rotation, Subspace, interchange


class DAS(Intervention):
    """Swaps the coordinates in a learned subspace: h + R^T (R s - R h), R of orthonormal rows, (rank, hidden).

    Geiger et al. 2024, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations"; the low-rank form is pyvene's ``LowRankRotatedSpaceIntervention``.

    Raises:
        ValueError: the rank is larger than the activation.
    """

    def __init__(self, hidden_size: int, *, rank: int = 1) -> None:
        super().__init__()
        self.hidden_size, self.rank = hidden_size, rank
        self.subspace = Subspace(hidden_size, rank=rank)

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return interchange(base, source, self.subspace)


class FullRotationDAS(Blocks):
    """Swaps blocks of coordinates of one learned rotation: R^T (m * R s + (1 - m) * R h), R square and orthogonal.

    ``blocks`` gives each variable its number of coordinates; see :class:`~itrain.interventions.blocks.Blocks`.

    Geiger et al. 2024, eq. 4; pyvene's ``RotatedSpaceIntervention`` with ``subspace_partition``.

    Args:
        blocks: the number of coordinates of each variable, or of all of them.
    """

    def __init__(self, hidden_size: int, *, blocks: int | Mapping[str, int] = 1) -> None:
        super().__init__(hidden_size, blocks=blocks)
        self.rotation = Rotation(hidden_size)

    @property
    def featurizer(self) -> Featurizer:
        return self.rotation

    def untrained(self) -> FullRotationDAS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return FullRotationDAS(self.hidden_size, blocks=self.blocks)
