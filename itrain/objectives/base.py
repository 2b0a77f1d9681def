"""The contract of an objective."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from itrain.bounds import require_at_least
from itrain.data import CounterfactualBatch, IntervenedInputs
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.metrics import UNUSED
from itrain.networks.base import Network
from itrain.placements import Placement
from itrain.sites import Site


class Edited(NamedTuple):
    """An activation of the bases before and after a placement's edits, of all variables that it serves."""

    before: Float[Tensor, "batch *places features"]
    after: Float[Tensor, "batch *places features"]


@dataclass(kw_only=True)
class Outcome:
    """What a run of pairs under edits led to.

    Args:
        logits: the answers under the edits.
        batch: the pairs.
        network: the base model, for further runs of it.
        edited: the activations that were edited, where an objective ``needs_edited``.
        interventions: what edited them.
        known: the unedited answers that have been asked for; members of a cohort share them.
    """

    logits: Float[Tensor, "batch ... vocabulary"]
    batch: CounterfactualBatch
    network: Network
    edited: Mapping[Placement, Edited] = field(default_factory=dict)
    interventions: Mapping[Placement, Intervention] = field(default_factory=dict)
    known: dict[str, Tensor] = field(default_factory=dict)

    def base_logits(self) -> Float[Tensor, "batch ... vocabulary"]:
        """The unedited model's answers on the bases, without a gradient."""
        if "base" not in self.known:
            self.known["base"] = self._unedited(self.batch.base)
        return self.known["base"]

    def source_logits(self) -> Float[Tensor, "batch vocabulary"]:
        """The unedited model's answers on each pair's source, without a gradient; of isolate pairs those on the base.

        Raises:
            ValueError: see :func:`require_one_source`.
        """
        if "source" not in self.known:
            found, isolates = self._of_sources(), self.batch.isolates
            if self.network.in_step or bool(isolates.any()):
                found = self.base_logits().where(isolates[:, None].to(found.device, non_blocking=True), found)
            self.known["source"] = found
        return self.known["source"]

    def natural(self, site: Site, draws: int) -> Float[Tensor, "batch *places features"]:
        """The mean activation at a site in the first draws of natural inputs for each pair, without a gradient."""
        name = f"natural {draws} {site}"
        if name not in self.known:
            with torch.no_grad(), self.network.unchanged():
                found = [self.network.read(inputs, [site])[site] for inputs in self.batch.natural[:draws]]
            self.known[name] = torch.stack(found).mean(0)
        return self.known[name]

    def _of_sources(self) -> Tensor:
        require_one_source(self.batch)
        sources = self.batch.sources
        rows = {variable: self.batch.rows(variable) for variable in sources}
        whole = next((variable for variable, each in rows.items() if each is None), None)
        if whole is not None:
            return self._unedited(sources[whole])
        found = self.base_logits() if () in self.batch.groups else torch.empty_like(self.logits)
        for variable, chosen in rows.items():
            if chosen is None or not (len(chosen) or self.network.in_step):
                continue
            at = chosen.to(found.device, non_blocking=True)
            # Processes that share the model's weights make the same runs.
            taken = None if self.network.in_step else chosen
            answers = self._unedited(sources[variable] if taken is None else sources[variable].take(taken))
            found = found.index_copy(0, at, (answers[at] if taken is None else answers).to(found.dtype))
        return found

    def _unedited(self, inputs: ModelInputs) -> Tensor:
        candidates = self.batch.base.candidates
        with torch.no_grad(), self.network.unchanged():
            return self.network(inputs if candidates is None else inputs.among(candidates))


def mean_of_used(values: Float[Tensor, "batch tokens"], used: Bool[Tensor, "batch tokens"]) -> Float[Tensor, " batch"]:
    """The mean over the tokens that an answer uses; 0 of none."""
    return (values * used).sum(1) / used.sum(1).clamp(min=1)


def require_one_source(batch: CounterfactualBatch) -> None:
    """Refuse pairs whose sources do not give one distribution over the base's answer.

    Raises:
        ValueError: a pair interchanges several variables, its source is edited itself, or answers have several tokens.
    """
    if several := ["+".join(group) for group in batch.groups if len(group) > 1]:
        raise ValueError(
            f"pairs that interchange {several[0]} have several sources, and so no one distribution to come near to; "
            "take pairs of one variable, or target=base"
        )
    if any(isinstance(source, IntervenedInputs) for source in batch.sources.values()):
        raise ValueError("sources that are edited themselves have no unedited distribution to come near to")
    if batch.counterfactual_label.ndim > 1:
        raise ValueError(
            "an answer of several tokens follows other tokens in the source than in the base, so that the source's "
            "distribution is no target; take a task with answers of one token"
        )


