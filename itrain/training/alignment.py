"""AlignmentSearch: trains the edit that makes a frozen model behave as its causal model predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from itrain.bounds import require_at_least
from itrain.data import CounterfactualBatch
from itrain.data.naturals import add_naturals
from itrain.data.splits import SplitDataModule
from itrain.inputs import ModelInputs
from itrain.networks.attached import Attached
from itrain.networks.base import Network
from itrain.objectives.base import Edited, ObjectiveFactory, Objectives, Outcome
from itrain.objectives.cross_entropy import CrossEntropy
from itrain.placements import Factory, Placement, Placements
from itrain.training.attaching import Attaching, attach_interchange
from itrain.training.base import Training
from itrain.training.interchange import Interchange, Interventions
from itrain.training.optimization import OptimizerFactory
from itrain.training.parts import require_next_map
from itrain.training.placed import Placed
from itrain.training.scores import InterchangeScores


class AlignmentSearch(Placed[Interchange], Training):
    """Trains interventions at sites of a frozen model on the counterfactual labels of a causal model.

    loss = 1/N sum_n w_n sum_o weight_o loss_o(model(base_n | do(site := intervention(base_n, source_n))), label_n)
    + penalty. The one objective o is the cross entropy of the counterfactual label over the whole vocabulary at the
    answer (Geiger et al. 2024, eq. 5), unless others are named. w_n is ``isolate_weight`` for isolate pairs, else 1: 0
    trains interventions to cause, 1 to cause and to isolate (MDAS; Huang et al. 2024, "RAVEL", section 4). The penalty
    is on the interventions' sizes.

    Args:
        network: the base model, frozen.
        sites, intervention, shared, join_positions, hidden_sizes: as in
            :class:`~itrain.training.interchange.Interchange`.
        optimizer: builds the optimizer from groups of parameters; None: for evaluation only.
        warmup: share of the steps in which the learning rate rises.
        objectives: build the losses that are summed, by name, for example ``{"js": JensenShannon}``: classes of
            ``itrain.objectives`` or partials of them. None: cross entropy alone.
        isolate_weight: weight of isolate pairs, in which nothing may change.
        loss_over: ``candidates`` takes the training loss over the task's possible output tokens alone and computes no
            other logits, which at the last token of a small model saves much of a step. Training then no longer asks
            these tokens to win against the rest of the vocabulary; validation and test still do.
        next_map: the path of the linear module that reads the sites' features; a test scores the subspaces' parts in
            its row space and in its null space. None: the module whose input a site is, where that is linear.
        row_features: the features of the sites that carry the variables, where they are known, counted from 0: a test
            measures the divergence of these by itself; see :class:`~itrain.metrics.divergence.RowDivergence`.

    Raises:
        ValueError: ``next_map`` names no linear module, or none by which the sites' subspaces can be split.
    """

    retracts: ClassVar[bool] = True

    def __init__(
        self,
        *,
        network: Network,
        sites: Placements,
        intervention: Factory | None = None,
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
        objectives: Mapping[str, ObjectiveFactory] | None = None,
        isolate_weight: float = 1.0,
        loss_over: Literal["vocabulary", "candidates"] = "vocabulary",
        shared: bool = False,
        join_positions: bool = False,
        hidden_sizes: Sequence[int] | None = None,
        next_map: str | None = None,
        row_features: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.remember(locals())
        require_at_least(0, isolate_weight=isolate_weight)
        self.optimizer, self.warmup = optimizer, warmup
        self.isolate_weight, self.loss_over = isolate_weight, loss_over
        self.interchange = Interchange(
            network,
            sites=sites,
            intervention=intervention,
            shared=shared,
            join_positions=join_positions,
            hidden_sizes=hidden_sizes,
        )
        self.objectives = Objectives(objectives, default=CrossEntropy)
        self.sites = self.interchange.sites
        self.arguments.update(sites=self.placements, hidden_sizes=self.interchange.hidden_sizes)
        if next_map is not None:
            require_next_map(self.interchange, next_map)
        self.scores = InterchangeScores(self.interchange, next_map=next_map, row_features=row_features)
        self.network = network

    def training_step(self, batch: CounterfactualBatch, batch_idx: int) -> Tensor:
        batch = self.trained_on(batch)
        losses, terms = self.objectives(self.outcome(batch, self.interchange.trained))
        if self.objectives.named:
            self.log_dict({f"train/{name}_loss": each.mean() for name, each in terms.items()}, batch_size=len(batch))
        loss = self.mean(losses, batch)
        self.log("train/loss", loss, prog_bar=self.shows_loss, batch_size=len(batch))
        return loss * batch.weight + self.interchange.penalty(batch)

    def outcome(self, batch: CounterfactualBatch, interventions: Interventions) -> Outcome:
        """What the interventions lead to, as the objectives see it."""
        edited: dict[Placement, Edited] | None = {} if self.objectives.needs_edited else None
        logits = self.interchange(batch, interventions, edited)
        return Outcome(
            logits=logits, batch=batch, network=self.network, edited=edited or {}, interventions=interventions
        )

    def trained_on(self, batch: CounterfactualBatch) -> CounterfactualBatch:
        """The batch as the training loss sees it."""
        return batch.among_candidates() if self.loss_over == "candidates" else batch

    def loss(self, outcome: Outcome) -> Float[Tensor, ""]:
        """The mean of the pairs' losses, objectives and isolate pairs weighted."""
        return self.mean(self.objectives(outcome)[0], outcome.batch)

    def mean(self, losses: Float[Tensor, " batch"], batch: CounterfactualBatch) -> Float[Tensor, ""]:
        """The mean of the pairs' losses, isolate pairs weighted."""
        if self.isolate_weight != 1:
            losses = losses.where(~batch.isolates.to(losses.device, non_blocking=True), self.isolate_weight * losses)
        return losses.mean()

    def check(self, data: SplitDataModule) -> None:
        super().check(data)
        if draws := max(self.objectives.naturals, 0 if self.scores.row_features is None else 2):
            add_naturals(data, self.placements, draws=draws)
        self.objectives.require(data.datasets["train"].examples)

    def export_arguments(self) -> dict[str, Any]:
        return {name: value for name, value in super().export_arguments().items() if name != "objectives"}

    def predict_step(self, batch: CounterfactualBatch, batch_idx: int) -> Float[Tensor, "batch ... vocabulary"]:
        """The logits of each pair's interchange, with gates as in evaluation."""
        return self.interchange(batch, self.interchange.hardened())

    def attach_to(self, model: nn.Module, sources: Mapping[str, ModelInputs], how: Attaching) -> Attached:
        return attach_interchange(self.interchange, model, sources, how)

    def begin(self, split: str) -> None:
        self.scores.begin(split)

    def score(self, split: str, batch: CounterfactualBatch) -> None:
        self.scores.score(split, batch)

    def figures(self, split: str) -> dict[str, Tensor]:
        return self.scores.compute()
