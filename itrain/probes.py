"""Probes: classifiers of a variable's value from an activation. They read and never edit."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Probe(nn.Module, ABC):
    """Class scores f((h - mu) / sigma), with mu and sigma of the training activations.

    A subclass is final and constructible as ``X(hidden_size, num_classes=...)`` with all other arguments keyword-only
    and defaulted.
    """

    mean: Float[Tensor, " hidden"]
    deviation: Float[Tensor, " hidden"]

    def __init__(self, hidden_size: int, *, num_classes: int) -> None:
        super().__init__()
        self.hidden_size, self.num_classes = hidden_size, num_classes
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("deviation", torch.ones(hidden_size))

    @abstractmethod
    def classify(self, features: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch classes"]:
        """The class scores of standardised activations."""

    def forward(self, activation: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch classes"]:
        return self.classify((activation - self.mean) / self.deviation)

    def fit(self, activations: Float[Tensor, "examples hidden"]) -> None:
        """Take mean and deviation from training activations; a constant feature is left unscaled."""
        self.mean.copy_(activations.mean(0))
        deviation = activations.std(0)
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))

    def squared_norm(self) -> Float[Tensor, ""]:
        """sum W^2 over the weight matrices; biases are free."""
        return torch.stack([p.square().sum() for p in self.parameters() if p.ndim > 1]).sum()


class LinearProbe(Probe):
    """Class scores W x + b of the standardised activation x.

    Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes".
    """

    def __init__(self, hidden_size: int, *, num_classes: int) -> None:
        super().__init__(hidden_size, num_classes=num_classes)
        self.scores = nn.Linear(hidden_size, num_classes)
        nn.init.zeros_(self.scores.weight)

    def classify(self, features: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch classes"]:
        return self.scores(features)


class MLPProbe(Probe):
    """Class scores W ReLU(V x + c) + b of the standardised activation x, with ``width`` hidden units.

    Hewitt and Liang 2019, "Designing and Interpreting Probes with Control Tasks", section 3.

    Raises:
        ValueError: ``width`` is less than 1.
    """

    def __init__(self, hidden_size: int, *, num_classes: int, width: int = 64) -> None:
        super().__init__(hidden_size, num_classes=num_classes)
        if width < 1:
            raise ValueError(f"width {width}: a probe with a hidden layer needs at least 1 unit")
        self.hidden, self.scores = nn.Linear(hidden_size, width), nn.Linear(width, num_classes)

    def classify(self, features: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch classes"]:
        return self.scores(self.hidden(features).relu())


def control_labels(types: Int[Tensor, " batch"], num_classes: int, *, seed: int) -> Int[Tensor, " batch"]:
    """A pseudo-random label for each type, the same wherever the type occurs.

    label = ((type * a mod 2^64) >> 33) mod num_classes for 64-bit hashes of types and an odd a drawn from the seed:
    multiply-shift hashing, Dietzfelbinger et al. 1997. Hewitt and Liang 2019, section 2.
    """
    factor = 2 * int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))) + 1
    return (types * factor >> 33) % num_classes
