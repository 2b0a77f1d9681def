"""Blocks of coordinates, one for each variable, and the simplest kind: fixed neurons."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.interventions.base import Intervention
from itrain.interventions.featurizers import Featurizer, Identity, interchange


class Blocks(Intervention, ABC):
    """Swaps disjoint blocks of a featurizer's coordinates: decode((1 - m) * f(h) + m * f(s)), m 1 in the block, else 0.

    ``blocks`` gives each variable its number of coordinates, on disjoint blocks in the order given; an integer stands
    for one variable. Variables with different sources compose exactly.

    Raises:
        ValueError: the blocks need more coordinates than the activation has, or a variable has no block.
    """

    _gates: Float[Tensor, "variables hidden"]

    def __init__(self, hidden_size: int, *, blocks: int | Mapping[str, int]) -> None:
        super().__init__()
        if not blocks and not isinstance(blocks, int):
            raise ValueError("blocks is empty; give each variable its number of coordinates")
        self.blocks = {"": blocks} if isinstance(blocks, int) else dict(blocks)
        self.hidden_size, self.rank = hidden_size, sum(self.blocks.values())
        if min(self.blocks.values()) < 1 or self.rank > hidden_size:
            asked = ", ".join(f"{name} {count}".strip() for name, count in self.blocks.items())
            raise ValueError(
                f"blocks: {asked} of an activation of {hidden_size} features; give each 1 coordinate or more, and all "
                f"together {hidden_size} at most"
            )
        owner = torch.arange(len(self.blocks)).repeat_interleave(torch.tensor(list(self.blocks.values())))
        gates = torch.nn.functional.one_hot(owner, len(self.blocks)).T.float()
        # Not saved, and so not public: the arguments determine it.
        self.register_buffer("_gates", torch.nn.functional.pad(gates, (0, hidden_size - self.rank)), persistent=False)

    @property
    @abstractmethod
    def featurizer(self) -> Featurizer:
        """The basis that the coordinates belong to."""

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return self._swap(base, source, self._gates.sum(0))

    def edit_for(self, variable: str) -> Callable[[Tensor, Tensor], Tensor]:
        if list(self.blocks) == [""]:
            return self
        if not variable:
            one = next(iter(self.blocks))
            raise ValueError(f"the source is given for no variable; name it, as in source={{{one!r}: ...}}")
        if variable not in self.blocks:
            raise ValueError(f"no block for variable '{variable}'; blocks are given for {', '.join(self.blocks)}")
        return partial(self._swap, gate=self._gates[list(self.blocks).index(variable)])

    def _swap(self, base: Tensor, source: Tensor, gate: Tensor) -> Tensor:
        return interchange(base, source, self.featurizer, gate)


class FixedBlocks(Blocks):
    """Swaps blocks of neurons, the first ones of the activation: (1 - m) * h + m * s. It has no trained weights.

    Interchange intervention training puts each variable into its block. Geiger et al. 2022, "Inducing Causal
    Structure for Interpretable Neural Networks", section 3.

    Args:
        blocks: the number of coordinates of each variable, or of all of them.
    """

    def __init__(self, hidden_size: int, *, blocks: int | Mapping[str, int] = 1) -> None:
        super().__init__(hidden_size, blocks=blocks)
        self.neurons = Identity(hidden_size)

    @property
    def featurizer(self) -> Featurizer:
        return self.neurons

    def untrained(self) -> FixedBlocks:
        other = FixedBlocks(self.hidden_size, blocks=self.blocks)
        other._gates.copy_(self._gates[:, torch.randperm(self.hidden_size, generator=torch.Generator().manual_seed(0))])
        return other
