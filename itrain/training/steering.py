"""Steering: interventions by which a model speaks of a concept, with how often it does and how fluent it stays.

Tensor letters: B batch, S sequence, T generated tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from itrain.bounds import refuse_idle, require_at_least, require_some
from itrain.data.responses import ResponseBatch, ResponseDataModule
from itrain.data.splits import SplitDataModule
from itrain.inputs import ModelInputs
from itrain.metrics import best_factor
from itrain.networks.base import Network
from itrain.networks.lane import Edit, EditAt, scaled
from itrain.objectives.cross_entropy import answer_loss
from itrain.placements import Factory, Placements
from itrain.tasks.base import Split
from itrain.training.continuations import (
    CONCEPT_RATE,
    PERPLEXITY_RATIO,
    UNSTEERED,
    Spoken,
    followed,
    mentioned,
    whole_texts,
)
from itrain.training.finetuning import RepresentationFinetuning
from itrain.training.judgements import SCORE, Judged, Judgement, gathered, reference_scores, win_rates
from itrain.training.judges import Judge, require_ready
from itrain.training.magnitudes import TopLatents, lengthened
from itrain.training.optimization import OptimizerFactory
from itrain.training.preferences import Preference
from itrain.training.sizes import Scale, Sizes, require_scale, require_vector
from itrain.trust import shown

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""What a trained edit is multiplied by, where nothing else is said."""
FACTORS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0)
"""AxBench's strengths, of which each is multiplied by the largest activation."""


