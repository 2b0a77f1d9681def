"""Distributed alignment search: interchange in a learned subspace or a block of a learned rotation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.interventions.base import Intervention, require_rank
from itrain.interventions.featurizers import Rotation, Subspace, interchange


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


class FullRotationDAS(Intervention):
    """Swaps blocks of coordinates of one learned rotation: R^T (m * R s + (1 - m) * R h), R square and orthogonal.

    ``blocks`` gives each variable its number of coordinates, on disjoint blocks in the order given; an integer stands
    for one variable. Variables with different sources compose exactly, since their blocks are orthogonal.

    Geiger et al. 2024, eq. 4; pyvene's ``RotatedSpaceIntervention`` with ``subspace_partition``.

    Raises:
        ValueError: the blocks need more coordinates than the activation has, or a variable has no block.
    """

    gates: Float[Tensor, "variables hidden"]

    def __init__(self, hidden_size: int, *, blocks: int | Mapping[str, int] = 1) -> None:
        super().__init__()
        self.blocks = {"": blocks} if isinstance(blocks, int) else dict(blocks)
        self.hidden_size, self.rank = hidden_size, sum(self.blocks.values())
        require_rank(min(self.blocks.values()), hidden_size)
        require_rank(self.rank, hidden_size)
        self.rotation = Rotation(hidden_size)
        owner = torch.arange(len(self.blocks)).repeat_interleave(torch.tensor(list(self.blocks.values())))
        gates = torch.nn.functional.one_hot(owner, len(self.blocks)).T.float()
        self.register_buffer("gates", torch.nn.functional.pad(gates, (0, hidden_size - self.rank)), persistent=False)

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return interchange(base, source, self.rotation, self.gates.sum(0))

    def edit_for(self, variable: str) -> Callable[[Tensor, Tensor], Tensor]:
        if list(self.blocks) == [""]:
            return self
        if variable not in self.blocks:
            raise ValueError(f"no block for variable '{variable}'; blocks are given for {', '.join(self.blocks)}")
        return partial(self._swap, gate=self.gates[list(self.blocks).index(variable)])

    def _swap(self, base: Tensor, source: Tensor, gate: Tensor) -> Tensor:
        return interchange(base, source, self.rotation, gate)
