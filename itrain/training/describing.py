"""Output-centric descriptions: what the directions along which a training edits the model mean for its output.

Tensor letters: N rows, D hidden, K directions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itrain.architectures import blocks
from itrain.data import CounterfactualBatch, ResponseBatch
from itrain.data.splits import SplitDataModule
from itrain.devices import device_of
from itrain.inputs import ModelInputs
from itrain.networks.base import Network
from itrain.networks.lane import Edit
from itrain.placements import Placement
from itrain.runs.tables import Table, Tables
from itrain.sites import Site
from itrain.training.base import Training
from itrain.training.interchange import Interchange

if TYPE_CHECKING:
    from itrain.tasks.responses import Tokenizer

EXAMPLES = 32
"""Test examples on which a training's edits are looked at."""
DIRECTIONS = 4
"""Directions of one placement that are described at most."""
RESIDUAL = ("block_input", "block_output", "attention_output", "mlp_output", "mixer_output", "cross_attention_output")
"""Components whose features are those of the residual stream."""
IN_ROW = 5
"""Tokens in a row of a table."""
LEAST = 0.01
"""The share of the edits' squared size below which a direction is left out."""


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One direction of a placement's edits, and what it means for the output.

    Args:
        place: the placement.
        vector: the direction, of length 1.
        share: of the squared size of all edits.
        size: the root mean square of the edits along it.
        projection: the change of each token's logit by the vocabulary projection; None: there is none at this site.
        change: the mean change of each token's logit under the edit along the direction, at its size.
    """

    place: str
    vector: Float[Tensor, " hidden"]
    share: float
    size: float
    projection: Float[Tensor, " vocabulary"] | None
    change: Float[Tensor, " vocabulary"]


def can_describe(training: Training, data: SplitDataModule, tokenizer: Tokenizer | None) -> bool:
    """Whether the training edits activations of a whole model whose outputs are the tokenizer's tokens."""
    found = isinstance(getattr(training, "interchange", None), Interchange)
    return found and tokenizer is not None and _vocabulary(training.network, data) >= len(tokenizer)  # type: ignore[attr-defined]


@torch.no_grad()
def directions_of(training: Training, data: SplitDataModule) -> list[Direction]:
    """The directions along which a training's interventions move activations, with two descriptions of each.

    The directions of a placement are the right singular vectors of its edits on test examples, the largest first: those
    of a subspace that is swapped, and the vector of one that is added. Their sign is that of the mean edit.

    *Vocabulary projection* is the logit lens of a direction v: (f(v) - f(-v)) / 2, where f is what follows the residual
    stream, the last norm and the head. *Token change* is (g(h + s v) - g(h - s v)) / 2, the mean over the examples of
    how the logits g change where the site's activation h moves by s, the root mean square of the edits along v.

    Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions", section 2,
    there VocabProj and TokenChange.
    """
    part: Interchange = training.interchange  # type: ignore[attr-defined]
    batch = data.datasets["test"].examples
    batch = batch.take(torch.arange(min(EXAMPLES, len(batch)))).to(device_of(part.network))
    inputs = _edited_inputs(batch)
    found = []
    with part.network.unchanged():
        for placement in part.placements:
            rows = _moved(part, placement, batch)
            for vector, share, size in _principal(rows):
                found.append(
                    Direction(
                        place=str(placement),
                        vector=vector,
                        share=share,
                        size=size,
                        projection=_projection(part.network, inputs, placement.write, vector),
                        change=token_change(part.network, inputs, placement.write, size * vector),
                    )
                )
    return found


def _projection(
    network: Network, inputs: ModelInputs, site: Site, vector: Float[Tensor, " hidden"]
) -> Float[Tensor, " vocabulary"] | None:
    """The vocabulary projection of a direction at a site; None where it is none of the residual stream."""
    if site.component.rpartition(".")[2] not in RESIDUAL or site.head is not None:
        return None
    return vocabulary_projection(network, inputs, vector)


def vocabulary_projection(
    network: Network, inputs: ModelInputs, vector: Float[Tensor, " hidden"]
) -> Float[Tensor, " vocabulary"] | None:
    """The logit lens of a direction of the residual stream, (f(v) - f(-v)) / 2; None where none is of its size."""
    if (site := _last_site(network, inputs)) is None or network.hidden_size(site) != len(vector):
        return None
    one = inputs.take(torch.tensor([0]))
    raised, lowered = (_answers(network, one, site, partial(_replaced, sign * vector)) for sign in (1, -1))
    return (raised - lowered) / 2


