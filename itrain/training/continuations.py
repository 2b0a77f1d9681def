"""Continuations of prompts: what they mention, and how likely they are under the untouched model.

Tensor letters: B batch, S sequence, T generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric

from itrain.inputs import ModelInputs
from itrain.inputs.layout import MASK
from itrain.metrics import gather_counts
from itrain.training.judgements import Judged

CONCEPT_RATE, PERPLEXITY_RATIO = "concept_rate", "perplexity_ratio"
UNSTEERED = "unsteered"


class Spoken:
    """Continuations by place, such as ``unsteered`` or ``strength_0.5``: how many mention the concept, how likely.

    Args:
        judged: what judges them too; None: nothing does.
    """

    def __init__(self, judged: Judged | None = None) -> None:
        self.judged = judged
        self.rates: dict[str, MeanMetric] = {}
        self.losses: dict[str, MeanMetric] = {}
        self.count = SumMetric(dist_sync_fn=gather_counts)

    def update(
        self,
        place: str,
        mentioned: Bool[Tensor, " batch"],
        losses: Float[Tensor, "batch new"],
        own: Bool[Tensor, "batch new"],
    ) -> None:
        """Count a batch of a place, with the tokens that are each continuation's own."""
        if place not in self.rates:
            self.rates[place], self.losses[place] = (MeanMetric().to(losses.device) for _ in range(2))
        self.rates[place].update(mentioned.float())
        self.losses[place].update(losses, weight=own.float())
        if place == UNSTEERED:
            self.count.to(losses.device).update(len(mentioned))

    def compute(self) -> dict[str, Tensor]:
        """The figures of each place, such as ``strength_0.5/concept_rate``, and how many examples they are of."""
        found = {"examples": self.count.compute()}
        start = self.losses[UNSTEERED].compute()
        for place, rate in self.rates.items():
            found[f"{place}/{CONCEPT_RATE}"] = rate.compute()
            found[f"{place}/{PERPLEXITY_RATIO}"] = (self.losses[place].compute() - start).exp()
        return found if self.judged is None else found | self.judged.compute()


def followed(prompts: ModelInputs, new: Int[Tensor, "batch new"], own: Bool[Tensor, "batch new"]) -> ModelInputs:
    """The prompts, padded on the left, followed by their continuations, of which each token is asked for."""
    assert prompts.tokens is not None, "prompts have tokens"
    ahead = torch.arange(new.shape[1], device=new.device)
    mask = prompts.arguments[MASK]
    # Nothing is asked at the last token.
    shown = own[:, :-1]
    return ModelInputs(
        arguments={
            **prompts.arguments,
            "input_ids": torch.cat([prompts.arguments["input_ids"], new[:, :-1]], 1),
            MASK: torch.cat([mask, shown.to(mask)], 1),
        },
        answer=prompts.length - 1 + ahead * own,
        tokens=prompts.tokens,
        stop=prompts.tokens[:, 1] + shown.sum(1).cpu(),
        texts=prompts.texts,
    )


def mentioned(text: Int[Tensor, "batch new"], concept: Sequence[Sequence[int]]) -> Bool[Tensor, " batch"]:
    """Whether each text has the tokens of one of the words, one after the other."""
    found = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    for word in concept:
        if len(word) <= text.shape[1]:
            found |= (text.unfold(1, len(word), 1) == torch.tensor(word, device=text.device)).all(2).any(1)
    return found


def whole_texts(inputs: ModelInputs) -> ModelInputs:
    """Prompts with their responses, whose positions count the tokens of both from what a prompt says on.

    What a position such as ``@all`` names is then the words of both, from the span ``prompt`` on where there is one:
    special tokens and what a chat template writes first are the same in every text, and larger than all others in many
    models. They are before the others all the same.
    """
    assert inputs.tokens is not None, "prompts have tokens"
    (start, end), first = inputs.extent, inputs.tokens[:, 0]
    if "prompt" in inputs.spans:
        first = inputs.spans["prompt"][:, 0]
    elif inputs.characters is not None:
        written = inputs.characters[..., 1] > inputs.characters[..., 0]
        first = torch.where(written.any(1), written.long().argmax(1), first)
    return replace(inputs, tokens=torch.stack([first, end], 1), start=start, stop=None)
