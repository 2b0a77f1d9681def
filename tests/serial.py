"""A network whose two variables lie in two layers, and a task whose sources are intervened runs of it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor, nn

from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ModelInputs
from itrain.tasks.base import Pair, Split, Task

HIDDEN = 8


class Staged(nn.Module):
    """Answers (a and b) xor c: a, b and c are directions of ``first``, both = a and b is one of ``second``."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        one, two = (torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0] for _ in range(2))
        self.first, self.second, self.third = nn.Identity(), nn.Identity(), nn.Identity()
        self.one, self.two = nn.Parameter(one[:, :3]), nn.Parameter(two[:, :2])

    def forward(self, bits: Tensor) -> Tensor:
        a, b, c = (self.first(bits @ self.one.T) @ self.one).unbind(-1)
        both = torch.relu(a + b - 1)
        both, c = (self.second(torch.stack([both, c], -1) @ self.two.T) @ self.two).unbind(-1)
        differ = self.third(torch.stack([both + c - 2 * both * c], -1))
        return torch.cat([0.5 - differ, differ - 0.5], -1)


class Both(Task):
    """(a and b) xor c. The base takes ``both`` from a run that takes ``a`` from another, which may be intervened too.

    Args:
        depth: how many runs edit one another; 1: no source is intervened.
        mixed: whether every other pair's source is as the task samples it, so that nothing edits it.
    """

    variables = ("a", "both")
    exhaustive = True
    outputs = (0, 1)
    causal_model = CausalModel(
        inputs=dict.fromkeys("abc", (0, 1)),
        mechanisms={"both": lambda a, b: a & b, "answer": lambda both, c: both ^ c},
        output="answer",
    )

    def __init__(self, depth: int = 2, *, mixed: bool = False) -> None:
        self.depth, self.mixed = depth, mixed

    def values(self, variable: str) -> Sequence[int]:
        return (0, 1)

    def label(self, output: int) -> int:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        run: Setting | Pair = self.causal_model.sample(random)
        edited = not self.mixed or random.random() < 0.5
        for _ in range(self.depth - 1 if edited else 0):
            run = Pair(base=self.causal_model.sample(random), sources={"a": run})
        return Pair(base=self.causal_model.sample(random), sources={"both": run})

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        return ModelInputs(arguments={"bits": torch.tensor([[float(s[name]) for name in "abc"] for s in settings])})
