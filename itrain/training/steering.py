"""Steering: interventions by which a model speaks of a concept, with how often it does and how fluent it stays.

Tensor letters: B batch, S sequence, T generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, SumMetric

from itrain.bounds import require_at_least, require_some
from itrain.data.responses import ResponseBatch
from itrain.data.splits import SplitDataModule
from itrain.inputs import ModelInputs
from itrain.inputs.layout import MASK
from itrain.metrics import gather_counts
from itrain.networks.base import Network
from itrain.networks.lane import Edit, EditAt, scaled
from itrain.placements import Factory, Placements
from itrain.training.finetuning import RepresentationFinetuning
from itrain.training.optimization import OptimizerFactory

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""What a trained edit is multiplied by, where nothing else is said."""
CONCEPT_RATE, PERPLEXITY_RATIO = "concept_rate", "perplexity_ratio"
UNSTEERED = "unsteered"


class Steering(RepresentationFinetuning):
    """Trains interventions on texts that mention a concept, and measures how the model goes on when they steer it.

    The interventions act on the prompt and on each generated token. At a strength a, a site's new activation is
    h + a (f(h) - h). A test samples a continuation of each prompt at each strength; an example's random draws are the
    same at all of them. ``concept_rate`` is the share of continuations that mention the concept.
    ``perplexity_ratio`` is the perplexity of the continuations under the untouched model, exp of the mean of -log p
    over all their tokens, divided by that of the unsteered ones: 1 is as fluent as before, more is less fluent.

    The strength of the final figures is chosen on the validation prompts: the one of the highest concept rate whose
    perplexity ratio there is at most ``max_perplexity_ratio``; of equal rates the lowest, and 0 where all are less
    fluent. The control ``random_vector`` moves each activation as far, in a random direction of each example.

    Args:
        network: the base model, frozen.
        sites, intervention, shared, hidden_sizes: as in :class:`~itrain.training.interchange.Interchange`.
        concept: the tokens of each word that counts as a mention.
        end: the token that ends a continuation; None: none.
        acts: as in :class:`~itrain.training.finetuning.RepresentationFinetuning`.
        strengths: which are measured, beside 0.
        max_perplexity_ratio: how much less fluent than the unsteered model is still fluent.
        max_new_tokens: the most tokens that a continuation has.
        seed: of the random draws.
        optimizer: builds the optimizer from groups of parameters; None: for evaluation only.
        warmup: share of the steps in which the learning rate rises.

    Raises:
        ValueError: no word is named, or a number is out of its bounds.
    """

    shows_start: ClassVar[bool] = False  # it is the strength 0

    def __init__(
        self,
        *,
        network: Network,
        sites: Placements,
        intervention: Factory | None = None,
        concept: Sequence[Sequence[int]],
        end: int | None = None,
        acts: Literal["prompt", "all", "generated"] | Sequence[int] = "all",
        strengths: Sequence[float] = STRENGTHS,
        max_perplexity_ratio: float = 1.5,
        max_new_tokens: int = 16,
        seed: int = 0,
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
        shared: bool = False,
        hidden_sizes: Sequence[int] | None = None,
    ) -> None:
        if not concept:
            raise ValueError(
                "concept: no word is named that could be counted; choose task=stories, or set task.concept"
            )
        require_some(strengths=strengths)
        require_at_least(1, max_perplexity_ratio=max_perplexity_ratio, max_new_tokens=max_new_tokens)
        for strength in strengths:
            if not 0 < strength < torch.inf:
                raise ValueError(f"strengths: {strength} is no strength; give numbers above 0, as 0 is measured anyway")
        super().__init__(
            network=network,
            sites=sites,
            intervention=intervention,
            acts=acts,
            optimizer=optimizer,
            warmup=warmup,
            shared=shared,
            hidden_sizes=hidden_sizes,
        )
        self.concept, self.end = [list(word) for word in concept], end
        self.strengths, self.max_perplexity_ratio = sorted(set(map(float, strengths))), max_perplexity_ratio
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.arguments.update(
            concept=self.concept,
            end=end,
            strengths=self.strengths,
            max_perplexity_ratio=max_perplexity_ratio,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        self.chosen: float | None = None
        """The strength that the last test has chosen on the validation prompts."""
        self.spoken = Spoken()

    def edits(self, strength: float = 1.0) -> list[EditAt]:
        return [each._replace(edit=scaled(each.edit, strength)) for each in super().edits()]

    def random_edits(self, strength: float, keys: Int[Tensor, " batch"]) -> list[EditAt]:
        """Edits that move each activation as far as the trained ones do, in a random direction of each example."""
        draws, trained = self._draws(keys), self.trained.values()
        directions = {
            each: torch.stack([torch.randn(each.hidden_size, generator=draw, device=draw.device) for draw in draws])
            for each in dict.fromkeys(trained)
        }
        return [
            edit._replace(edit=partial(_pushed, edit.edit, directions[each]))
            for edit, each in zip(self.edits(strength), trained, strict=True)
        ]

    def generating_edits(self) -> list[EditAt]:
        return self.edits(1.0 if self.chosen is None else self.chosen)

    def begin(self, split: str) -> None:
        super().begin(split)
        self.spoken = Spoken()
        data = getattr(self.trainer, "datamodule", None)
        if split == "test" and isinstance(data, SplitDataModule):
            self.chosen = self._choose(data)

    def score(self, split: str, batch: ResponseBatch) -> None:
        super().score(split, batch)
        if split == "test":
            self._measure(self.spoken, batch)
            for strength in self.strengths:
                edits = self.random_edits(strength, batch.inputs.keys)
                self._sample(self.spoken, f"random_vector/{_place(strength)}", batch, edits)

    def figures(self, split: str) -> dict[str, Tensor]:
        found = super().figures(split)
        del found[f"{split}/exact_match"]  # many continuations are right
        if split == "test":
            found |= {f"test/{name}": value for name, value in self.spoken.compute().items()}
            if self.chosen is not None:
                found["test/strength"] = torch.tensor(self.chosen)
                for place in ("test/", "test/random_vector/"):
                    at = f"{place}{_place(self.chosen)}" if self.chosen else f"test/{UNSTEERED}"
                    found |= {f"{place}{name}": found[f"{at}/{name}"] for name in (CONCEPT_RATE, PERPLEXITY_RATIO)}
        return found

    def _choose(self, data: SplitDataModule) -> float:
        spoken = Spoken()
        with self.trainer.precision_plugin.test_step_context():
            for batch in data.whole("validation"):
                self._measure(spoken, batch.to(self.device))
        found = spoken.compute()
        fluent = {0.0: found[f"{UNSTEERED}/{CONCEPT_RATE}"]} | {
            strength: found[f"{_place(strength)}/{CONCEPT_RATE}"]
            for strength in self.strengths
            if found[f"{_place(strength)}/{PERPLEXITY_RATIO}"] <= self.max_perplexity_ratio
        }
        return max(fluent, key=lambda strength: (float(fluent[strength]), -strength))

    def _measure(self, spoken: Spoken, batch: ResponseBatch) -> None:
        """Continue the prompts at each strength."""
        self._sample(spoken, UNSTEERED, batch, [])
        for strength in self.strengths:
            self._sample(spoken, _place(strength), batch, self.edits(strength))

    def _sample(self, spoken: Spoken, place: str, batch: ResponseBatch, edits: Sequence[EditAt]) -> None:
        """Draw a continuation of each prompt; count the mentions, and ask the untouched model how likely it is."""
        prompts = batch.inputs.prompts()
        new = self.network.generate(
            prompts,
            edits,
            max_new_tokens=self.max_new_tokens,
            end=self.end,
            generators=self._draws(batch.inputs.keys),
            do_sample=True,
            top_k=0,
        )
        ended = (new == (-1 if self.end is None else self.end)).long().cumsum(1)
        own = torch.cat([torch.ones_like(ended[:, :1]), 1 - ended[:, :-1].clamp(max=1)], 1).bool()
        logits = self.network(_followed(prompts, new, own)).float()
        losses = cross_entropy(logits.transpose(1, 2), new, reduction="none")
        spoken.update(place, _mentioned(new.masked_fill(~own, -1), self.concept), losses, own)

    def _draws(self, keys: Int[Tensor, " batch"]) -> list[torch.Generator]:
        """A generator for each example, the same in every batch and process and at every strength."""
        return [torch.Generator(self.device).manual_seed(key ^ self.seed) for key in keys.tolist()]


class Spoken:
    """Continuations by place, such as ``unsteered`` or ``strength_0.5``: how many mention the concept, how likely."""

    def __init__(self) -> None:
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
        return found


def _place(strength: float) -> str:
    return f"strength_{strength:g}"


def _pushed(edit: Edit, direction: Float[Tensor, "batch hidden"], base: Tensor) -> Tensor:
    """The activations (B, P, D), moved as far as the edit moves them but in their example's direction."""
    unit = (direction / direction.norm(dim=-1, keepdim=True)).to(base)
    return base + (edit(base) - base).norm(dim=-1, keepdim=True) * unit[:, None]


def _followed(prompts: ModelInputs, new: Int[Tensor, "batch new"], own: Bool[Tensor, "batch new"]) -> ModelInputs:
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


def _mentioned(text: Int[Tensor, "batch new"], concept: Sequence[Sequence[int]]) -> Bool[Tensor, " batch"]:
    """Whether each text has the tokens of one of the words, one after the other."""
    found = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    for word in concept:
        if len(word) <= text.shape[1]:
            found |= (text.unfold(1, len(word), 1) == torch.tensor(word, device=text.device)).all(2).any(1)
    return found
