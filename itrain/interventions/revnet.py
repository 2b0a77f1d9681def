"""RevNet alignment: interchange in the coordinates of a learned non-linear bijection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.bounds import require_at_least
from itrain.interventions.base import Intervention
from itrain.interventions.blocks import Blocks
from itrain.interventions.das import FullRotationDAS
from itrain.interventions.featurizers import Featurizer, Rotation


class RevNet(Featurizer):
    """Coordinates under a learned bijection: features = f(h), with no error; f is a chain of additive couplings.

    A coupling of the halves (a, b) of its input is a := a + F(b), then b := b + G(a), with F and G networks of one
    hidden ReLU layer. Its inverse is b := b - G(a), then a := a - F(b), and needs no inverse of F or G. Of an odd
    number of features, a has one more. Gomez et al. 2017, "The Reversible Residual Network", section 3.1.

    Rounding is what h loses by f and back. It grows with the slopes of F and G, so that ``double`` computes both ways
    in fp64, with the weights in fp32.

    Args:
        num_blocks: couplings in the chain.
        width: hidden units of F and of G.
        double: compute both ways in fp64.

    Raises:
        ValueError: the activation has a single feature, which has no halves.
    """

    trains_nonlinear_map: ClassVar[bool] = True
    capacity: ClassVar[str | None] = "num_blocks"
    linear: ClassVar[Callable[..., Featurizer] | None] = Rotation

    def __init__(self, hidden_size: int, *, num_blocks: int = 10, width: int = 16, double: bool = False) -> None:
        super().__init__()
        require_at_least(1, num_blocks=num_blocks, width=width)
        if hidden_size < 2:
            raise ValueError(f"an activation of {hidden_size} features has no halves for a RevNet to couple; use DAS")
        self.num_features, self.num_blocks, self.double_precision = hidden_size, num_blocks, double
        second = hidden_size // 2
        self.halves = (hidden_size - second, second)
        self.to_first = nn.ModuleList(_mlp(self.halves[1], width, self.halves[0]) for _ in range(num_blocks))
        """F of each coupling."""
        self.to_second = nn.ModuleList(_mlp(self.halves[0], width, self.halves[1]) for _ in range(num_blocks))
        """G of each coupling."""
        # A shift of all features changes no interchange, so that it would never have a gradient.
        (*_, last) = self.to_second[-1].children()
        last.register_parameter("bias", None)

    def encode(
        self, activation: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch hidden"]]:
        first, second = self._wide(activation).split(self.halves, -1)
        for to_first, to_second in zip(self.to_first, self.to_second, strict=True):
            first = first + _applied(to_first, second)
            second = second + _applied(to_second, first)
        return torch.cat([first, second], -1), torch.zeros_like(activation)

    def decode(
        self, features: Float[Tensor, "*batch hidden"], error: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        first, second = self._wide(features).split(self.halves, -1)
        for to_first, to_second in zip(reversed(self.to_first), reversed(self.to_second), strict=True):
            second = second - _applied(to_second, first)
            first = first - _applied(to_first, second)
        return torch.cat([first, second], -1).to(error.dtype) + error

    def _wide(self, given: Tensor) -> Tensor:
        return given.double() if self.double_precision else given


class RevNetDAS(Blocks):
    """Swaps blocks of coordinates of one learned bijection: f^-1((1 - m) * f(h) + m * f(s)), f a RevNet.

    ``blocks`` gives each variable its number of coordinates; see :class:`~itrain.interventions.blocks.Blocks`.

    A map of this freedom aligns nearly any algorithm with nearly any network whose activations carry the information,
    whether the network has learned the algorithm or not. A high IIA says nothing until the same fit has failed on a
    false variable and on a randomly initialised model. Sutter et al. 2025, "The Non-Linear Representation Dilemma: Is
    Causal Abstraction Enough for Mechanistic Interpretability?", whose networks take ``num_blocks=10`` and ``width``
    16, and ``num_blocks=8``, ``width=64`` and ``double`` for Pythia.

    Args:
        hidden_size: features of the activation, 2 or more.
        blocks: coordinates of each variable.
        num_blocks: couplings of the bijection.
        width: neurons of the hidden layer of each coupling's networks.
        double: compute the bijection in fp64, for large activations and many blocks.
    """

    capacity: ClassVar[str | None] = "num_blocks"
    linear: ClassVar[Callable[..., Intervention] | None] = FullRotationDAS

    def __init__(
        self,
        hidden_size: int,
        *,
        blocks: int | Mapping[str, int] = 1,
        num_blocks: int = 10,
        width: int = 16,
        double: bool = False,
    ) -> None:
        super().__init__(hidden_size, blocks=blocks)
        self.num_blocks, self.width, self.double_precision = num_blocks, width, double
        self.revnet = RevNet(hidden_size, num_blocks=num_blocks, width=width, double=double)

    @property
    def featurizer(self) -> Featurizer:
        return self.revnet

    def untrained(self) -> RevNetDAS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return RevNetDAS(
                self.hidden_size,
                blocks=self.blocks,
                num_blocks=self.num_blocks,
                width=self.width,
                double=self.double_precision,
            )


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


def _applied(mlp: nn.Module, given: Tensor) -> Tensor:
    """The network on an input of any precision, in that precision."""
    for part in mlp.children():
        if isinstance(part, nn.Linear):
            bias = None if part.bias is None else part.bias.to(given.dtype)
            given = nn.functional.linear(given, part.weight.to(given.dtype), bias)
        else:
            given = part(given)
    return given
