"""Noisy variables: vectors that carry two variables among features of noise, and a network that classifies them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from random import Random
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from itrain.bounds import require_at_least
from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ModelInputs
from itrain.tasks.base import Pair, Split, Task
from itrain.tasks.teaching import seeded, teach

X, Y = (-1, 1), (0, 1, 2, 3, 4)
SPREAD = 0.1
"""Deviation of the noise on the two variables' features."""
SLOPE = 0.2
"""How much of y is in the feature of x."""
SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""The part of the vectors of each class that each split draws from."""
Part: TypeAlias = Literal["all", "sparse", "dense"]
PARTS: dict[Part, tuple[int, ...]] = {"all": Y, "sparse": (0, 3), "dense": (1, 2)}
"""The values of y in each part of the classes."""


class NoisyVariables(Task):
    """The class of a vector with features x + 0.2 y and y, each with noise, and further features of noise alone.

    x is -1 or 1 and y 0 to 4, which makes ten classes. Each class is equally often what an interchange leads to.
    Train, validation and test have disjoint vectors. Grant et al. 2025, "Addressing divergent representations from
    causal interventions on neural networks", section 5.

    Args:
        interchanged: the variables of which each pair interchanges one: ``x``, as in the paper, or either.
        trained: the classes of training and validation: ``all``, ``sparse`` (y is 0 or 3) or ``dense`` (1 or 2).
        tested: the classes of the test; None: those of training. Others ask whether an alignment holds for them too.
        noise_features: the features of noise.
        vectors: the vectors of each class.
        vectors_seed: draws them.
    """

    variables = ("x", "y")

    def __init__(
        self,
        *,
        interchanged: Sequence[Literal["x", "y"]] = ("x",),
        trained: Part = "all",
        tested: Part | None = None,
        noise_features: int = 16,
        vectors: int = 1000,
        vectors_seed: int = 0,
    ) -> None:
        tested = trained if tested is None else tested
        for part in (trained, tested):
            if part not in get_args(Part):
                raise ValueError(f"task: there is no part '{part}' of the classes; there are {', '.join(PARTS)}")
        if not interchanged or not set(interchanged) <= set(self.variables):
            raise ValueError(f"task.interchanged={list(interchanged)}: name x, y, or both")
        require_at_least(10, vectors=vectors)  # so that each split has two of a class
        require_at_least(0, noise_features=noise_features)
        self.interchanged = tuple(interchanged)
        self.parts: dict[Split, Part] = {"train": trained, "validation": trained, "test": tested}
        self.causal_model = CausalModel(
            inputs={"x_value": X, "y_value": Y, "drawn": range(vectors)},
            mechanisms={
                "x": lambda x_value: x_value,
                "y": lambda y_value: y_value,
                "class": lambda x, y: (x, y),
            },
            output="class",
        )
        generator = torch.Generator().manual_seed(vectors_seed)
        labels = torch.arange(len(self.outputs)).repeat_interleave(vectors)
        self.vectors = _vectors(labels, noise_features, generator).view(len(self.outputs), vectors, -1)

    @property
    def outputs(self) -> Sequence[tuple[int, int]]:
        return [(x, y) for x in X for y in Y]

    def values(self, variable: str) -> Sequence[object]:
        return {"x": X, "y": Y}.get(variable) or super().values(variable)

    def label(self, output: tuple[int, int]) -> int:
        return self.outputs.index(output)

    def sample(self, random: Random, split: Split) -> Pair:
        wanted = {"x": random.choice(X), "y": random.choice(PARTS[self.parts[split]])}
        swapped = random.choice(self.interchanged)
        base, source = self._drawn(random, split), self._drawn(random, split)
        for name, value in wanted.items():
            (source if name == swapped else base)[f"{name}_value"] = value
        return Pair(base=base, sources={swapped: source})

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        labels = torch.tensor([self.label((setting["x_value"], setting["y_value"])) for setting in settings])
        return ModelInputs(arguments={"input": self.vectors[labels, torch.tensor([s["drawn"] for s in settings])]})

    def _drawn(self, random: Random, split: Split) -> dict[str, int]:
        start, stop = (round(share * self.vectors.shape[1]) for share in SHARES[split])
        y = random.choice(PARTS[self.parts[split]])
        return {"x_value": random.choice(X), "y_value": y, "drawn": random.randrange(start, stop)}


def mlp(*, noise_features: int = 16, hidden_size: int = 128) -> nn.Sequential:
    """An untrained network for the task: the vector as ``latent``, a ReLU layer ``hidden``, and ten ``scores``."""
    require_at_least(1, hidden_size=hidden_size)
    require_at_least(0, noise_features=noise_features)
    hidden = nn.Sequential(nn.Linear(2 + noise_features, hidden_size), nn.ReLU())
    scores = nn.Linear(hidden_size, len(X) * len(Y))
    return nn.Sequential(OrderedDict(latent=nn.Identity(), hidden=hidden, scores=scores))


def trained_mlp(
    *,
    noise_features: int = 16,
    hidden_size: int = 128,
    seed: int = 0,
    steps: int = 2000,
    batch_size: int = 200,
    learning_rate: float = 1e-2,
) -> nn.Sequential:
    """A network trained on new vectors in each step; takes seconds and gives the same weights each time.

    Args:
        noise_features, hidden_size: of the network, as in :func:`mlp`.
        seed: of its start and of the vectors.
        steps, batch_size, learning_rate: of Adam, whose rate falls linearly to 0.
    """
    require_at_least(1, batch_size=batch_size)
    generator = torch.Generator().manual_seed(seed + 1)
    with seeded(seed):
        model = mlp(noise_features=noise_features, hidden_size=hidden_size)

        def loss() -> Float[Tensor, ""]:
            labels = torch.randint(len(X) * len(Y), (batch_size,), generator=generator)
            return cross_entropy(model(_vectors(labels, noise_features, generator)), labels)

        teach(model, loss, steps=steps, rate=learning_rate)
    return model


def _vectors(
    labels: Int[Tensor, " count"], noise_features: int, generator: torch.Generator
) -> Float[Tensor, "count features"]:
    """Vectors of these classes, with the two variables' features centred over all classes."""
    x, y = torch.tensor(X)[labels // len(Y)], torch.tensor(Y)[labels % len(Y)]
    middle = sum(Y) / len(Y)
    variables = torch.stack([x + SLOPE * (y - middle), y - middle], 1)
    noise = torch.randn(len(labels), 2 + noise_features, generator=generator)
    return torch.cat([variables + SPREAD * noise[:, :2], noise[:, 2:]], 1)