def token_change(
    network: Network, inputs: ModelInputs, site: Site, vector: Float[Tensor, " hidden"]
) -> Float[Tensor, " vocabulary"]:
    """The mean change of the logits where the site's activation moves by the vector, (g(h + v) - g(h - v)) / 2."""
    raised, lowered = (_answers(network, inputs, site, partial(_added, sign * vector)) for sign in (1, -1))
    return (raised - lowered) / 2


def in_tokens(tokenizer: Tokenizer, logits: Float[Tensor, " vocabulary"], count: int) -> tuple[list[str], list[str]]:
    """The tokens that are raised most, and those that are lowered most."""
    known = logits[: len(tokenizer)]
    count = min(count, len(known))

    def named(order: Int[Tensor, " count"]) -> list[str]:
        return [str(tokenizer.decode([token])).strip() or repr(tokenizer.decode([token])) for token in order.tolist()]

    return named(known.topk(count).indices), named((-known).topk(count).indices)


def in_a_row(found: Sequence[Direction], tokenizer: Tokenizer) -> tuple[str, str]:
    """The tokens that the leading direction raises, and those that it lowers, by token change."""
    raised, lowered = in_tokens(tokenizer, max(found, key=lambda each: each.share).change, IN_ROW)
    return " ".join(raised), " ".join(lowered)


def described(found: Sequence[Direction], tokenizer: Tokenizer, *, count: int = 8) -> Tables:
    """The descriptions as tables, one for each direction."""
    tables = Tables()
    for direction in found:
        rows: list[list[str | float]] = []
        for name, logits in (("vocabulary projection", direction.projection), ("token change", direction.change)):
            if logits is not None:
                raised, lowered = in_tokens(tokenizer, logits, count)
                rows.append([name, " ".join(raised), " ".join(lowered)])
        line = f"{direction.place}: a direction with {direction.share:.0%} of the edits, size {direction.size:.3g}"
        tables.append(Table([line], ["", "raises", "lowers"], rows))
    return tables


def _moved(part: Interchange, placement: Placement, batch: Any) -> Float[Tensor, "rows hidden"]:
    """What the placement's edits add to the activations of the examples."""
    alone = {placement: part.trained[placement].hardened()}
    inputs, site = _edited_inputs(batch), placement.write
    if isinstance(batch, CounterfactualBatch):
        edits: Any = part.edits(batch, alone, part.read(batch, alone))
    else:
        edits = [(site, partial(alone[placement], source=None))]
    before = part.network.read(inputs, [site])[site]
    after = before
    for _, edit in edits:
        after = edit(after)
    moved, _ = part.rows(after - before, inputs, site)
    return moved.flatten(0, -2)


def _principal(rows: Float[Tensor, "rows hidden"]) -> Iterator[tuple[Float[Tensor, " hidden"], float, float]]:
    """The directions of the rows, with their shares of the squared size and their root mean squares."""
    _, sizes, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    shares = sizes**2 / (sizes**2).sum()
    for vector, share, size in zip(directions[:DIRECTIONS], shares.tolist(), sizes.tolist(), strict=False):
        if share >= LEAST:
            sign = -1 if (rows.double() @ vector).sum() < 0 else 1
            yield (sign * vector).to(rows.dtype), share, size / len(rows) ** 0.5


def _edited_inputs(batch: CounterfactualBatch | ResponseBatch) -> ModelInputs:
    return batch.base if isinstance(batch, CounterfactualBatch) else batch.inputs


def _last_site(network: Network, inputs: ModelInputs) -> Site | None:
    """The residual stream at the token that answers, before the last norm; None where the model has none."""
    try:
        last = len(blocks(network.model)) - 1
    except ValueError:
        return None
    if inputs.answer is None or inputs.tokens is None:
        return None
    place = inputs.answer.view(len(inputs.answer), -1)[0, 0] - inputs.tokens[0, 0]
    return Site(layer=last, component="block_output", position=str(int(place)))


def _answers(network: Network, inputs: ModelInputs, site: Site, edit: Edit) -> Float[Tensor, " vocabulary"]:
    """The mean logits at the first answer token, in fp32."""
    logits = network.edit(inputs, [(site, edit)])
    return logits.float().view(len(logits), -1, logits.shape[-1])[:, 0].mean(0).cpu()


def _replaced(vector: Tensor, base: Tensor) -> Tensor:
    return vector.to(base).expand_as(base)


def _added(vector: Tensor, base: Tensor) -> Tensor:
    return base + vector.to(base).view(base.shape[1:] if vector.numel() != base.shape[-1] else (-1,))


def _vocabulary(network: Network, data: SplitDataModule) -> int:
    inputs = data.example()
    logits = network(inputs.to(device_of(network)))
    return logits.shape[-1] if inputs.tokens is not None and logits.ndim > 1 else 0
