"""The hyper-network of HyperDAS: from a concept in words to the tokens of base and source, and to a subspace.

Tensor letters: B batch, T tokens of the concept, S and P tokens of source and base, D features, W width, K rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, one_hot, silu

from itrain.bounds import require_at_least
from itrain.interventions.base import require_rank
from itrain.interventions.orthogonal import orthonormal_

LEAST_BID = 0.1
"""The weight below which the bid of a source token loses to "none"."""


class States(NamedTuple):
    """Activations of texts' tokens, and which of them are tokens of the text."""

    values: Float[Tensor, "batch tokens features"]
    present: Bool[Tensor, "batch tokens"]

    @property
    def normed(self) -> States:
        """The same in directions alone, of root mean square 1: norms of tokens differ by orders of magnitude."""
        size = self.values.shape[-1] ** 0.5
        return States(normalize(self.values, dim=-1) * size, self.present)


class Picks(NamedTuple):
    """What a hyper-network makes of a concept and a pair of texts.

    Args:
        weights: how much of each source token each base token takes; the last row is "none", and columns sum to 1.
        reflection: the unit vector v of the Householder reflection H = 1 - 2 v v^T.
    """

    weights: Float[Tensor, "batch source+1 base"]
    reflection: Float[Tensor, "batch features"]


class Block(nn.Module):
    """A decoder block: self-attention, cross-attention to the source's tokens and to the base's, and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.words, self.source, self.base = (nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(3))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, concept: States, base: States, source: States) -> States:
        hidden = concept.values
        normed = self.norms[0](hidden)
        length = hidden.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
        padding = ~concept.present
        hidden = (
            hidden
            + self.words(normed, normed, normed, key_padding_mask=padding, attn_mask=later, need_weights=False)[0]
        )
        for norm, attend, seen in ((self.norms[1], self.source, source), (self.norms[2], self.base, base)):
            asked = norm(hidden)
            padding = ~seen.present
            hidden = hidden + attend(asked, seen.values, seen.values, key_padding_mask=padding, need_weights=False)[0]
        return States(hidden + self.down(silu(self.up(self.norms[3](hidden)))), concept.present)


class Hypernetwork(nn.Module):
    """Picks tokens and a subspace for a concept that is given in words.

    The words' embeddings, those of the base model at the start, pass through decoder blocks that also attend to the
    states of base and source. The last word's c asks: with query q = Q c, base token j takes source token i by the
    weight softmax_i(q . K silu(C [b_j, s_i]) / sqrt(W)), in which "none" competes by q . K b_j / sqrt(W). A gated MLP
    gives v = MLP(c) / |MLP(c)|, which reflects the subspace that all concepts share, spanned by the rows of R: R (1 - 2
    v v^T).

    Sun et al. 2025, "HyperDAS: Towards Automating Mechanistic Interpretability with Hypernetworks", section 3. There
    the blocks are copies of the base model's first two, which ties them to one architecture; here they begin at
    random, as in the authors' ablation ``initialize_from_scratch``. Their C is followed by no silu: without rotary
    positions, which their keys have and these have not, the weights would fall into a part of b_j and one of s_i, and
    all base tokens would take from source tokens in the same proportions.

    Args:
        embeddings: of each word that some concept has.
        concepts: the words of each concept, by their places among ``embeddings``; -1 follows shorter ones.
        features: of the base model's states.
        rank: of the subspace.
        width, heads, blocks: of the hyper-network.
    """

    def __init__(
        self,
        *,
        embeddings: Float[Tensor, "words embedding"],
        concepts: Int[Tensor, "concepts length"],
        features: int,
        rank: int,
        width: int,
        heads: int,
        blocks: int,
    ) -> None:
        super().__init__()
        require_rank(rank, features)
        require_at_least(1, width=width, heads=heads, blocks=blocks)
        if width % heads:
            raise ValueError(f"width={width} is not divided by heads={heads}; take a multiple of it")
        self.words = nn.Embedding.from_pretrained(embeddings.detach().clone(), freeze=False)
        self.register_buffer("concepts", concepts, persistent=False)
        self.read_words = nn.Linear(embeddings.shape[1], width)
        self.places = nn.Parameter(torch.randn(concepts.shape[1], width) / width**0.5)
        self.read_base, self.read_source = (nn.Linear(features, width) for _ in range(2))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.query, self.key = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.combine = nn.Linear(2 * width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, features, bias=False)
        orthonormal_(self, "rotation", torch.linalg.qr(torch.randn(features, rank))[0].T)

    rotation: Float[Tensor, "rank features"]
    concepts: Int[Tensor, "concepts length"]

    def forward(self, concept: Int[Tensor, " batch"], base: States, source: States) -> Picks:
        seen = tuple(
            States(read(states.normed.values), states.present)
            for read, states in ((self.read_base, base), (self.read_source, source))
        )
        last = self.norm(self._understood(concept, *seen))
        reflection = self.down(silu(self.gate(last)) * self.up(last))
        return Picks(self._weights(last, *seen), normalize(reflection, dim=-1))

    def _understood(self, concept: Int[Tensor, " batch"], base: States, source: States) -> Float[Tensor, "batch width"]:
        """What the blocks make of the concept's last word."""
        words = self.concepts[concept]
        present = words >= 0
        read = States(self.read_words(self.words(words.clamp(min=0))) + self.places, present)
        for block in self.blocks:
            read = block(read, base, source)
        return read.values[torch.arange(len(words), device=words.device), present.sum(1) - 1]

    def _weights(
        self, last: Float[Tensor, "batch width"], base: States, source: States
    ) -> Float[Tensor, "batch source+1 base"]:
        asked = self.query(last) @ self.key.weight / last.shape[-1] ** 0.5
        of_base, of_source = (
            linear(states.values, part)
            for states, part in zip((base, source), self.combine.weight.chunk(2, 1), strict=True)
        )
        pairs = (silu(of_base[:, None] + of_source[:, :, None]) @ asked[:, None, :, None])[..., 0]
        none = (base.values @ asked[:, :, None])[..., 0]
        pairs = pairs.masked_fill(~(source.present[:, :, None] & base.present[:, None]), -torch.inf)
        return torch.cat([pairs, none[:, None]], 1).softmax(1)


