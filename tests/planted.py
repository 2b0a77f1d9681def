"""A module whose causal structure is known, and tasks that hypothesise the right and a wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor, nn

from itrain.causal_model import CausalModel, Setting
from itrain.data import CounterfactualDataModule
from itrain.inputs import ModelInputs
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.opening import Opened
from itrain.tasks.base import Pair, Split, Task

HIDDEN = 8


class Planted(nn.Module):
    """Answers whether both bits are set; each bit is one direction of ``embed``, hidden by a rotation."""

    def __init__(self) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)))[0]
        self.embed = nn.Linear(2, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, 2)
        with torch.no_grad():
            self.embed.weight.copy_(rotation[:, :2])
            self.head.weight.copy_(torch.stack([-rotation[:, :2].sum(1), rotation[:, :2].sum(1)]))
            self.head.bias.copy_(torch.tensor([1.5, -1.5]))

    def forward(self, bits: Tensor) -> Tensor:
        return self.head(self.embed(bits))


class Cell(nn.Linear):
    """Adds what it is given to a state."""

    def forward(self, bit: Tensor, state: Tensor) -> Tensor:  # type: ignore[override]
        return state + super().forward(bit)


class Stepwise(Planted):
    """The same answer from a cell that is called once for each bit, and takes up one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell(2, HIDDEN, bias=False)
        self.cell.weight = self.embed.weight
        del self.embed

    def forward(self, bits: Tensor) -> Tensor:
        state = bits.new_zeros(len(bits), HIDDEN)
        for bit in torch.diag_embed(bits).unbind(1):
            state = self.cell(bit, state)
        return self.head(state)


class Bits(Task):
    """``both(a, b)``, with the hypothesis that ``variable`` is represented: a bit (right), or their parity (wrong)."""

    exhaustive = True

    def __init__(self, variable: str = "left") -> None:
        self.variables = (variable,)
        self.causal_model = CausalModel(
            inputs={"a": [0, 1], "b": [0, 1]},
            mechanisms={
                "left": lambda a: a,
                "parity": lambda a, b: a ^ b,
                "both": (lambda parity, b: (parity ^ b) & b) if variable == "parity" else (lambda left, b: left & b),
            },
            output="both",
        )

    @property
    def outputs(self) -> Sequence[int]:
        return [0, 1]

    def values(self, variable: str) -> Sequence[int]:
        return [0, 1]

    def label(self, output: int) -> int:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        return Pair(
            base=self.causal_model.sample(random), sources={self.variables[0]: self.causal_model.sample(random)}
        )

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        return ModelInputs(arguments={"bits": torch.tensor([[float(s["a"]), float(s["b"])] for s in settings])})


def opened_with(task: Task, network: HookedNetwork, data: CounterfactualDataModule) -> Opened:
    """What a job of a sweep is given of a task and a module of one's own."""
    return Opened(
        base_model=BaseModel(model=network.model),
        network=network,
        task=task,
        data=data,
        open_network=lambda base_model: HookedNetwork(base_model.model),
        open_data=lambda task: data,
        threads="1",
    )
