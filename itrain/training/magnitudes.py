"""Magnitudes: how long a steering vector is in a training text, from how much the text has of it.

Tensor letters: B batch, P tokens at a position, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from itrain.bounds import require_at_least
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.networks.lane import Edit
from itrain.placements import Placement
from itrain.training.interchange import Interchange


class Lengths(NamedTuple):
    """By what each placement's vector is multiplied in each text, and each text's share of the penalty."""

    factors: Mapping[Placement, Float[Tensor, " batch"]]
    penalty: Float[Tensor, " batch"]


class TopLatents(nn.Module):
    """The mean of the largest latents of a text: m = mean(top-k_j ReLU(h_j . w)) for its tokens j; the edit adds m w.

    So w is trained to detect the concept by the same dot product that steers. A text's latents that are not among the k
    largest cost ``sparsity`` times their mean over its tokens; the cost rises linearly from 0 over the fit.

    Wu et al. 2025, "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders", ReFT-r1. There and
    here the tokens are those of prompt and response, so that a token's edit depends on later ones: in training alone,
    since where the vector steers, its length is a strength.

    Args:
        k: how many latents are averaged; texts with fewer tokens average theirs.
        sparsity: the cost of a latent of 1 at every token, in nats, at the end of the fit.

    Raises:
        ValueError: k is below 1, or the sparsity negative.
    """

    progress: Float[Tensor, ""]

    def __init__(self, *, k: int = 8, sparsity: float = 5e-3) -> None:
        super().__init__()
        require_at_least(1, k=k)
        require_at_least(0, sparsity=sparsity)
        self.k, self.sparsity = k, sparsity
        self.register_buffer("progress", torch.zeros(()), persistent=False)

    def anneal(self, progress: float) -> None:
        """Set the progress of the fit, from 0 to 1."""
        self.progress.fill_(progress)

    def forward(self, interchange: Interchange, inputs: ModelInputs) -> Lengths:
        """The lengths in each text, from its unedited activations."""
        with torch.no_grad():
            found = interchange.network.read(inputs, [each.write for each in interchange.trained])
        factors, penalties = {}, []
        for placement, each in interchange.trained.items():
            activation = found[placement.write]
            present = inputs.present(placement.write).to(activation.device, non_blocking=True)
            latents = (activation @ vector_of(each).to(activation)).relu()
            factors[placement], rest = largest(latents, present, self.k)
            penalties.append(rest)
        return Lengths(factors, self.sparsity * self.progress * sum(penalties))  # type: ignore[arg-type]


def vector_of(intervention: Intervention) -> Float[Tensor, " hidden"]:
    """The vector that an intervention adds, with its gradient."""
    weight = next(intervention.parameters())
    return intervention(torch.zeros(intervention.hidden_size, device=weight.device), None)


def largest(
    latents: Float[Tensor, "batch tokens"], present: Bool[Tensor, "batch tokens"], k: int
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The mean of each text's k largest latents, and the sum of the others divided by the number of its tokens."""
    ordered = latents.masked_fill(~present, -1.0).sort(1, descending=True).values.clamp(min=0)
    counts = present.sum(1)
    averaged = counts.clamp(max=k)
    first = torch.arange(latents.shape[1], device=latents.device) < averaged[:, None]
    return (ordered * first).sum(1) / averaged, (ordered * ~first).sum(1) / counts


def lengthened(edit: Edit, factor: Float[Tensor, " batch"], base: Float[Tensor, "batch tokens hidden"]) -> Tensor:
    """The activations moved by the factor of their text times what the edit moves them by."""
    return base + factor.to(base)[:, None, None] * (edit(base) - base)
