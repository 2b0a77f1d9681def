"""Probes: classifiers of a variable's value from an activation. They read and never edit."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LinearProbe(nn.Module):
    """Class scores W (h - mu) / sigma + b, with mu and sigma of the training activations.

    Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes".
    """

    mean: Float[Tensor, " hidden"]
    deviation: Float[Tensor, " hidden"]

    def __init__(self, hidden_size: int, *, num_classes: int) -> None:
        super().__init__()
        self.hidden_size, self.num_classes = hidden_size, num_classes
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("deviation", torch.ones(hidden_size))
        self.scores = nn.Linear(hidden_size, num_classes)
        nn.init.zeros_(self.scores.weight)

    def fit(self, activations: Float[Tensor, "examples hidden"]) -> None:
        """Take mean and deviation from training activations; a constant feature is left unscaled."""
        self.mean.copy_(activations.mean(0))
        deviation = activations.std(0)
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))

    def forward(self, activation: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch classes"]:
        return self.scores((activation - self.mean) / self.deviation)
