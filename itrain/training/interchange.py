"""Interchange: what AlignmentSearch and InterchangeInterventionTraining do alike, whatever they train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from itrain.data import CounterfactualBatch
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.interventions.controls import FullVector, RandomSubspace
from itrain.interventions.orthogonal import retract_after_steps
from itrain.metrics import RULES, UNUSED, InterchangeAccuracy
from itrain.networks.base import Network
from itrain.networks.lane import Edit
from itrain.sites import Site
from itrain.training.interventions import Interventions, InterventionTraining
from itrain.training.optimization import OptimizerFactory

Activations = dict[str, dict[Site, Tensor]]
"""Of each variable's sources, at each site."""


class Interchange(InterventionTraining):
    """Interventions at sites of a base model, run on pairs and held against what their causal model answers.

    Args:
        network, sites, intervention, optimizer, warmup, shared: as in
            :class:`~itrain.training.interventions.InterventionTraining`.
        join_positions: treat a site's positions as one vector of P * D features instead of P vectors of D.
        hidden_sizes: features that each site's intervention sees; None asks the network, which knows them for named
            components without joined positions. :func:`count_features` finds them out in the other cases.
    """

    def __init__(
        self,
        *,
        network: Network,
        sites: Sequence[Site],
        intervention: Callable[[int], Intervention],
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
        shared: bool = False,
        join_positions: bool = False,
        hidden_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            network=network,
            sites=sites,
            intervention=intervention,
            optimizer=optimizer,
            warmup=warmup,
            shared=shared,
            hidden_sizes=hidden_sizes,
        )
        self.join_positions = join_positions
        self.evaluated: dict[str, Interventions] = {}
        self.metrics: dict[str, InterchangeAccuracy] = {}

    def interchange(
        self, batch: CounterfactualBatch, interventions: Interventions
    ) -> Float[Tensor, "batch ... vocabulary"]:
        """The model's answer on the bases when each variable's sites take their features from its sources."""
        with self.network.unchanged(), parametrize.cached():
            sites = [site for site, each in interventions.items() if each.takes_source]
            activations = self.read(batch, sites)
            return self.network.edit(batch.base, self.edits(batch, interventions, activations))

    def read(self, batch: CounterfactualBatch, sites: Sequence[Site]) -> Activations:
        """What lies at the sites in each variable's sources, of the pairs that interchange it."""
        if not batch.sources:
            raise ValueError("the batch has no sources, so there is no variable to interchange")
        found: Activations = {}
        for variable, source in batch.sources.items():
            rows = batch.rows(variable)
            taken = source if rows is None else source.take(rows)
            found[variable] = self.network.read(taken, sites) if sites and taken.batch_size else {}
        return found

    def edits(
        self, batch: CounterfactualBatch, interventions: Interventions, activations: Activations
    ) -> list[tuple[Site, Edit]]:
        """The edit of each variable at each site."""
        edits = []
        for variable, source in batch.sources.items():
            rows = batch.rows(variable)
            if rows is not None and not len(rows):
                continue
            for site, intervention in interventions.items():
                batch.base.require_same_count(source, site)
                self._require_alike(batch.base, site, rows)
                apply = intervention.edit_for(variable)
                edits.append((site, self._edit(apply, activations[variable].get(site), rows)))
        return edits

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "join_positions": self.join_positions}

    def configure_optimizers(self) -> dict[str, Any]:
        configured = super().configure_optimizers()
        # Not in ReFT, whose recipe's rate is ten times as high and counts on steps that fade.
        retract_after_steps(configured["optimizer"], self)
        return configured

    def fit_activations(self, batches: Iterable[CounterfactualBatch]) -> None:
        """Give interventions that need closed-form statistics the base activations of the training pairs."""
        self.fit_to((batch.base, batch.values) for batch in batches)

    def on_validation_start(self) -> None:
        self.evaluated = {"": {site: each.hardened() for site, each in self.trained.items()}}

    def validation_step(self, batch: CounterfactualBatch, batch_idx: int) -> None:
        self._score("validation", batch)

    def on_test_start(self) -> None:
        hard = {site: each.hardened() for site, each in self.trained.items()}
        self.evaluated = {
            "": hard,
            "/random_subspace": {site: _untrained(each).to(self.device) for site, each in hard.items()},
            "/full_vector": {site: FullVector(each.hidden_size) for site, each in hard.items()},
        }
        if any(hard[site] is not each for site, each in self.trained.items()):
            self.evaluated["/soft"] = self.trained

    def test_step(self, batch: CounterfactualBatch, batch_idx: int) -> None:
        self._score("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._report()

    def on_test_epoch_end(self) -> None:
        self._report()
        if "/soft" in self.evaluated:
            ranks = [each.rank for each in self.evaluated[""].values()]
            self.log("test/rank", sum(ranks) / len(ranks))

    def measure(self, place: str, logits: Float[Tensor, "batch ... vocabulary"], batch: CounterfactualBatch) -> None:
        """Take the answers on a batch into the figures of a place such as ``test/full_vector``."""
        device = logits.device
        group, isolates = batch.group.to(device), batch.isolates.to(device)
        whole = (logits, batch.counterfactual_label, batch.contrast_label, batch.changes, isolates)
        parts: dict[str, Any] = {"": ...}
        if len(batch.groups) > 1:
            parts |= {f"/{'+'.join(names)}": group == number for number, names in enumerate(batch.groups)}
        for part, rows in parts.items():
            for rule in RULES:
                metric = self.metrics.setdefault(f"{place}{part}/{rule}", InterchangeAccuracy(rule=rule).to(device))
                metric.update(*(each[rows] for each in whole))

    def figures(self) -> dict[str, Tensor]:
        """All figures of what was measured since the last call."""
        found = {}
        for name, metric in self.metrics.items():
            place, _, rule = name.rpartition("/")
            for key, value in metric.compute().items():
                found[f"{place}/{key}" if key.startswith("pairs") else f"{place}/{key}_{rule}"] = value.float()
        self.metrics.clear()
        return found

    def _score(self, split: str, batch: CounterfactualBatch) -> None:
        for control, interventions in self.evaluated.items():
            self.measure(f"{split}{control}", self.interchange(batch, interventions), batch)

    def _report(self) -> None:
        self.log_dict(self.figures(), sync_dist=True)

    def _edit(
        self, apply: Callable[[Tensor, Tensor | None], Tensor], source: Tensor | None, rows: Int[Tensor, " rows"] | None
    ) -> Edit:
        joined = None if source is None else self._joined(source)

        def edit(base: Tensor) -> Tensor:
            chosen = base if rows is None else base[rows.to(base.device)]
            new = apply(self._joined(chosen), joined).view_as(chosen)
            return new if rows is None else base.index_copy(0, rows.to(base.device), new.to(base.dtype))

        return edit

    def _require_alike(self, base: ModelInputs, site: Site, rows: Tensor | None) -> None:
        """Refuse ragged positions where tokens of different examples would have to be matched up."""
        if (self.join_positions or rows is not None) and site.position is not None and not base.present(site).all():
            purpose = "be joined" if self.join_positions else "be interchanged in some of the pairs only"
            raise ValueError(
                f"site '{site}': examples have different numbers of tokens there, which cannot {purpose}; "
                f"name one token, for example '{site.terms[0].split('.')[0]}.last'"
            )

    def _rows(
        self, activation: Tensor, inputs: ModelInputs, site: Site
    ) -> tuple[Float[Tensor, "rows hidden"], Int[Tensor, " rows"]]:
        if not self.join_positions:
            return super()._rows(activation, inputs, site)
        return self._joined(activation), torch.arange(len(activation), device=activation.device)

    def _joined(self, activation: Tensor) -> Tensor:
        return activation.flatten(1) if self.join_positions else activation


def answer_loss(
    logits: Float[Tensor, "batch ... vocabulary"], label: Int[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """The cross entropy of each pair's label, in nats; of a label of several tokens, their mean."""
    losses = cross_entropy(logits.movedim(-1, 1), label, reduction="none", ignore_index=UNUSED)
    return losses if losses.ndim == 1 else losses.sum(1) / (label != UNUSED).sum(1)


def count_features(
    network: Network, sites: Sequence[Site], example: ModelInputs, *, join_positions: bool = False
) -> list[int]:
    """The features that an intervention at each site sees, from a run of the example where the modules do not tell."""
    if not join_positions:
        return [network.hidden_size(site, example) for site in sites]
    with torch.no_grad():
        activations = network.read(example, sites)
    return [activations[site].flatten(1).shape[1] for site in sites]


def _untrained(intervention: Intervention) -> Intervention:
    rank = min(intervention.rank, intervention.hidden_size)
    return intervention.untrained() or RandomSubspace(intervention.hidden_size, rank=rank)