def require_source_answers(batch: CounterfactualBatch) -> None:
    """Refuse pairs whose counterfactual label is not their source's, but for isolate pairs.

    Raises:
        ValueError: saying in how many pairs.
    """
    other = torch.zeros(len(batch), dtype=torch.bool)
    for variable, label in batch.source_labels.items():
        unlike = (label != batch.counterfactual_label) & (label != UNUSED) & (batch.counterfactual_label != UNUSED)
        rows = batch.rows(variable)
        at = torch.arange(len(batch)) if rows is None else rows
        other[at] |= unlike.cpu()[at]
    if count := int((other & ~batch.isolates).sum()):
        raise ValueError(
            f"in {count} of {len(batch)} pairs the source's answer is another than the counterfactual one, so that its "
            "distribution is no target; train by cross entropy, or take pairs whose source answers as the edit should"
        )


class Objective(nn.Module, ABC):
    """A loss of each pair, in nats unless it says otherwise. A subclass is final and constructible as ``X()``.

    Args:
        weight: by what the loss is multiplied in the sum of a training's objectives.
    """

    needs_edited: ClassVar[bool] = False
    """Whether the loss depends on the activations that were edited."""
    naturals: int = 0
    """How many natural inputs of each pair's counterfactual variables the loss needs."""

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        require_at_least(0, weight=weight)
        self.weight = weight

    @abstractmethod
    def forward(self, outcome: Outcome) -> Float[Tensor, " batch"]:
        """The loss of each pair, without the weight."""

    def require(self, batch: CounterfactualBatch) -> None:
        """Refuse training pairs that lack what the loss needs, before the first step.

        Raises:
            ValueError: naming what is missing.
        """


ObjectiveFactory: TypeAlias = Callable[[], Objective]
"""Builds an objective, for example ``partial(KL, weight=0.5)``."""


class Objectives(nn.Module):
    """A weighted sum of objectives: sum_o weight_o * loss_o, for each pair.

    Args:
        factories: build the objectives, by names without a dot; None: one of ``default``.
        default: the objective of a training that names none.

    Raises:
        TypeError: something does not build an objective.
        ValueError: there is none, all weights are 0, or a name is taken.
    """

    def __init__(self, factories: Mapping[str, ObjectiveFactory] | None, *, default: type[Objective]) -> None:
        super().__init__()
        self.named = factories is not None
        """Whether the training was given its objectives, so that their losses are logged apart."""
        if factories is not None and not factories:
            raise ValueError("objectives: there is none; give one, or leave objectives out")
        built = {}
        for name, make in ({"default": default} if factories is None else factories).items():
            if not name or "." in name or hasattr(nn.ModuleDict, name):
                raise ValueError(f"objectives: '{name}' cannot name one; choose another name, without a dot")
            built[name] = _built(name, make)
        if not any(each.weight for each in built.values()):
            raise ValueError("objectives: all weights are 0, so that nothing is trained; give one a weight above 0")
        self.parts: Mapping[str, Objective] = nn.ModuleDict(built)  # type: ignore[assignment]
        self.counted = {name: each for name, each in built.items() if each.weight}
        self.needs_edited = any(each.needs_edited for each in self.counted.values())
        self.naturals = max(each.naturals for each in built.values())

    def require(self, batch: CounterfactualBatch) -> None:
        """Refuse training pairs that lack what an objective needs; raises as :meth:`Objective.require` does."""
        for name, each in self.parts.items():
            try:
                each.require(batch)
            except ValueError as error:
                raise ValueError(f"objectives.{name}: {error}") from error

    def forward(self, outcome: Outcome) -> tuple[Float[Tensor, " batch"], dict[str, Float[Tensor, " batch"]]]:
        """The weighted sum for each pair, and its terms without their weights."""
        losses = {name: each(outcome) for name, each in self.counted.items()}
        for name, each in losses.items():
            # Others would broadcast, or weigh pairs otherwise, without a word.
            if each.shape != outcome.logits.shape[:1]:
                raise ValueError(
                    f"objectives.{name}: {type(self.parts[name]).__name__} gives a loss of shape {tuple(each.shape)}, "
                    f"and {len(outcome.logits)} pairs need one each; do not average over pairs"
                )
        return sum(self.counted[name].weight * each for name, each in losses.items()), losses  # type: ignore[return-value]


def _built(name: str, make: ObjectiveFactory) -> Objective:
    kind = getattr(make, "func", make)
    other = inspect.isclass(kind) and not issubclass(kind, Objective)
    made = make() if callable(make) and not isinstance(make, nn.Module) and not other else make
    if not isinstance(made, Objective):
        what = kind.__name__ if other else type(made).__name__
        raise TypeError(
            f"objectives.{name}: {what} is none; give a class of itrain.objectives or "
            "functools.partial(class, weight=0.5)"
        )
    return made
