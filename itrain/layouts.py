"""How the activations of modules that are no transformer's lie, where their class tells it.

Everything else takes (batch, places, features), and so does an activation of three dimensions whose module does not
tell. Tensor letters: B batch, P places, F features, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

REMEDY = (
    "name the input or output of a module that tells its layout, such as a convolution, a batch norm or a linear map"
)
"""What to do about an activation whose features cannot be told from its places."""

_WITH_CHANNELS = (_ConvNd, _NormBase, nn.GroupNorm)
_MAPS = (
    *_WITH_CHANNELS,
    *(_MaxPoolNd, _AvgPoolNd, _AdaptiveMaxPoolNd, _AdaptiveAvgPoolNd, nn.LPPool1d, nn.LPPool2d),
    *(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.LocalResponseNorm, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle),
)
"""Modules whose inputs and outputs are (B, C, ...)."""


class Layout(ABC):
    """Brings a module's activations to (batch, places, features), and what is made of them back."""

    @abstractmethod
    def by_place(self, activation: Tensor, rows: int) -> Tensor:
        """The activation as (batch, places, features), in a run of so many rows."""

    @abstractmethod
    def back(self, activation: Tensor, like: Tensor) -> Tensor:
        """What has taken an activation's place, in the layout of the activation that the module gave."""


@dataclass(frozen=True)
class ChannelsFirst(Layout):
    """Maps (B, C, ...): the features are the channels, and the places are counted in reading order.

    Args:
        dims: how many dimensions make a map; with fewer the features come last.
        channels: the sizes that the channels may have; empty: any.
    """

    dims: int
    channels: frozenset[int] = frozenset()

    def by_place(self, activation: Float[Tensor, "batch channels *places"], rows: int) -> Tensor:
        return activation.flatten(2).transpose(1, 2) if self._is_map(activation) else activation

    def back(self, activation: Float[Tensor, "batch places channels"], like: Tensor) -> Tensor:
        return activation.transpose(1, 2).reshape(like.shape) if self._is_map(like) else activation

    def _is_map(self, activation: Tensor) -> bool:
        shape = activation.shape
        known = not self.channels or (shape[1] in self.channels and shape[-1] not in self.channels)
        return len(shape) >= self.dims and known


class TimeFirst(Layout):
    """Sequences (P, B, F), as torch's own recurrent and attention modules have them unless told otherwise."""

    def by_place(self, activation: Float[Tensor, "places batch features"], rows: int) -> Tensor:
        return activation.transpose(0, 1) if activation.ndim == 3 else activation

    def back(self, activation: Float[Tensor, "batch places features"], like: Tensor) -> Tensor:
        return activation.transpose(0, 1).contiguous() if like.ndim == 3 else activation


class OneRow(Layout):
    """Tokens of all examples in a row (B * P, F), as mixtures of experts and some MLPs have them."""

    def by_place(self, activation: Float[Tensor, "tokens features"], rows: int) -> Tensor:
        return activation.unflatten(0, (rows, -1)) if activation.ndim == 2 else activation

    def back(self, activation: Float[Tensor, "batch places features"], like: Tensor) -> Tensor:
        return activation.reshape(like.shape)


@dataclass(frozen=True)
class AttentionWeights(Layout):
    """Weights (B, H, P, S) of the S tokens that each of P tokens attends to, of all heads side by side, or of one."""

    head: int | None = None

    def by_place(self, activation: Float[Tensor, "batch heads places tokens"], rows: int) -> Tensor:
        return activation.transpose(1, 2).flatten(2) if self.head is None else activation[:, self.head]

    def back(
        self, activation: Float[Tensor, "batch places features"], like: Float[Tensor, "batch heads places tokens"]
    ) -> Tensor:
        if self.head is None:
            return activation.unflatten(2, (like.shape[1], like.shape[3])).transpose(1, 2).contiguous()
        return like.index_copy(1, torch.tensor([self.head], device=like.device), activation[:, None])


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module's activations; None where it is (batch, ..., features) or cannot be known."""
    if isinstance(module, _MAPS):
        return ChannelsFirst(3)
    attention = (
        module.self_attn if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) else module
    )
    if isinstance(attention, nn.RNNBase | nn.MultiheadAttention):
        return None if attention.batch_first else TimeFirst()
    inside = [channels_of(each, end) for each in module.modules() for end in ("input", "output")]
    sizes = {size for size in inside if size is not None}
    # Of three dimensions the last may be the features, as where a convolution cuts an image into tokens.
    return ChannelsFirst(4, frozenset(sizes)) if sizes else None


def channels_of(module: nn.Module, end: str) -> int | None:
    """The channels of a module's input or output, where its attributes tell."""
    if not isinstance(module, _WITH_CHANNELS):
        return None
    names = ("in_channels",) if end == "input" else ("out_channels",)
    return next(
        (getattr(module, name) for name in (*names, "num_features", "num_channels") if hasattr(module, name)), None
    )