class Steering(RepresentationFinetuning):
    """Trains interventions on texts that mention a concept, and measures how the model goes on when they steer it.

    The interventions act on the prompt and on each generated token. At a strength a, a site's new activation is
    h + a s (f(h) - h), where s is 1 unless ``scale`` says otherwise. A test samples a continuation of each prompt at
    each strength; an example's random draws are the same at all of them. ``concept_rate`` is the share of continuations
    that mention the concept. ``perplexity_ratio`` is the perplexity of the continuations under the untouched model, exp
    of the mean of -log p over all their tokens, divided by that of the unsteered ones: 1 is as fluent as before, more
    is less fluent. With a judge, ``steering_score`` is the mean over continuations of the harmonic mean of its three
    scores (Wu et al. 2025, "AxBench"), and ``win_rate`` how often that is above a reference's for the same prompt.

    The strength of the final figures is chosen on the validation prompts: the one of the highest steering score, of
    equal ones the lowest. Without a judge it is the one of the highest concept rate whose perplexity ratio there is at
    most ``max_perplexity_ratio``; of equal rates the lowest, and 0 where all are less fluent. Exports act at the chosen
    strength. The control ``random_vector`` moves each activation as far, in a random direction of each example.

    Args:
        network: the base model, frozen.
        sites, intervention, shared, hidden_sizes: as in :class:`~itrain.training.interchange.Interchange`.
        concept: the tokens of each word that counts as a mention.
        end: the token that ends a continuation; None: none.
        acts: as in :class:`~itrain.training.finetuning.RepresentationFinetuning`.
        strengths: which are measured, beside 0.
        scale: what a strength of 1 is: ``trained``, the edit as it is; ``norm``, a vector as long as activations are on
            average at the site, so that methods are compared at matched norm; or ``max_activation``, one as long as the
            largest activation along the vector, as in AxBench. The last two are of the training texts.
        max_perplexity_ratio: how much less fluent than the unsteered model is still fluent; unused with a judge.
        magnitude: builds what says how long vectors are in each training text; None: as long as they are trained.
        preference: builds the loss of pairs of responses, for tasks whose prompts have a response without the concept
            too; None: the cross entropy of the responses with it.
        judge: scores the continuations; None: none does.
        reference: the file of judgements of another run, for win rates.
        max_new_tokens: the most tokens that a continuation has.
        seed: of the random draws.
        optimizer: builds the optimizer from groups of parameters; None: for evaluation only.
        warmup: share of the steps in which the learning rate rises.
        applied: how much of each site's edit is applied outside of the tests, where a test has chosen a strength.

    Raises:
        ValueError: no word is named, a number is out of its bounds, or magnitude and preference are both given.
    """

    reads: ClassVar[tuple[str, ...]] = ("reference",)
    shows_start: ClassVar[bool] = False  # it is the strength 0
    settles_in_test: ClassVar[bool] = True
    control: ClassVar[str] = "random_vector"
    """The name under which :meth:`random_edits` are measured."""
    judgements: Sequence[Judgement] = ()
    """Of the continuations of all processes, set by each test with a judge."""
    chosen: float | None = None
    """The strength that the last test has chosen on the validation prompts."""
    _heard: Judged | None = None

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
        scale: Scale = "trained",
        max_perplexity_ratio: float = 1.5,
        magnitude: Callable[[], TopLatents] | None = None,
        preference: Callable[[], Preference] | None = None,
        judge: Judge | None = None,
        reference: str | None = None,
        max_new_tokens: int = 16,
        seed: int = 0,
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
        shared: bool = False,
        hidden_sizes: Sequence[int] | None = None,
        applied: Sequence[float] | None = None,
    ) -> None:
        _require(self, concept, strengths, judge, reference, magnitude, preference, max_perplexity_ratio)
        require_at_least(1, max_perplexity_ratio=max_perplexity_ratio, max_new_tokens=max_new_tokens)
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
        self.scale: Scale = require_scale(scale)
        self.judge, self.reference = judge, reference
        self.magnitude = None if magnitude is None else magnitude()
        self.preference = None if preference is None else preference()
        self.arguments.update(
            concept=self.concept,
            end=end,
            strengths=self.strengths,
            scale=scale,
            max_perplexity_ratio=max_perplexity_ratio,
            max_new_tokens=max_new_tokens,
            seed=seed,
            magnitude=magnitude,
            preference=preference,
            judge=None,  # no part of what is exported
            reference=None,
        )
        self.interchange.apply(applied)
        self.sizes = [1.0] * len(self.placements)
        """By what each placement's edit is multiplied at strength 1, set by each test."""
        self.spoken = Spoken()

    def export_arguments(self) -> dict[str, Any]:
        trained = ("magnitude", "preference")
        kept = {name: value for name, value in super().export_arguments().items() if name not in trained}
        return {**kept, "applied": self.interchange.applied}

    def losses(self, batch: ResponseBatch) -> Float[Tensor, " batch"]:
        """The training loss of each example: of its response, or of that against the one without the concept."""
        with parametrize.cached():
            if self.preference is not None:
                return self.preference(self, batch)
            if self.magnitude is None:
                return super().losses(batch)
            lengths = self.magnitude(self.interchange, self._texts(batch))
            edits = [
                each._replace(edit=partial(lengthened, each.edit, lengths.factors[placement]))
                for each, placement in zip(self.edits(), self.trained, strict=True)
            ]
            return answer_loss(self.network.edit(batch.inputs, edits), batch.label) + lengths.penalty

    def anneal(self, progress: float) -> None:
        super().anneal(progress)
        for each in (self.magnitude, self.preference):
            if each is not None:
                each.anneal(progress)

    def check(self, data: SplitDataModule) -> None:
        super().check(data)
        if self.judge is not None:
            if not isinstance(data, ResponseDataModule):
                raise ValueError(f"judge: continuations are judged as text, which {type(data).__name__} does not give")
            require_ready(self.judge)
            _require_different(data)
            if self.reference is not None:
                reference_scores(self.reference, self.judge)
        if self.preference is not None:
            self.preference.require(data)
        if self.scale != "trained" or self.magnitude is not None or self.preference is not None:
            for placement, each in self.trained.items():
                require_vector(placement, each, self.scale)

    def learn_statistics(self, batches: Iterable[ResponseBatch]) -> None:
        """Fit closed-form statistics to the training texts, those with the concept and those without."""
        self.interchange.fit(
            (self._texts(batch), None if (has := batch.has_concept) is None else dict.fromkeys(self.trained, has))
            for batch in batches
        )

    def edits(self, strength: float | None = None) -> list[EditAt]:
        """The edits at a strength; None: as they are trained."""
        hard = {placement: each.hardened() for placement, each in self.trained.items()}
        found = self.edits_of(self.trained if self.training else hard)
        if strength is None:
            return found
        return [
            each._replace(edit=scaled(each.edit, strength * size)) for each, size in zip(found, self.sizes, strict=True)
        ]

    @property
    def has_control(self) -> bool:
        """Whether a test can measure :meth:`random_edits`."""
        return True

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
        return self.edits_of(self.interchange.hardened())

    def begin(self, split: str) -> None:
        super().begin(split)
        self.spoken = Spoken()
        data = getattr(self.trainer, "datamodule", None)
        if split == "test" and isinstance(data, SplitDataModule):
            self.sizes = self._measured_sizes(data)
            self._heard = self._judged("validation")
            self.chosen = self._choose(data)
            self.interchange.apply([self.chosen * size for size in self.sizes])
            self.spoken = Spoken(self._judged("test"))

    def score(self, split: str, batch: ResponseBatch) -> None:
        super().score(split, batch)
        if split == "test":
            self._measure(self.spoken, batch)
            for strength in self.strengths if self.has_control else ():
                edits = self.random_edits(strength, batch.inputs.keys)
                self._sample(self.spoken, f"{self.control}/{_place(strength)}", batch, edits)

    def figures(self, split: str) -> dict[str, Tensor]:
        found = super().figures(split)
        del found[f"{split}/exact_match"]  # many continuations are right
        if split == "test":
            found |= {f"test/{name}": value for name, value in self.spoken.compute().items()}
            if self.chosen is not None:
                found["test/strength"] = torch.tensor(self.chosen)
                for place in ("", f"{self.control}/"):
                    at = f"test/{place}{_place(self.chosen)}/" if self.chosen else f"test/{UNSTEERED}/"
                    here = {name.removeprefix(at): value for name, value in found.items() if name.startswith(at)}
                    found |= {f"test/{place}{name}": value for name, value in here.items()}
                found |= self._compared(_place(self.chosen))
        return found

    def _compared(self, place: str) -> dict[str, Tensor]:
        """The win rates against the reference; all judgements are gathered."""
        if self.spoken.judged is None or self._heard is None or self.judge is None:
            return {}
        self.judgements = gathered([*self._heard.found, *self.spoken.judged.found])
        if self.reference is None:
            return {}
        ours = [each for each in self.judgements if (each.split, each.place) == ("test", place)]
        rates = win_rates(ours, reference_scores(self.reference, self.judge), self.reference)
        return {f"test/{name}": value for name, value in rates.items()}

    def _choose(self, data: SplitDataModule) -> float:
        spoken = Spoken(self._heard)
        with self.trainer.precision_plugin.test_step_context():
            for batch in data.whole("validation"):
                self._measure(spoken, batch.to(self.device))
        found = spoken.compute()
        if self._heard is not None:
            scores = torch.stack([found[f"{_place(strength)}/{SCORE}"] for strength in self.strengths])
            return self.strengths[int(best_factor(scores[:, None]))]
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
        logits = self.network(followed(prompts, new, own)).float()
        losses = cross_entropy(logits.transpose(1, 2), new, reduction="none")
        spoken.update(place, mentioned(new.masked_fill(~own, -1), self.concept), losses, own)
        if spoken.judged is not None:
            data: ResponseDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
            said = [data.text(tokens[kept]) for tokens, kept in zip(new.cpu(), own.cpu(), strict=True)]
            asked = [data.task.instruction(text) for text in batch.inputs.texts or ()]
            means = (losses * own).sum(1) / own.sum(1)
            spoken.judged.add(place, batch.inputs.keys, asked, said, means.tolist())

    def _judged(self, split: str) -> Judged | None:
        if self.judge is None:
            return None
        task = self.trainer.datamodule.task  # type: ignore[attr-defined]
        return Judged(self.judge, split=split, concept=task.concept_text, words=task.concept)

    def _measured_sizes(self, data: SplitDataModule) -> list[float]:
        """By what each placement's edit is multiplied at strength 1, from the training texts."""
        if self.scale == "trained":
            return [1.0] * len(self.placements)
        found = Sizes(self.interchange, self.scale)
        with self.trainer.precision_plugin.test_step_context():
            for batch in data.whole("train"):
                found.update(self._texts(batch.to(self.device)))
        return found.compute()

    def _texts(self, batch: ResponseBatch) -> ModelInputs:
        """What is read of the training examples: the words of prompt and response, or the prompt where it is edited."""
        return batch.inputs if self.acts == "prompt" else whole_texts(batch.inputs)

    def _draws(self, keys: Int[Tensor, " batch"]) -> list[torch.Generator]:
        """A generator for each example, the same in every batch and process and at every strength."""
        return [torch.Generator(self.device).manual_seed(key ^ self.seed) for key in keys.tolist()]


