"""Repetition of a sequence of symbols, and recurrent networks that have learned it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from itrain.bounds import require_at_least
from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ModelInputs
from itrain.tasks.base import Pair, Split, Task
from itrain.tasks.recurrent import GRU, mechanism
from itrain.tasks.sequences import Sequences
from itrain.tasks.teaching import seeded, teach


class Repeat(Task):
    """A sequence of symbols is said again: the symbol at each place is a variable, ``symbol1`` the first.

    Sequences are drawn uniformly; no two pairs are the same. The model is told the right symbols before each one that
    it says.

    Csordás et al. 2024, "Recurrent Neural Networks Learn to Store and Generate Sequences using Non-Linear
    Representations", who take 30 symbols and sequences of up to 9.

    Args:
        symbols: how many there are.
        length: of a sequence.
        swaps: ``one`` interchanges the symbol at one place, each equally often; ``some`` that of each place with a
            probability of 1/2, and at least one, from one source.
    """

    def __init__(self, *, symbols: int = 10, length: int = 6, swaps: Literal["one", "some"] = "one") -> None:
        require_at_least(2, symbols=symbols, length=length)
        self.symbols, self.length, self.swaps = symbols, length, swaps
        self.variables = tuple(f"symbol{place + 1}" for place in range(length))
        self.causal_model = CausalModel(
            inputs=dict.fromkeys(self.variables, range(symbols)),
            mechanisms={"said": mechanism(self.variables, lambda *said: said)},
            output="said",
        )

    @property
    def outputs(self) -> Sequence[tuple[int, ...]]:
        return Sequences(classes=self.symbols, length=self.length)

    def label(self, output: tuple[int, ...]) -> tuple[int, ...]:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        base, source = (self.causal_model.sample(random) for _ in range(2))
        some = [each for each in self.variables if random.random() < 0.5] if self.swaps == "some" else []
        return Pair(base=base, sources=dict.fromkeys(some or [random.choice(self.variables)], source))

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        symbols = torch.tensor([[setting[name] for name in self.variables] for setting in settings])
        return ModelInputs(arguments={"input": symbols})

    def told(self, settings: Sequence[Setting], answers: Sequence[Sequence[int]]) -> ModelInputs:
        return ModelInputs(arguments={**self.inputs(settings).arguments, "told": torch.tensor(answers)})


class RepeatGRU(GRU):
    """A :class:`~itrain.tasks.recurrent.GRU` that says again what it has read.

    ``module:memory.output`` is the state from which it says it with the symbols that it has read beside it, one-hot, by
    place, (hidden_size + length * symbols): it goes on from the state alone.
    """

    def __init__(self, *, symbols: int = 10, hidden_size: int = 48, length: int = 6) -> None:
        super().__init__(symbols=symbols, hidden_size=hidden_size, length=length)
        self.memory = nn.Identity()

    def between(
        self, state: Float[Tensor, "batch hidden"], input: Int[Tensor, "batch read"]
    ) -> Float[Tensor, "batch hidden"]:
        symbols = one_hot(input, self.symbols).flatten(1).to(state)
        return self.memory(torch.cat([state, symbols], 1))[:, : self.hidden_size]


def trained_repeater(
    *,
    symbols: int = 10,
    hidden_size: int = 48,
    length: int = 6,
    seed: int = 0,
    steps: int = 6000,
    batch_size: int = 256,
    learning_rate: float = 5e-3,
    weight_decay: float = 0.1,
) -> RepeatGRU:
    """A network trained on new sequences in each step, of all lengths up to its own; the same weights each time.

    Args:
        symbols, hidden_size, length: of the network.
        seed: of its start and of the sequences.
        steps, batch_size, learning_rate, weight_decay: of AdamW, whose rate falls linearly to 0.
    """
    require_at_least(1, batch_size=batch_size)
    with seeded(seed) as generator:
        model = RepeatGRU(symbols=symbols, hidden_size=hidden_size, length=length)

        def loss() -> Float[Tensor, ""]:
            count = int(torch.randint(1, length + 1, (), generator=generator))
            said = torch.randint(symbols, (batch_size, count), generator=generator)
            return cross_entropy(model(said, said).flatten(0, 1), said.flatten())

        teach(model, loss, steps=steps, rate=learning_rate, decay=weight_decay)
    return model
