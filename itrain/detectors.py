"""Detectors: scores of texts for concepts, from the activations of their tokens. They read and never edit.

A detector scores each token, and a text's score is pooled from those of its tokens. Tensor letters: B batch, P tokens,
D features, C concepts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from itrain.interventions.directions import Directions, MeanDifference
from itrain.probes import LinearProbe, Probe

Pooling = Literal["mean", "max", "last", "attention"]
"""How a text's score comes from those of its tokens; attention weighs them by a learned query."""


def pooled(
    scores: Float[Tensor, "batch tokens concepts"],
    counted: Bool[Tensor, "batch tokens"],
    how: Pooling,
    relevance: Float[Tensor, "batch tokens concepts"] | None = None,
) -> Float[Tensor, "batch concepts"]:
    """The score of each text, from its counted tokens alone; NaN of a text without any."""
    inside = counted[..., None]
    if how == "last":
        place = torch.arange(counted.shape[1], device=counted.device)
        last = torch.where(counted, place, -1).amax(1)
        found = scores.take_along_dim(last.clamp(min=0)[:, None, None], 1)[:, 0]
        return found.where(last[:, None] >= 0, torch.nan)
    if how == "max":
        found = scores.masked_fill(~inside, -torch.inf).amax(1)
        return found.where(inside.any(1), torch.nan)
    if how == "attention":
        assert relevance is not None, "attention has a query"
        weights = relevance.masked_fill(~inside, -torch.inf).softmax(1)
        return (weights * scores.masked_fill(~inside, 0.0)).sum(1)
    return scores.masked_fill(~inside, 0.0).sum(1) / inside.sum(1)


