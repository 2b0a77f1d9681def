"""Pointer-value retrieval on scans of handwritten digits, and a convolutional network for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from random import Random

import torch
from torch import nn

from itrain.bounds import require_at_least
from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ModelInputs
from itrain.tasks.base import Pair, Split, Task

CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")
SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.67), "validation": (0.67, 0.75), "test": (0.75, 1.0)}
"""The part of the shuffled scans that each split draws from."""


class DigitsPVR(Task):
    """Four scans in a grid: the digit at the top left, the pointer, says which of the others is the answer.

    It is the top right one for a pointer of 0 to 3, the bottom left one for 4 to 6, the bottom right one for 7 to 9.
    Pairs interchange the pointer or one of the other digits, all four equally often. The scans, of 8 x 8 pixels, are
    scikit-learn's; train, validation and test have disjoint ones.

    Zhang et al. 2021, "Pointer Value Retrieval: A new benchmark for understanding the limits of neural network
    generalization"; with these variables Geiger et al. 2022, "Inducing Causal Structure for Interpretable Neural
    Networks", section 4, where the digits are MNIST's.

    Args:
        scans_seed: shuffles the scans before they are divided among the splits.

    Raises:
        ImportError: scikit-learn, which holds the scans, is not installed.
    """

    variables = ("pointer", "top_right", "bottom_left", "bottom_right")

    def __init__(self, *, scans_seed: int = 0) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as missing:
            raise ImportError("the digits are scikit-learn's: pip install scikit-learn") from missing
        scans, digits = load_digits(return_X_y=True)
        self.images = torch.tensor(scans).float().view(-1, 8, 8) / 8 - 1
        self.digits: list[int] = digits.tolist()
        self._shuffled = Random(scans_seed).sample(range(len(self.digits)), len(self.digits))
        self.causal_model = CausalModel(
            inputs={f"{corner}_scan": range(len(self.digits)) for corner in CORNERS},
            mechanisms={
                "pointer": lambda top_left_scan: self.digits[top_left_scan],
                "top_right": lambda top_right_scan: self.digits[top_right_scan],
                "bottom_left": lambda bottom_left_scan: self.digits[bottom_left_scan],
                "bottom_right": lambda bottom_right_scan: self.digits[bottom_right_scan],
                "answer": _retrieve,
            },
            output="answer",
        )

    @property
    def outputs(self) -> Sequence[int]:
        return range(10)

    def values(self, variable: str) -> Sequence[int]:
        return range(10) if variable in self.variables else super().values(variable)

    def label(self, output: int) -> int:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        return Pair(
            base=self._scans(random, split), sources={random.choice(self.variables): self._scans(random, split)}
        )

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        scans = torch.tensor([[setting[f"{corner}_scan"] for corner in CORNERS] for setting in settings])
        grid = self.images[scans].unflatten(1, (2, 2)).transpose(2, 3)
        return ModelInputs(arguments={"input": grid.reshape(len(settings), 1, 16, 16)})

    def _scans(self, random: Random, split: Split) -> dict[str, int]:
        start, stop = (round(share * len(self._shuffled)) for share in SHARES[split])
        return {f"{corner}_scan": self._shuffled[random.randrange(start, stop)] for corner in CORNERS}


def pvr_cnn(*, block_size: int = 32) -> nn.Sequential:
    """An untrained network for the task: an ``encoder`` to four blocks of features, a ``decoder`` to the ten digits.

    Args:
        block_size: features in each of the four blocks.
    """
    require_at_least(1, block_size=block_size)
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, 4 * block_size),
    )
    decoder = nn.Sequential(nn.ReLU(), nn.Linear(4 * block_size, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(OrderedDict(encoder=encoder, decoder=decoder))


def _retrieve(pointer: int, top_right: int, bottom_left: int, bottom_right: int) -> int:
    return top_right if pointer <= 3 else bottom_left if pointer <= 6 else bottom_right
