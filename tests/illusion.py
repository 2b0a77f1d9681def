"""Networks with a disconnected and a dormant direction, in which a subspace has an effect that its parts have not."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor, nn

from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ModelInputs
from itrain.tasks.base import Pair, Split, Task

Rows = Sequence[Sequence[float]]


class Sign(Task):
    """The answer is the sign of the input x, which is -1 or 1."""

    variables, outputs, exhaustive = ("sign",), (0, 1), True
    causal_model = CausalModel(
        inputs={"x": [-1, 1]},
        mechanisms={"sign": lambda x: int(x > 0), "answer": lambda sign: sign},
        output="answer",
    )

    def values(self, variable: str) -> Sequence[int]:
        return [0, 1]

    def label(self, output: int) -> int:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        base, source = (self.causal_model.sample(random) for _ in range(2))
        return Pair(base=base, sources={"sign": source})

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        return ModelInputs(arguments={"x": torch.tensor([[float(each["x"])] for each in settings])})


class Distilled(nn.Module):
    """y = W (x w1), with w1 = (1, 0, 1) and y summed to logits (-y, y): the network of Makelov et al. 2024, section 3.

    The first hidden feature is x and has no effect on y: it is disconnected. The second is always 0 and has one: it is
    dormant. The third carries x to y.
    """

    def __init__(self, weight: Rows, readout: Sequence[float]) -> None:
        super().__init__()
        self.spread = given([[1.0], [0.0], [1.0]])
        self.read = given(weight)
        self.head = given([[-each for each in readout], list(readout)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.spread(x)))


class InTheMiddle(nn.Module):
    """A residual stream carries x past an MLP, whose neurons hold x where nothing reads it, and 0 where something does.

    The pattern of the eighth MLP of GPT-2 small in Makelov et al. 2024, section 4: all of the MLP's activation has no
    effect, and a direction of it that joins a disconnected and a dormant neuron has one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up = given([[1.0], [1.0], [-1.0], [-1.0], [0.05], [0.0]])
        with torch.no_grad():
            self.up.bias.copy_(torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0, 0.0]))
        self.down = given([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.3, 0.0]])
        self.head = given([[-1.0, -2.0, 0.0], [1.0, 2.0, 0.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.down(self.up(x).relu())], 1))


def given(weight: Rows) -> nn.Linear:
    """A linear map of these weights, with biases of 0."""
    made = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
        made.bias.zero_()
    return made
