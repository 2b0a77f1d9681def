"""Trains small sparse autoencoders and writes them in SAELens's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from itrain.bounds import require_at_least
from itrain.files import replacing_folder, write_json
from itrain.interventions.sae import Dictionary

FIGURES = "figures.json"
"""The file beside the weights with what was measured of them."""


class TrainedSAE(NamedTuple):
    """A trained autoencoder, and its figures on the activations that it was trained on.

    ``loss`` is the squared error of an activation, as trained; ``explained`` the share of the variance that is
    decoded; ``active`` the mean number of features of an activation that are not 0; ``dead`` the share of features that
    are 0 at all of them.
    """

    weights: Dictionary
    figures: Mapping[str, float]


def train_sae(
    activations: Float[Tensor, "examples hidden"],
    *,
    features: int,
    sparsity: float = 1.0,
    steps: int = 1500,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> TrainedSAE:
    """Train a ReLU autoencoder: loss = |x - x'|^2 + sparsity * sum_i f_i |W_d,i|, x scaled to the mean norm sqrt(d).

    The scale is folded into the weights. The penalty rises over the first fifth of the steps, and Adam's rate falls
    to 0 over the last. Bricken et al. 2023, "Towards Monosemanticity", with the penalty of its update of April 2024.

    Args:
        activations: what is decoded.
        features: how many.
        sparsity: the cost of a feature's activity.
        steps, batch_size, learning_rate: of Adam.
        seed: of the start and of the batches.
    """
    require_at_least(1, features=features, steps=steps, batch_size=batch_size)
    require_at_least(0, sparsity=sparsity, learning_rate=learning_rate)
    scale = activations.shape[1] ** 0.5 / activations.norm(dim=1).mean()
    inputs, generator = activations * scale, torch.Generator().manual_seed(seed)
    decoder = normalize(torch.randn(features, activations.shape[1], generator=generator), dim=1)
    starts = [decoder.T.clone(), torch.zeros(features), decoder, inputs.mean(0)]
    encoder, encoder_bias, decoder, decoder_bias = (each.requires_grad_() for each in starts)
    weights = Dictionary(encoder, encoder_bias, decoder, decoder_bias)
    optimizer = torch.optim.Adam(starts, lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 5 * (1 - step / steps)))
    with torch.enable_grad():
        for step in range(steps):
            batch = inputs[torch.randint(len(inputs), (batch_size,), generator=generator)]
            found = _features(weights, batch)
            penalty = (found * weights.decoder.norm(dim=1)).sum(1).mean()
            loss = _error(weights, found, batch) + sparsity * min(1.0, 5 * step / steps) * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        trained = Dictionary(encoder * scale, encoder_bias.detach(), decoder / scale, decoder_bias / scale)
    return TrainedSAE(trained, _figures(trained, activations, scale))


def write_sae(trained: TrainedSAE, folder: str | Path, *, hook_name: str) -> Path:
    """Write a folder that SAELens and :class:`~itrain.saes.source.SAE` read; ``hook_name`` says what it is of."""
    folder, weights = Path(folder), trained.weights
    hidden, features = weights.encoder.shape
    settings = {
        "architecture": "standard",
        "d_in": hidden,
        "d_sae": features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": weights.subtracts,
        "normalize_activations": weights.normalization,
        "reshape_activations": "none",
        "metadata": {"hook_name": hook_name, "sae_lens_version": "6.0.0"},
    }
    tensors = dict(zip(("W_enc", "b_enc", "W_dec", "b_dec"), weights[:4], strict=True))
    with replacing_folder(folder) as beside:
        save_file({name: each.contiguous() for name, each in tensors.items()}, beside / "sae_weights.safetensors")
        write_json(beside / "cfg.json", settings)
        write_json(beside / FIGURES, dict(trained.figures))
    return folder


def _features(weights: Dictionary, inputs: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch features"]:
    return ((inputs - weights.decoder_bias) @ weights.encoder + weights.encoder_bias).relu()


def _error(
    weights: Dictionary, features: Float[Tensor, "batch features"], inputs: Float[Tensor, "batch hidden"]
) -> Float[Tensor, ""]:
    return (features @ weights.decoder + weights.decoder_bias - inputs).square().sum(1).mean()


@torch.no_grad()
def _figures(weights: Dictionary, activations: Float[Tensor, "examples hidden"], scale: Tensor) -> dict[str, float]:
    found = _features(weights, activations)
    error, active = _error(weights, found, activations), found > 0
    return {
        "loss": float(error * scale**2),
        "explained": float(1 - error / (activations - activations.mean(0)).square().sum(1).mean()),
        "active": float(active.sum(1).float().mean()),
        "dead": float((~active.any(0)).float().mean()),
    }
