"""A small recurrent network of plain steps, whose states are sites: a cell that is called once for each symbol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from itrain.bounds import require_at_least


class GRU(nn.Module):
    """Reads a sequence of symbols with a gated recurrent cell, and then writes one with the same cell.

    ``module:cell.output.step3`` is the state after the fourth symbol that is read, ``module:state.output`` the one from
    which it writes. It is ``torch.nn.GRU`` of one layer, which runs all steps in one call, taken apart.

    Args:
        symbols: how many there are; a further one of its own begins what is written.
        hidden_size: features of the state and of a symbol.
        length: how many symbols it writes.
    """

    def __init__(self, *, symbols: int, hidden_size: int, length: int) -> None:
        super().__init__()
        require_at_least(1, symbols=symbols, hidden_size=hidden_size, length=length)
        self.symbols, self.hidden_size, self.length = symbols, hidden_size, length
        self.embedding = nn.Embedding(symbols + 1, hidden_size)
        self.cell = nn.GRUCell(hidden_size, hidden_size)
        self.state = nn.Identity()
        self.scores = nn.Linear(hidden_size, symbols)

    def forward(
        self, input: Int[Tensor, "batch read"], told: Int[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length symbols"]:
        """The scores of each symbol that it writes, after the ones that it is told, or else after its own likeliest."""
        state = self.embedding.weight.new_zeros(len(input), self.hidden_size)
        for symbol in self.embedding(input).unbind(1):
            state = self.cell(symbol, state)
        state = self.between(self.state(state), input)
        last, found = torch.full_like(input[:, 0], self.symbols), []
        for step in range(self.length if told is None else told.shape[1]):
            state = self.cell(self.embedding(last), state)
            found.append(self.scores(state))
            last = found[-1].argmax(-1) if told is None else told[:, step]
        return torch.stack(found, 1)

    def between(
        self, state: Float[Tensor, "batch hidden"], input: Int[Tensor, "batch read"]
    ) -> Float[Tensor, "batch hidden"]:
        """The state from which it writes, given that which it has read into."""
        return state


def mechanism(parents: Sequence[str], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a causal model's mechanism of these parents, of which there are as many as there are steps."""

    def of_parents(*values: Any) -> Any:
        return function(*values)

    names = [Parameter(each, Parameter.POSITIONAL_OR_KEYWORD) for each in parents]
    of_parents.__signature__ = Signature(names)  # type: ignore[attr-defined]
    return of_parents
