"""Hierarchical equality: are two pairs of objects both equal or both unequal? And networks that have learned it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from itertools import combinations
from random import Random
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from itrain.bounds import require_at_least
from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ModelInputs
from itrain.tasks.base import Pair, Split, Task
from itrain.tasks.teaching import seeded, teach

OBJECT = 4
"""Numbers that describe an object."""
SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""The part of the objects that each split draws from."""
VARIABLES = {"both_equal": ("left", "right"), "first_argument": ("first",)}
"""The variables that each hypothesis interchanges."""


class HierarchicalEquality(Task):
    """(w = x) = (y = z), for objects that are vectors of 4 numbers: the equality of each pair is a variable.

    Pairs interchange one variable or both, each with its own source and equally often; every equality holds with
    probability 1/2, so half of all labels change. Train, validation and test have disjoint objects.
    Geiger et al. 2024, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations", section 4.

    Args:
        hypothesis: ``both_equal`` interchanges ``left`` (w = x) and ``right`` (y = z). ``first_argument`` is a control
            that a network need not satisfy: it interchanges ``first``, the identity of w, which equals the base's
            x in half of the sources. Whether a source's own pairs are equal says nothing about the label.
        objects: the number of objects.
        objects_seed: draws their numbers, uniform from -1 to 1 in steps of 0.01.
    """

    def __init__(
        self,
        *,
        hypothesis: Literal["both_equal", "first_argument"] = "both_equal",
        objects: int = 20_000,
        objects_seed: int = 0,
    ) -> None:
        self.variables = VARIABLES[hypothesis]
        require_at_least(10, objects=objects)  # so that each split has two that differ
        self.vectors = _draw(objects, torch.Generator().manual_seed(objects_seed))
        self.causal_model = CausalModel(
            inputs=dict.fromkeys("wxyz", range(objects)),
            mechanisms={
                "first": lambda w: w,
                "left": lambda first, x: first == x,
                "right": lambda y, z: y == z,
                "same": lambda left, right: left == right,
            },
            output="same",
        )
        self._identity = "first"
        """The variable that is the identity of w."""
        self._swaps = [swap for size in range(len(self.variables)) for swap in combinations(self.variables, size + 1)]

    @property
    def outputs(self) -> Sequence[bool]:
        return (False, True)

    def values(self, variable: str) -> Sequence[int | bool]:
        if variable == self._identity:
            return self.causal_model.inputs["w"]
        return (False, True) if variable in ("left", "right") else super().values(variable)

    def label(self, output: bool) -> int:
        return int(output)

    def false_task(self) -> HierarchicalEquality | None:
        """The control ``first_argument``, in which ``left`` is the identity of w."""
        if self._identity in self.variables:
            return None
        task = copy(self)
        task.causal_model = CausalModel(
            inputs=self.causal_model.inputs,
            mechanisms={
                "left": lambda w: w,
                "first_pair": lambda left, x: left == x,
                "right": lambda y, z: y == z,
                "same": lambda first_pair, right: first_pair == right,
            },
            output="same",
        )
        task._identity, task._swaps = "left", [("left",)]
        return task

    def sample(self, random: Random, split: Split) -> Pair:
        base = self._objects(random, split)
        sources = {variable: self._objects(random, split) for variable in random.choice(self._swaps)}
        if self._identity in sources and random.random() < 0.5:
            # Whether the source's own pair is equal stays as likely, and so says nothing about the label.
            source = sources[self._identity]
            for place in ("w", "x") if source["w"] == source["x"] else ("w",):
                source[place] = base["x"]
        return Pair(base=base, sources=sources)

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        objects = torch.tensor([[setting[place] for place in "wxyz"] for setting in settings])
        return ModelInputs(arguments={"input": self.vectors[objects].flatten(1)})

    def _objects(self, random: Random, split: Split) -> dict[str, int]:
        """Two pairs of objects, each equal or not with equal chances."""
        start, stop = (round(share * len(self.vectors)) for share in SHARES[split])
        setting = {}
        for one, two in ("wx", "yz"):
            setting[one], setting[two] = random.sample(range(start, stop), 2)
            if random.random() < 0.5:
                setting[two] = setting[one]
        return setting


def mlp(*, hidden_size: int = 16, num_layers: int = 3) -> nn.Sequential:
    """An untrained network for the task: ReLU layers ``hidden1``, ``hidden2``, ..., and the two classes' ``scores``."""
    require_at_least(1, hidden_size=hidden_size, num_layers=num_layers)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for layer in range(num_layers):
        linear = nn.Linear(hidden_size if layer else 4 * OBJECT, hidden_size)
        layers[f"hidden{layer + 1}"] = nn.Sequential(linear, nn.ReLU())
    return nn.Sequential(layers | {"scores": nn.Linear(hidden_size, 2)})


def trained_mlp(
    *,
    hidden_size: int = 16,
    num_layers: int = 3,
    seed: int = 0,
    steps: int = 3000,
    batch_size: int = 1024,
    learning_rate: float = 5e-3,
) -> nn.Sequential:
    """A network trained on new objects in each step; takes seconds and gives the same weights each time.

    Args:
        hidden_size, num_layers: of the network, as in :func:`mlp`.
        seed: of its start and of the objects.
        steps, batch_size, learning_rate: of Adam, whose rate falls linearly to 0.
    """
    require_at_least(1, batch_size=batch_size)
    with seeded(seed) as generator:
        model = mlp(hidden_size=hidden_size, num_layers=num_layers)

        def loss() -> Float[Tensor, ""]:
            inputs, same = _examples(batch_size, generator)
            return cross_entropy(model(inputs), same.long())

        teach(model, loss, steps=steps, rate=learning_rate)
    return model


def _draw(count: int, generator: torch.Generator) -> Float[Tensor, "count object"]:
    """Vectors of numbers from -1 to 1, in steps of 0.01."""
    return torch.randint(-100, 101, (count, OBJECT), generator=generator) / 100


def _examples(count: int, generator: torch.Generator) -> tuple[Float[Tensor, "count features"], Bool[Tensor, " count"]]:
    """Inputs of new objects, and whether the two pairs agree."""
    w, x, y, z = (_draw(count, generator) for _ in range(4))
    left, right = torch.randint(2, (2, count, 1), generator=generator).bool()
    inputs = torch.cat([w, x.where(~left, w), y, z.where(~right, y)], 1)
    return inputs, (left == right)[:, 0]
