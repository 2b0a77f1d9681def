"""Sparse autoencoders: many features, few of them active, and an error that is kept or dropped by choice."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.interventions.featurizers import Featurizer

Normalization = Literal["none", "centred", "layer_norm", "constant_norm_rescale"]
Error = Literal["keep", "drop"]
EPSILON = 1e-5
"""What SAELens's layer norm adds to the standard deviation of its input, and not to that of its output."""


WEIGHTS = ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold")


class Dictionary(NamedTuple):
    """The weights of a sparse autoencoder: f = a((n(h) - c b_d) W_e + b_e), decoded as f W_d + b_d."""

    encoder: Float[Tensor, "hidden features"]
    encoder_bias: Float[Tensor, " features"]
    decoder: Float[Tensor, "features hidden"]
    decoder_bias: Float[Tensor, " hidden"]
    threshold: Float[Tensor, " features"] | None = None
    """What a pre-activation must exceed (JumpReLU, and BatchTopK at inference); None: 0 (ReLU)."""
    k: int | None = None
    """How many of the largest pre-activations are kept (TopK); None: all."""
    subtracts: bool = True
    """Whether the decoder's bias is subtracted from the input (c)."""
    normalization: Normalization = "none"
    """What is done to each activation before (n), and undone after the decoder."""


class SparseAutoencoder(Featurizer):
    """The features of a sparse autoencoder, in the activation's own units: h = f W_d + error.

    f = s a((n(h) - c b_d) W_e + b_e), with a ReLU, JumpReLU or TopK. ``n`` is the identity, a layer norm, the
    rescaling to the norm sqrt(d), or takes the mean of the features away. s, the size by which it divides h, is else 1;
    m, the mean that it takes away, is else 0. The offset of an activation is s b_d + m.

    Args:
        weights: of the autoencoder, which stay as they are.
        error: ``keep`` leaves in the error all that the features do not say, h - f W_d, so that nothing is lost.
            ``drop`` leaves the offset alone, so that an edit replaces the whole activation by what is decoded, as
            Chaudhary and Geiger 2024 do: decode(encode(h)) is then the reconstruction of h, and not h.
    """

    encoder: Float[Tensor, "hidden features"]
    encoder_bias: Float[Tensor, " features"]
    decoder: Float[Tensor, "features hidden"]
    decoder_bias: Float[Tensor, " hidden"]
    threshold: Float[Tensor, " features"]

    def __init__(self, weights: Dictionary, *, error: Error = "keep") -> None:
        super().__init__()
        self.num_features = weights.encoder.shape[1]
        self.exact = error == "keep"
        self.k, self.subtracts, self.normalization = weights.k, weights.subtracts, weights.normalization
        threshold = torch.zeros_like(weights.encoder_bias) if weights.threshold is None else weights.threshold
        for name in WEIGHTS:
            self.register_buffer(name, threshold if name == "threshold" else getattr(weights, name))

    def encode(
        self, activation: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "*batch hidden"]]:
        inputs, size, mean = self._normalized(activation)
        features = size * self._active((inputs - self.decoder_bias * self.subtracts) @ self.encoder + self.encoder_bias)
        if self.exact:
            return features, activation - features @ self.decoder
        return features, (size * self.decoder_bias + mean).expand_as(activation)

    def decode(
        self, features: Float[Tensor, "*batch features"], error: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return features @ self.decoder + error

    def _normalized(self, activation: Float[Tensor, "*batch hidden"]) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """The normalised activation, and the size and the mean that give it back."""
        if self.normalization == "layer_norm":
            mean = activation.mean(-1, keepdim=True)
            size = activation.std(-1, keepdim=True)
            return (activation - mean) / (size + EPSILON), size, mean
        if self.normalization == "centred":
            mean = activation.mean(-1, keepdim=True)
            return activation - mean, 1.0, mean
        if self.normalization == "constant_norm_rescale":
            norm = activation.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(activation.dtype).tiny)
            size = norm / activation.shape[-1] ** 0.5
            return activation / size, size, 0.0
        return activation, 1.0, 0.0

    def _active(self, before: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        features = before.relu() * (before > self.threshold)
        if self.k is None:
            return features
        values, places = features.topk(self.k, sorted=False)
        return torch.zeros_like(features).scatter(-1, places, values)
