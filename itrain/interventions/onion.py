"""Magnitude intervention: the symbol at each place of a sequence is the size of a change of the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.bounds import require_at_least
from itrain.interventions.base import Intervention

DECAY = 0.9
"""How much of a symbol's size each further place has, at the start."""


class Onion(Intervention):
    """Adds to a state what a new symbol at a place brings, and takes away what the old one has brought.

    h' = h + (tanh(E)[new] - tanh(E)[old]) * (g * gamma^p + p * lin + b), for the place p from 1; E (symbols, state) and
    gamma, g, lin and b (state,) are learned. No linear subspace is swapped: the places share all directions, and differ
    in magnitude.

    It sees the state with the symbols beside it, [h; x_0; ...; x_P-1], one-hot, where a site of the model holds these:
    the old symbols are then the base's and the new ones the source's. It exchanges both.

    Csordás et al. 2024, "Recurrent Neural Networks Learn to Store and Generate Sequences using Non-Linear
    Representations", section 6. The authors start lin from 1 and take tens of thousands of steps; it starts from 0,
    as b does, from where a few hundred are enough.

    Args:
        hidden_size: features of the state and of all symbols beside it.
        symbols: the number of symbols.
        variables: the variable of each place, in order; None: one place, whatever its variable.

    Raises:
        ValueError: the activation is too small for the symbols.
    """

    def __init__(self, hidden_size: int, *, symbols: int = 2, variables: Sequence[str] | None = None) -> None:
        super().__init__()
        require_at_least(2, symbols=symbols)
        self.symbols, self.variables = symbols, None if variables is None else tuple(variables)
        self.places = 1 if self.variables is None else len(self.variables)
        if not self.places or hidden_size <= self.places * symbols:
            raise ValueError(
                f"an activation of {hidden_size} features holds no state beside {symbols} symbols at {self.places} "
                "places; take the site that holds them, and give as many symbols and variables as there are"
            )
        self.hidden_size, self.rank = hidden_size, hidden_size - self.places * symbols
        size = self.rank
        self.embedding = nn.Parameter(torch.randn(symbols, size))
        self.gamma, self.gain = nn.Parameter(torch.full((size,), DECAY)), nn.Parameter(torch.ones(size))
        self.slope, self.bias = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))
        # Not saved, and so not public: the arguments determine it.
        self.register_buffer("_place", torch.arange(1.0, self.places + 1)[:, None], persistent=False)

    _place: Float[Tensor, "places 1"]

    def check(self, values: Callable[[str], int | None]) -> None:
        for variable in self.variables or ():
            if (count := values(variable)) not in (None, self.symbols):
                raise ValueError(f"symbols={self.symbols}: '{variable}' has {count} values; give as many symbols")

    def scale(self) -> Float[Tensor, "places state"]:
        """The size of a symbol's change at each place: g * gamma^p + p * lin + b."""
        return self.gain * self.gamma.pow(self._place) + self._place * self.slope + self.bias

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return self._exchange(base, source, torch.ones_like(self._place))

    def edit_for(self, variable: str) -> Callable[[Tensor, Tensor], Tensor]:
        if self.variables is None:
            return self
        if variable not in self.variables:
            raise ValueError(f"no place for variable '{variable}'; there are places for {', '.join(self.variables)}")
        own = self._place == 1 + self.variables.index(variable)
        return partial(self._exchange, own=own.to(self._place))

    def _exchange(
        self,
        base: Float[Tensor, "*batch hidden"],
        source: Float[Tensor, "*batch hidden"],
        own: Float[Tensor, "places 1"],
    ) -> Float[Tensor, "*batch hidden"]:
        """The base with the source's symbols at its own places, each 1 where it is."""
        state, old = base[..., : self.rank], base[..., self.rank :].unflatten(-1, (self.places, self.symbols))
        new = source[..., self.rank :].unflatten(-1, (self.places, self.symbols))
        change = own * (new - old)
        added = (change @ self.embedding.tanh().to(change) * self.scale()).sum(-2)
        return torch.cat([state + added, (old + change).flatten(-2)], -1)

    def untrained(self) -> Onion:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Onion(self.hidden_size, symbols=self.symbols, variables=self.variables)