class Detector(nn.Module, ABC):
    """Scores of texts for some concepts; a score above a concept's threshold is an alarm.

    A subclass is final and constructible as ``X(hidden_size)`` with all other arguments keyword-only and defaulted.

    Args:
        hidden_size: features of a token, those of several layers one after the other where layers are joined.
        concepts: how many are told.
        pooling: how a text's score comes from those of its tokens.

    Raises:
        ValueError: the pooling is none that the detector has.
    """

    learns: bool = False
    """Whether it is trained by gradients."""
    thresholds: Float[Tensor, " concepts"]
    bounds: Float[Tensor, "concepts 2"]
    """The interval of each threshold, where it is ``bounded``: few texts do not bound it."""
    bounded: Bool[Tensor, "concepts 2"]
    calibrated: Bool[Tensor, ""]
    """Whether the thresholds have been chosen."""

    def __init__(self, hidden_size: int, *, concepts: int = 1, pooling: Pooling = "mean") -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling '{pooling}' is none of {', '.join(get_args(Pooling))}")
        if pooling == "attention" and not self.learns:
            raise ValueError(
                f"{type(self).__name__} has no query to learn; give it another pooling, for example "
                f"partial({type(self).__name__}, pooling='max')"
            )
        self.hidden_size, self.concepts = hidden_size, concepts
        self.pooling: Pooling = pooling
        self.register_buffer("thresholds", torch.zeros(concepts))
        self.register_buffer("bounds", torch.zeros(concepts, 2))
        self.register_buffer("bounded", torch.zeros(concepts, 2, dtype=torch.bool))
        self.register_buffer("calibrated", torch.tensor(False))

    @abstractmethod
    def token_scores(self, tokens: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch concepts"]:
        """The score of each token by itself."""

    def relevance(self, tokens: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch concepts"] | None:
        """How much each token counts before the softmax over a text's; None: no attention."""
        return None

    def forward(
        self, tokens: Float[Tensor, "batch tokens hidden"], counted: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch concepts"]:
        """The score of each text."""
        return pooled(self.token_scores(tokens), counted, self.pooling, self.relevance(tokens))

    @abstractmethod
    def fit(self, activations: Float[Tensor, "texts hidden"], labels: Int[Tensor, "texts concepts"]) -> None:
        """Learn closed-form statistics from one activation of each training text; labels are 1, 0 or unknown, -1."""

    def penalty(self) -> Float[Tensor, ""]:
        """sum W^2 over what is trained by gradients."""
        return self.thresholds.new_zeros(())

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, concepts={self.concepts}, pooling={self.pooling}"


class ProbeDetector(Detector):
    """A probe of each token, trained so that pooled scores are the log odds of the concepts.

    Attention pools by softmax(q . x) over the tokens' standardised activations x, for a query q of each concept that
    starts at 0, where it is the mean. Alain and Bengio 2016; attention as in Kramar et al. 2026, "Building
    Production-Ready Probes For Gemini", section 3, with one head.

    Args:
        hidden_size, concepts, pooling: as in :class:`Detector`.
        probe: builds the probe from the numbers of features and concepts.
    """

    learns = True

    def __init__(
        self,
        hidden_size: int,
        *,
        concepts: int = 1,
        pooling: Pooling = "mean",
        probe: Callable[..., Probe] = LinearProbe,
    ) -> None:
        super().__init__(hidden_size, concepts=concepts, pooling=pooling)
        self.probe = probe(hidden_size, num_classes=concepts)
        self.query = nn.Parameter(torch.zeros(concepts, hidden_size)) if pooling == "attention" else None

    def token_scores(self, tokens: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch concepts"]:
        return self.probe(tokens)

    def relevance(self, tokens: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch concepts"] | None:
        if self.query is None:
            return None
        return (tokens - self.probe.mean) / self.probe.deviation @ self.query.T

    def fit(self, activations: Float[Tensor, "texts hidden"], labels: Int[Tensor, "texts concepts"]) -> None:
        self.probe.fit(activations)

    def penalty(self) -> Float[Tensor, ""]:
        own = self.probe.squared_norm()
        return own if self.query is None else own + self.query.square().sum()


class DirectionDetector(Detector):
    """Coordinates along a unit direction of each concept, found without a gradient: h . w.

    The direction is one of :mod:`itrain.interventions.directions`, of the texts with and without the concept, with the
    sign by which texts with it score higher. One that needs no classes, as the principal direction, is that of the
    texts with the concept. Wu et al. 2025, "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse
    Autoencoders", section 4.

    Args:
        hidden_size, concepts, pooling: as in :class:`Detector`.
        direction: the kind of direction.
    """

    directions: Float[Tensor, "concepts hidden"]

    def __init__(
        self,
        hidden_size: int,
        *,
        concepts: int = 1,
        pooling: Pooling = "mean",
        direction: Callable[[int], Directions] = MeanDifference,
    ) -> None:
        super().__init__(hidden_size, concepts=concepts, pooling=pooling)
        self.direction = direction
        self.register_buffer("directions", torch.full((concepts, hidden_size), torch.nan))

    def token_scores(self, tokens: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch concepts"]:
        return tokens @ self.directions.T

    def fit(self, activations: Float[Tensor, "texts hidden"], labels: Int[Tensor, "texts concepts"]) -> None:
        for concept, values in enumerate(labels.T):
            found = self.direction(self.hidden_size).to(activations)
            positive, known = activations[values == 1], values >= 0
            if found.needs_classes:
                found.fit(activations[known], values[known])
            else:
                found.fit(positive)
            along = found.rows[0]
            gap = (positive.mean(0) - activations[values == 0].mean(0)) @ along
            self.directions[concept] = along * (-1 if gap < 0 else 1)


class RandomDirection(Detector):
    """Coordinates along a random unit direction of each concept: the control of all others.

    Args:
        hidden_size, concepts, pooling: as in :class:`Detector`.
        seed: draws the directions.
    """

    directions: Float[Tensor, "concepts hidden"]

    def __init__(self, hidden_size: int, *, concepts: int = 1, pooling: Pooling = "mean", seed: int = 0) -> None:
        super().__init__(hidden_size, concepts=concepts, pooling=pooling)
        drawn = torch.randn(concepts, hidden_size, generator=torch.Generator().manual_seed(seed))
        # Not saved: the seed gives them again.
        self.register_buffer("directions", drawn / drawn.norm(dim=1, keepdim=True), persistent=False)

    def token_scores(self, tokens: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch concepts"]:
        return tokens @ self.directions.T

    def fit(self, activations: Float[Tensor, "texts hidden"], labels: Int[Tensor, "texts concepts"]) -> None:
        """Nothing: it is drawn."""
