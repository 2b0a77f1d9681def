"""Addition of two binary numbers, bit by bit with a carry, and recurrent networks that have learned it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from random import Random
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from itrain.bounds import require_at_least
from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ModelInputs
from itrain.tasks.base import Pair, Split, Task
from itrain.tasks.recurrent import mechanism
from itrain.tasks.sequences import Sequences
from itrain.tasks.teaching import seeded, teach

SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""The part of the shuffled sums that each split draws from."""


class BinaryAddition(Task):
    """a + b of two numbers of some bits, the lowest first: the carry out of each bit but the last is a variable.

    The answer is the bits of the sum, the last carry among them. Pairs interchange one carry, all equally often; base
    and source are sums of one split, which has none of another's.

    "PLOT: Progressive Localization via Optimal Transport" (arXiv 2605.06979), 4-bit binary addition; its sources are
    drawn from all sums, of which those of a test are held out here too.

    Args:
        bits: of each number.
        split_seed: shuffles the sums before they are divided among the splits.
    """

    def __init__(self, *, bits: int = 4, split_seed: int = 0) -> None:
        require_at_least(2, bits=bits)
        self.bits = bits
        places = range(bits)
        self.variables = tuple(f"carry{place + 1}" for place in places[:-1])
        mechanisms: dict[str, Callable[..., Any]] = {}
        for place in places:
            parents = [f"a{place}", f"b{place}", *([f"carry{place}"] if place else [])]
            mechanisms[f"sum{place}"] = mechanism(parents, lambda *bits: sum(bits) % 2)
            mechanisms[f"carry{place + 1}"] = mechanism(parents, lambda *bits: sum(bits) // 2)
        mechanisms["sum"] = mechanism([*(f"sum{place}" for place in places), f"carry{bits}"], lambda *bits: bits)
        names = [f"{number}{place}" for number in "ab" for place in places]
        self.causal_model = CausalModel(inputs=dict.fromkeys(names, (0, 1)), mechanisms=mechanisms, output="sum")
        every = [dict(zip(names, values, strict=True)) for values in product((0, 1), repeat=2 * bits)]
        self._shuffled = Random(split_seed).sample(every, len(every))

    @property
    def outputs(self) -> Sequence[tuple[int, ...]]:
        return Sequences(classes=2, length=self.bits + 1)

    def values(self, variable: str) -> Sequence[Any]:
        return (0, 1) if variable in self.variables else super().values(variable)

    def label(self, output: tuple[int, ...]) -> tuple[int, ...]:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        start, stop = (round(share * len(self._shuffled)) for share in SHARES[split])
        base, source = random.sample(self._shuffled[start:stop], 2)
        return Pair(base=base, sources={random.choice(self.variables): source})

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        bits = [[[each[f"a{place}"], each[f"b{place}"]] for place in range(self.bits)] for each in settings]
        return ModelInputs(arguments={"input": torch.tensor(bits).float()})


class Adder(nn.Module):
    """Reads a bit of both numbers in each step, and says the sum's bit from its state, and at the end the last carry.

    ``module:cell.output.step0`` is the state after the lowest bits.
    """

    def __init__(self, *, hidden_size: int = 8) -> None:
        super().__init__()
        require_at_least(1, hidden_size=hidden_size)
        self.cell = nn.GRUCell(2, hidden_size)
        self.sum, self.carry = nn.Linear(hidden_size, 2), nn.Linear(hidden_size, 2)

    def forward(self, input: Float[Tensor, "batch bits 2"]) -> Float[Tensor, "batch answers 2"]:
        state, found = input.new_zeros(len(input), self.cell.hidden_size), []
        for bits in input.unbind(1):
            state = self.cell(bits, state)
            found.append(self.sum(state))
        return torch.stack([*found, self.carry(state)], 1)


def trained_adder(
    *, hidden_size: int = 8, bits: int = 4, seed: int = 0, steps: int = 1000, learning_rate: float = 1e-2
) -> Adder:
    """A network that is trained on all sums at once; takes seconds and gives the same weights each time.

    Args:
        hidden_size: of the network.
        bits: of each number.
        seed: of its start.
        steps, learning_rate: of Adam, whose rate falls linearly to 0.
    """
    inputs, sums = _every(bits)
    with seeded(seed):
        model = Adder(hidden_size=hidden_size)
        teach(
            model, lambda: cross_entropy(model(inputs).flatten(0, 1), sums.flatten()), steps=steps, rate=learning_rate
        )
    return model


def _every(bits: int) -> tuple[Float[Tensor, "sums bits 2"], Int[Tensor, "sums answers"]]:
    """The bits of all pairs of numbers, and of their sums."""
    places = torch.arange(bits + 1)
    one, other = torch.cartesian_prod(torch.arange(2**bits), torch.arange(2**bits)).unbind(1)
    of = [number[:, None] >> places & 1 for number in (one, other, one + other)]
    return torch.stack(of[:2], 2)[:, :bits].float(), of[2]