def swapped(
    base: Float[Tensor, "batch base features"],
    source: Float[Tensor, "batch source features"],
    picks: Picks,
    rows: Float[Tensor, "rank features"],
) -> Float[Tensor, "batch base features"]:
    """b_j + (sum_i w_ij s_i + w_none,j b_j - b_j) H R^T R H: the source's part in the reflected subspace."""
    weights = picks.weights
    change = weights[:, :-1].mT @ source + (weights[:, -1, :, None] - 1) * base
    inside = reflected(reflected(change, picks.reflection) @ rows.T @ rows, picks.reflection)
    return base + inside


def reflected(
    values: Float[Tensor, "batch tokens features"], normal: Float[Tensor, "batch features"]
) -> Float[Tensor, "batch tokens features"]:
    """x H with H = 1 - 2 v v^T, v of length 1."""
    return values - 2 * (values @ normal[:, :, None]) * normal[:, None]


def crowding(weights: Float[Tensor, "batch source+1 base"]) -> Float[Tensor, " batch"]:
    """What source tokens give to base tokens, summed over those that give more than 1: they are taken repeatedly."""
    given = weights[:, :-1].sum(2)
    return given.where(given > 1, 0.0).sum(1)


# --- how weights are used


def soft(weights: Float[Tensor, "batch source+1 base"]) -> Float[Tensor, "batch source+1 base"]:
    """The weights as they are in training: a token may take some of each source token."""
    return weights


def one_to_many(weights: Float[Tensor, "batch source+1 base"]) -> Float[Tensor, "batch source+1 base"]:
    """Each base token takes the source token, or none, of the largest weight; several may take the same."""
    return _chosen(weights)


def one_to_one(weights: Float[Tensor, "batch source+1 base"]) -> Float[Tensor, "batch source+1 base"]:
    """Each source token bids for the base token to which it gives most, and a base token takes the highest bid.

    "None" bids for all, and at least ``LEAST_BID``.
    """
    bids = weights[:, :-1]
    wanted = one_hot(bids.argmax(2), bids.shape[2]).to(bids)
    return _chosen(torch.cat([bids * wanted, weights[:, -1:].clamp(min=LEAST_BID)], 1))


def _chosen(weights: Float[Tensor, "batch source+1 base"]) -> Float[Tensor, "batch source+1 base"]:
    return one_hot(weights.argmax(1), weights.shape[1]).mT.to(weights)


Mode = Callable[[Float[Tensor, "batch source+1 base"]], Float[Tensor, "batch source+1 base"]]
MODES: Mapping[str, Mode] = {"": one_to_one, "/one_to_many": one_to_many, "/soft": soft}
"""By the ends of their figures' names, the mode that an edit is evaluated in first."""
