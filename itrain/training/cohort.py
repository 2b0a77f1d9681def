"""Cohort: several searches or traces of one model, run at once in one run of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchmetrics import MeanMetric

from itrain.data import CounterfactualBatch
from itrain.inputs import ModelInputs
from itrain.interventions.orthogonal import retract_after_steps
from itrain.networks.base import ROWS
from itrain.training.alignment import AlignmentSearch
from itrain.training.interchange import Interchange
from itrain.training.interventions import Interventions
from itrain.training.optimization import OptimizerFactory, with_linear_schedule


class Cohort(lightning.LightningModule):
    """Runs members side by side: their tokens share a run of the model.

    loss = sum over members of their own losses. No token of one member sees another's, so the gradient of each member
    is its own, and so are its figures, as if it had been fitted alone. Members may differ in site, intervention and
    rank; they share data, batch order, ``loss_over``, optimizer and schedule. A small model's step costs much the same
    whatever its batch, so that a cohort costs little more than one of its members.

    Args:
        members: alignment searches, or what trains nothing, under names that have no slash.
        optimizer: from groups of parameters to the optimizer; None is for evaluation only.
        warmup: share of the steps in which the learning rate rises.
        patience: epochs without a lower validation loss after which a member stops learning; None: all go to the end.
        rows: the most rows of a run that members share; those beyond it run in turn.

    Raises:
        ValueError: there are no members, or they have not the same network or training loss.
    """

    def __init__(
        self,
        *,
        members: Mapping[str, Interchange],
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
        patience: int | None = None,
        rows: int = ROWS,
    ) -> None:
        super().__init__()
        networks = {id(member.network): member.network for member in members.values()}
        if len(networks) != 1:
            raise ValueError(f"the members of a cohort share one network; these {len(members)} have {len(networks)}")
        over = {member.loss_over for member in members.values() if isinstance(member, AlignmentSearch)}
        if len(over) > 1:
            raise ValueError(f"the members of a cohort share loss_over; these have {' and '.join(sorted(over))}")
        self.members: Mapping[str, Interchange] = nn.ModuleDict(dict(members))  # type: ignore[assignment]
        self.optimizer, self.warmup, self.patience, self.rows = optimizer, warmup, patience, rows
        (self.network,) = networks.values()
        self.learning = [name for name, member in members.items() if list(member.exported.parameters())]
        self.best = {name: (float("inf"), 0) for name in members}
        """The lowest validation loss of each member and the epochs since."""
        self.losses: dict[str, MeanMetric] = {}
        self.found: dict[str, float] = {}
        """What the last validation or test found, as ``<member>/<split>/<figure>``."""

    def prepare(self, bases: Sequence[ModelInputs], sources: Sequence[ModelInputs]) -> str:
        """Tell the network what it will be asked; the line that says how the model will be run."""
        return self.network.prepare([member.edited for member in self.members.values()], bases, sources)

    def training_step(self, batch: CounterfactualBatch, batch_idx: int) -> Tensor:
        batch = self._search(self.learning[0]).trained_on(batch)
        logits = self.interchange(batch, {name: self.members[name].trained for name in self.learning})
        losses = {name: self._search(name).loss(each, batch) for name, each in logits.items()}
        penalties = sum(self.members[name].penalty() for name in self.learning)
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total / len(losses), prog_bar=True, batch_size=len(batch))
        return total * batch.weight + penalties

    def interchange(self, batch: CounterfactualBatch, interventions: Mapping[str, Interventions]) -> dict[str, Tensor]:
        """Each member's answer on the bases.

        The members' interventions are given, so that hard ones can stand in for those that are trained.
        """
        with self.network.unchanged(), parametrize.cached():
            read = [site for each in interventions.values() for site in each if each[site].takes_source]
            activations = next(iter(self.members.values())).read(batch, list(dict.fromkeys(read)))
            edits = [self.members[name].edits(batch, each, activations) for name, each in interventions.items()]
            answers = self.network.edit_each(batch.base, edits, rows=self.rows)
        return dict(zip(interventions, answers, strict=True))

    def validation_step(self, batch: CounterfactualBatch, batch_idx: int) -> None:
        for name, logits in self._score("validation", batch).items():
            loss = self._search(name).loss(logits, batch)
            self.losses.setdefault(name, MeanMetric().to(loss.device)).update(loss, len(batch))

    def test_step(self, batch: CounterfactualBatch, batch_idx: int) -> None:
        self._score("test", batch)

    def on_validation_epoch_end(self) -> None:
        losses = {name: float(loss.compute()) for name, loss in self.losses.items()}
        self._report({f"{name}/validation/loss": loss for name, loss in losses.items()})
        for name in [] if self.trainer.sanity_checking else list(self.learning):
            (lowest, waited), loss = self.best[name], losses[name]
            self.best[name] = (loss, 0) if loss < lowest else (lowest, waited + 1)
            if self.patience is not None and self.best[name][1] >= self.patience:
                self._stop(name)
        self.losses.clear()
        self.trainer.should_stop |= not self.learning

    def on_test_epoch_end(self) -> None:
        ranks = {}
        for name, member in self.members.items():
            hard = [(each.hardened(), each) for each in member.trained.values()]
            if any(found is not trained for found, trained in hard):
                ranks[f"{name}/test/rank_found"] = sum(found.rank for found, _ in hard) / len(hard)
        self._report(ranks)

    def anneal(self, progress: float) -> None:
        for name in self.learning:
            self.members[name].anneal(progress)

    def configure_optimizers(self) -> dict[str, Any]:
        if self.optimizer is None:
            raise ValueError("training.optimizer: a cohort that learns needs one")
        groups = [group for member in self.members.values() for group in member.parameter_groups() if group["params"]]
        optimizer = self.optimizer(groups)
        retract_after_steps(optimizer, self)
        return with_linear_schedule(optimizer, self.trainer, self.warmup)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["cohort"] = {"learning": list(self.learning), "best": dict(self.best)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.learning, self.best = list(checkpoint["cohort"]["learning"]), dict(checkpoint["cohort"]["best"])

    def _stop(self, name: str) -> None:
        self.learning.remove(name)
        for parameter in self.members[name].exported.parameters():
            # Without a gradient an optimizer leaves a parameter alone; at a gradient of 0 Adam would move it on.
            parameter.grad = None

    def _search(self, name: str) -> AlignmentSearch:
        member = self.members[name]
        assert isinstance(member, AlignmentSearch), "tracing trains nothing, so it is never validated"
        return member

    def _score(self, split: str, batch: CounterfactualBatch) -> dict[str, Tensor]:
        hard = {
            name: {site: each.hardened() for site, each in member.trained.items()}
            for name, member in self.members.items()
        }
        logits = self.interchange(batch, hard)
        for name, each in logits.items():
            self.members[name].measure(split, each, batch)
        return logits

    def _report(self, others: Mapping[str, float]) -> None:
        """Note all members' figures, and these."""
        figures = {name: member.figures() for name, member in self.members.items()}
        found = {f"{name}/{key}": float(value) for name, each in figures.items() for key, value in each.items()}
        self.found = {**found, **others}
        # All at once: Lightning's own log takes as long for each figure as a small model's block.
        for logger in [] if self.trainer.sanity_checking else self.loggers:
            logger.log_metrics(self.found, self.global_step)