def _require(
    made: Steering,
    concept: Sequence[Sequence[int]],
    strengths: Sequence[float],
    judge: Judge | None,
    reference: str | None,
    magnitude: object,
    preference: object,
    max_perplexity_ratio: float,
) -> None:
    if judge is not None:
        refuse_idle(made, "beside a judge, who chooses the strength", max_perplexity_ratio=max_perplexity_ratio)
    if not concept:
        raise ValueError("concept: no word is named that could be counted; choose task=stories, or set task.concept")
    require_some(strengths=strengths)
    for strength in strengths:
        if not 0 < strength < torch.inf:
            raise ValueError(f"strengths: {strength} is no strength; give numbers above 0, as 0 is measured anyway")
    if reference is not None and judge is None:
        raise ValueError(f"reference '{reference}' is compared by a judge's scores; add training.judge")
    if magnitude is not None and preference is not None:
        raise ValueError("a preference draws how long the vector is, and magnitude says so too; leave one of them out")


def _require_different(data: ResponseDataModule) -> None:
    """Refuse a prompt that a split has twice: judgements are told apart by it."""
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        known: set[str] = set()
        for text in data.datasets[split].examples.inputs.texts or ():
            if text in known:
                raise ValueError(f"judge: the {split} split has the prompt {shown(text)} twice; leave one of them out")
            known.add(text)


def _place(strength: float) -> str:
    return f"strength_{strength:g}"


def _pushed(edit: Edit, direction: Float[Tensor, "batch hidden"], base: Tensor) -> Tensor:
    """The activations (B, P, D), moved as far as the edit moves them but in their example's direction."""
    unit = (direction / direction.norm(dim=-1, keepdim=True)).to(base)
    return base + (edit(base) - base).norm(dim=-1, keepdim=True) * unit[:, None]
