"""Cohort: several searches or traces of one model, run at once in one run of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrize
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from itrain.data import CounterfactualBatch, IntervenedInputs
from itrain.data.splits import SplitDataModule
from itrain.networks.base import ROWS
from itrain.objectives.base import Edited, Outcome
from itrain.placements import Placement
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from itrain.training.base import Training
from itrain.training.divergence import ROUND_TRIP, Divergences, require_invertible
from itrain.training.finite import DIVERGED, FiniteCheck, FirstStepCheck, NotFiniteError
from itrain.training.interchange import Interventions
from itrain.training.optimization import OptimizerFactory, at_rest
from itrain.training.tracing import CausalTracing

NOTHING: Mapping[str, Any] = MappingProxyType({})
Member: TypeAlias = AlignmentSearch | CausalTracing


class Cohort(Training):
    """Runs members side by side: their tokens share a run of the model.

    loss = sum over members of their own losses. No token of one member sees another's, so each member has the gradient
    and the figures of a separate fit. A member whose loss, weights or answers are not finite any more stops, and has
    the figure ``diverged`` alone; the others go on. Members may differ in site, intervention and rank; they share data,
    batch order, ``loss_over``, optimizer and schedule. A step of a small model costs much the same at any batch size,
    so a cohort costs little more than one of its members.

    Args:
        members: alignment searches or causal tracings, by names without a slash.
        optimizer: builds the optimizer from groups of parameters; None: for evaluation only.
        warmup: share of the steps in which the learning rate rises.
        patience: epochs without a lower validation loss after which a member stops learning; None: all go to the end.
        rows: the most rows of a shared run; further members run in turn.

    Raises:
        ValueError: there are no members, or they differ in network or training loss.
    """

    retracts: ClassVar[bool] = True

    def __init__(
        self,
        *,
        members: Mapping[str, Member],
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
        patience: int | None = None,
        rows: int = ROWS,
    ) -> None:
        super().__init__()
        networks = {id(member.network): member.network for member in members.values()}
        if len(networks) != 1:
            raise ValueError(
                f"the members of a cohort share one network; these {len(members)} have {len(networks)}; make one "
                "and give it to each"
            )
        if len({type(member) for member in members.values()}) > 1:
            raise ValueError("the members of a cohort are all searches or all traces")
        owned = [id(each) for member in members.values() for each in dict.fromkeys(member.trained.values())]
        if len(set(owned)) < len(owned):
            raise ValueError("members of a cohort share an intervention object; give each member one of its own")
        over = {member.loss_over for member in members.values() if isinstance(member, AlignmentSearch)}
        if len(over) > 1:
            raise ValueError(f"the members of a cohort share loss_over; these have {' and '.join(sorted(over))}")
        self.members: Mapping[str, Member] = nn.ModuleDict(dict(members))  # type: ignore[assignment]
        self.sites = tuple(dict.fromkeys(site for member in members.values() for site in member.sites))
        self.optimizer, self.warmup, self.patience, self.rows = optimizer, warmup, patience, rows
        (self.network,) = networks.values()
        self.learning = [name for name, member in members.items() if list(member.exported.parameters())]
        self.best = {name: (float("inf"), 0) for name in members}
        """The lowest validation loss of each member and the epochs since."""
        self.diverged: dict[str, str] = {}
        """Why the members that diverged did."""
        self.losses: dict[str, MeanMetric] = {}
        searches = {name: each for name, each in members.items() if isinstance(each, AlignmentSearch)}
        features = {name: each.scores.row_features for name, each in searches.items()}
        self.divergences = Divergences(
            {name: each.interchange for name, each in searches.items()},
            row_features={name: each for name, each in features.items() if each is not None},
        )
        self._fitted_here: set[str] = set()
        self._of_step: tuple[Sequence[str], Tensor] = ((), torch.empty(0))
        self.found: dict[str, float] = {}
        """What the last validation or test found, as ``<member>/<split>/<figure>``."""

    def training_step(self, batch: CounterfactualBatch, batch_idx: int) -> Tensor | None:
        if not self.learning:
            self.trainer.should_stop = True
            return None
        batch = self._search(self.learning[0]).trained_on(batch)
        outcomes = self.outcomes(batch, {name: self.members[name].trained for name in self.learning})
        losses = {name: self._search(name).loss(each) for name, each in outcomes.items()}
        penalties = sum(self.members[name].interchange.penalty(batch) for name in self.learning)
        each = torch.stack(list(losses.values()))
        self._of_step, total = (tuple(losses), each.detach()), each.sum()
        self.log("train/loss", total / len(losses), prog_bar=self.shows_loss, batch_size=len(batch))
        return total * batch.weight + penalties + self._stopped()

    @property
    def watched(self) -> Mapping[str, Training]:
        return {name: self.members[name] for name in self.members if name not in self.diverged}

    def losses_of_step(self, loss: Tensor) -> tuple[Sequence[str], Tensor]:
        return self._of_step

    def give_up(self, errors: Mapping[str, NotFiniteError]) -> None:
        """Stop the members that have diverged, and go on with the others."""
        for name, error in errors.items():
            self.diverged[name] = str(error)
            if name in self.learning:
                self._stop(name)

    def outcomes(self, batch: CounterfactualBatch, interventions: Mapping[str, Interventions]) -> dict[str, Outcome]:
        """What each member's interventions lead to, as its objectives see it; unedited answers are shared."""
        searches = {name: self._search(name) for name in interventions}
        edited = {name: {} for name, each in searches.items() if each.objectives.needs_edited}
        known: dict[str, Tensor] = {}
        logits = self.interchange(batch, interventions, edited)
        return {
            name: Outcome(
                logits=each,
                batch=batch,
                network=self.network,
                edited=edited.get(name, {}),
                interventions=interventions[name],
                known=known,
            )
            for name, each in logits.items()
        }

    def interchange(
        self,
        batch: CounterfactualBatch,
        interventions: Mapping[str, Interventions],
        edited: Mapping[str, dict[Placement, Edited]] = NOTHING,
    ) -> dict[str, Tensor]:
        """Each member's answer on the bases.

        ``interventions`` are given for each member, so that hard gates can replace the trained soft ones; ``edited``
        takes up activations as in :class:`~itrain.training.interchange.Interchange`.
        """
        with self.network.unchanged(), parametrize.cached():
            parts = {name: member.interchange for name, member in self.members.items()}
            if any(isinstance(source, IntervenedInputs) for source in batch.sources.values()):
                # What is read in an intervened run depends on whose interventions edit it.
                read = {name: parts[name].read(batch, each) for name, each in interventions.items()}
            else:
                every = {
                    place: each[place] for each in interventions.values() for place in each if each[place].takes_source
                }
                read = dict.fromkeys(interventions, next(iter(parts.values())).read(batch, every))
            edits = [
                parts[name].edits(batch, each, read[name], edited.get(name)) for name, each in interventions.items()
            ]
            answers = self.network.edit_each(batch.base, edits, rows=self.rows)
        return dict(zip(interventions, answers, strict=True))

    def predict_step(self, batch: CounterfactualBatch, batch_idx: int) -> dict[str, Tensor]:
        """The logits of each member's interchange, with gates as in evaluation."""
        hard = {name: self.members[name].interchange.hardened() for name in self.watched}
        return self.interchange(batch, hard) if hard else {}

    def begin(self, split: str) -> None:
        self.losses.clear()
        for member in self.members.values():
            member.scores.reset()
        self.divergences.reset()

    def score(self, split: str, batch: CounterfactualBatch) -> None:
        searches = [each for each in self.members.values() if isinstance(each, AlignmentSearch)]
        clean = searches[0].scores.unedited(batch) if split == "test" and searches else None
        hard = {name: self.members[name].interchange.hardened() for name in self.watched}
        outcomes = self.outcomes(batch, hard) if hard and split == "validation" else {}
        answers = {name: each.logits for name, each in outcomes.items()}
        if hard and not outcomes:
            answers = self.interchange(batch, hard)
        for name, logits in answers.items():
            self.members[name].scores.update(split, logits, batch)
            if clean is not None:
                self._search(name).scores.compare(split, clean, logits, batch)
            if split == "validation":
                loss = self._search(name).loss(outcomes[name])
                self.losses.setdefault(name, MeanMetric().to(loss.device)).update(loss, len(batch))
        if clean is not None and self.watched:
            self.divergences.update(batch, hard)

    def figures(self, split: str) -> dict[str, Tensor]:
        """All members' figures, each under the member's name."""
        found: dict[str, Tensor] = {}
        for name in self.watched:
            try:
                found |= {f"{name}/{key}": value for key, value in self.members[name].scores.compute().items()}
            except NotFiniteError as error:
                self.give_up({name: error})
        for name, each in self.divergences.compute().items():
            try:
                require_invertible(float(each.get(ROUND_TRIP, 0.0)), name)
            except NotFiniteError as error:
                self.give_up({name: error})
            found |= {f"{name}/test/{key}": value for key, value in each.items() if name in self.watched}
        losses = {name: loss.compute() for name, loss in self.losses.items()}
        found |= {f"{name}/validation/loss": loss for name, loss in losses.items() if name in self.watched}
        found |= {f"{name}/{split}/{DIVERGED}": torch.tensor(1.0) for name in self.diverged}
        self.losses.clear()
        if split == "test":
            for name in self.watched:
                member = self.members[name]
                hard = [(each.hardened(), each) for each in member.trained.values()]
                if any(made is not trained for made, trained in hard):
                    ranks = [float(made.rank) for made, _ in hard]
                    found[f"{name}/test/rank_found"] = torch.tensor(ranks).mean()
        return found

    def on_validation_epoch_end(self) -> None:
        self._report("validation")
        losses = {name: self.found[f"{name}/validation/loss"] for name in self.learning}
        if losses:
            self.log("validation/loss", sum(losses.values()) / len(losses), sync_dist=True)
        fits = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        for name in list(self.learning) if fits else []:
            (lowest, waited), loss = self.best[name], losses[name]
            self.best[name] = (loss, 0) if loss < lowest else (lowest, waited + 1)
            if self.patience is not None and self.best[name][1] >= self.patience:
                self._stop(name)
        self.trainer.should_stop |= not self.learning

    def on_test_epoch_end(self) -> None:
        self._report("test")

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        """The members' parts, under the members' names and theirs."""
        return {
            f"{name}, {part}": module
            for name, member in self.members.items()
            for part, module in member.trained_parts.items()
        }

    @property
    def exported(self) -> nn.Module:
        return nn.ModuleDict({name: member.exported for name, member in self.members.items()})

    def export_arguments(self) -> dict[str, Any]:
        raise ValueError("a cohort is not exported itself; export its members: export(cohort.members[name], ...)")

    @property
    def placements(self) -> tuple[Placement, ...]:
        return tuple(dict.fromkeys(place for member in self.members.values() for place in member.placements))

    def check(self, data: SplitDataModule) -> None:
        for member in self.members.values():
            member.check(data)

    @property
    def groups(self) -> Sequence[Sequence[Site]]:
        return [member.edited for member in self.members.values()]

    @property
    def edited(self) -> tuple[Site, ...]:
        return tuple(dict.fromkeys(site for group in self.groups for site in group))

    @property
    def fits_activations(self) -> bool:
        return any(member.fits_activations for member in self.members.values())

    def learn_statistics(self, batches: Iterable[CounterfactualBatch]) -> None:
        """Have each member learn its closed-form statistics."""
        batches = list(batches)
        for name, member in self.members.items():
            if member.fits_activations and (not member.fitted or name in self._fitted_here):
                try:
                    member.fit_activations(batches)
                except NotFiniteError as error:
                    self.give_up({name: error})
                self._fitted_here.add(name)

    def anneal(self, progress: float) -> None:
        for name in self.learning:
            self.members[name].anneal(progress)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group for member in self.members.values() for group in member.parameter_groups()]

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip each member's gradients alone, as its own fit would."""
        if not gradient_clip_val:
            return
        for name in self.learning:
            parameters = list(self.members[name].exported.parameters())
            if gradient_clip_algorithm == "value":
                clip_grad_value_(parameters, gradient_clip_val)
            else:
                clip_grad_norm_(parameters, gradient_clip_val)

    def configure_callbacks(self) -> list[lightning.Callback]:
        """Those of a fit except the first-step check: a member whose site has no effect is shown, not refused."""
        kept = [each for each in super().configure_callbacks() if not isinstance(each, FirstStepCheck)]
        return [*kept, FiniteCheck(self)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["cohort"] = {"learning": list(self.learning), "best": dict(self.best), "diverged": self.diverged}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["cohort"]
        self.learning, self.best = list(saved["learning"]), dict(saved["best"])
        self.diverged = dict(saved.get("diverged", {}))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.trainer.world_size > 1:
            for name in self._at_rest:
                self._without_gradient(name)

    def _stop(self, name: str) -> None:
        self.learning.remove(name)
        self._without_gradient(name)

    def _without_gradient(self, name: str) -> None:
        for parameter in self.members[name].exported.parameters():
            # Without a gradient an optimizer leaves a parameter alone; at a gradient of 0 Adam would move it on.
            parameter.grad = None

    @property
    def _at_rest(self) -> list[str]:
        """The members that have weights and do not learn."""
        return [
            name
            for name, member in self.members.items()
            if name not in self.learning and list(member.exported.parameters())
        ]

    def _stopped(self) -> Tensor | float:
        """0, as a function of the weights of members that have stopped, where there are several processes."""
        if self.trainer.world_size == 1:
            return 0.0
        return at_rest(each for name in self._at_rest for each in self.members[name].exported.parameters())

    def _search(self, name: str) -> AlignmentSearch:
        member = self.members[name]
        assert isinstance(member, AlignmentSearch), "tracing trains nothing, so it is never validated"
        return member

    def _report(self, split: str) -> None:
        """Keep all members' figures, and log them."""
        self.found = {name: float(value) for name, value in self.figures(split).items()}
        # All at once: Lightning's own log takes as long for each figure as a small model's block.
        for logger in [] if self.trainer.sanity_checking else self.loggers:
            logger.log_metrics(self.found, self.global_step)
