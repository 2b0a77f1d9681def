"""Scores: the figures of trained interventions and of their controls, on pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.data import CounterfactualBatch
from itrain.devices import device_of
from itrain.interventions.base import Intervention
from itrain.interventions.controls import FullVector, RandomSubspace
from itrain.interventions.masking import FixedMask
from itrain.metrics import RULES, Disentanglement, InterchangeAccuracy, LogitDifference, Odds
from itrain.training.divergence import ROUND_TRIP, Divergences, require_invertible
from itrain.training.finite import FiniteAnswers
from itrain.training.interchange import Interchange, Interventions
from itrain.training.parts import parts_of


class InterchangeScores:
    """IIA of interventions on the pairs of a split, by both rules, over all pairs and for each group of variables.

    A test also scores the controls: a random subspace of equal rank and the full vector at the same sites, and the soft
    gates where evaluation uses hard ones. A random subspace of full rank is the full vector, and is no control. Beside
    IIA it says how far the answers move from those that the model gives on the bases unedited, odds and FLDD,
    and how far the trained interventions lead from natural activations.

    Where a linear map with a null space follows all sites, the parts of the trained subspaces in its row space and in
    its null space are scored too: see :func:`~itrain.training.parts.parts_of`.

    Args:
        interchange: runs the pairs.
        next_map: the path of the linear module that follows the sites; None: what the architecture tells.
        row_features: features of the sites whose divergence a test measures by itself; None: none.
    """

    def __init__(
        self, interchange: Interchange, *, next_map: str | None = None, row_features: Sequence[int] | None = None
    ) -> None:
        self.interchange, self.next_map = interchange, next_map
        self.row_share: float | None = None
        self.ranked: str | None = None
        """The split whose figures name the rank that gates have come to; None: nothing is gated."""
        self.evaluated: dict[str, Interventions] = {}
        """The interventions that are scored, by the suffix in their figures' names: ``""``, ``/full_vector``."""
        self.metrics: dict[str, InterchangeAccuracy] = {}
        self.moved: dict[tuple[str, str], tuple[Odds, LogitDifference]] = {}
        """By place and part; empty where answers have not been compared with unedited ones."""
        self.averaged: dict[str, Disentanglement] = {}
        """Cause and isolate averaged over what is asked, where the task says it."""
        self.answers = FiniteAnswers(interchange.network)
        self.row_features = row_features
        rows = {} if row_features is None else {"": row_features}
        self.divergences = Divergences({"": interchange}, row_features=rows)

    def begin(self, split: str) -> None:
        """Choose what is scored: the trained interventions and, in a test, their controls."""
        self.reset()
        trained, hard = self.interchange.trained, self.interchange.hardened()
        self.evaluated = {"": hard}
        gated = any(hard[site] is not each for site, each in trained.items())
        self.ranked = split if gated else None
        if split == "test":
            network = self.interchange.network
            dtype = torch.promote_types(next(network.parameters()).dtype, torch.float32)
            like: dict[str, Any] = {"device": device_of(network), "dtype": dtype}
            random = {site: _untrained(each).to(**like) for site, each in hard.items()}
            if not all(_is_all(each) for each in random.values()):
                self.evaluated["/random_subspace"] = random
            self.evaluated["/full_vector"] = {site: FullVector(each.hidden_size) for site, each in hard.items()}
            if gated:
                self.evaluated["/soft"] = trained
            if (parts := parts_of(self.interchange, hard, self.next_map)) is not None:
                self.evaluated |= {"/row_part": parts.row, "/null_part": parts.null}
                self.row_share = parts.row_share

    def reset(self) -> None:
        """Drop what an interrupted split has left."""
        self.row_share = None
        self.metrics.clear()
        self.moved.clear()
        self.averaged.clear()
        self.answers.counts.clear()
        self.divergences.reset()

    def score(self, split: str, batch: CounterfactualBatch, clean: Tensor | None = None) -> None:
        """Run the pairs under each of the interventions that are scored.

        Args:
            split: which pairs they are; those of a test are compared with the unedited answers too.
            batch: the pairs.
            clean: the model's unedited answers on the bases, where they are known.
        """
        if split == "test" and clean is None:
            clean = self.unedited(batch)
        for control, interventions in self.evaluated.items():
            logits = self.interchange(batch, interventions)
            self.update(f"{split}{control}", logits, batch)
            if split == "test" and clean is not None:
                self.compare(f"{split}{control}", clean, logits, batch)
        if split == "test":
            self.divergences.update(batch, {"": self.evaluated[""]})

    def unedited(self, batch: CounterfactualBatch) -> Float[Tensor, "batch ... vocabulary"]:
        """The model's answers on the bases where nothing is edited."""
        with self.interchange.network.unchanged():
            return self.interchange.network.unedited(batch.base, self.interchange.sites)

    def update(self, place: str, logits: Float[Tensor, "batch ... vocabulary"], batch: CounterfactualBatch) -> None:
        """Update the figures of a place, such as ``test/full_vector``, with the answers on a batch."""
        self.answers.update(place, logits)
        device = logits.device
        isolates = batch.isolates.to(device, non_blocking=True)
        whole = (logits, batch.counterfactual_label, batch.contrast_label, batch.changes, isolates)
        for part, rows in _parts(batch, device).items():
            for rule in RULES:
                metric = self.metrics.setdefault(f"{place}{part}/{rule}", InterchangeAccuracy(rule=rule).to(device))
                metric.update(*(each[rows] for each in whole))
        if batch.question is None:
            return
        for rule in RULES:
            if (name := f"{place}/{rule}") not in self.averaged:
                made = Disentanglement(groups=batch.groups, asked=batch.questions, rule=rule)
                self.averaged[name] = made.to(device)
            self.averaged[name].update(*whole[:3], batch.group, batch.question)

    def compare(
        self,
        place: str,
        clean: Float[Tensor, "batch ... vocabulary"],
        logits: Float[Tensor, "batch ... vocabulary"],
        batch: CounterfactualBatch,
    ) -> None:
        """Update how far the answers of a place lie from the unedited ones on a batch."""
        whole = (clean, logits, batch.base_label, batch.counterfactual_label)
        for part, rows in _parts(batch, logits.device).items():
            if (place, part) not in self.moved:
                # MPS has no fp64.
                dtype = torch.float32 if logits.device.type == "mps" else torch.float64
                made = Odds(dtype=dtype).to(logits.device), LogitDifference(dtype=dtype).to(logits.device)
                self.moved[place, part] = made
            for metric in self.moved[place, part]:
                metric.update(*(each[rows] for each in whole))

    def compute(self) -> dict[str, Tensor]:
        """All figures since the last call, such as ``test/iia_argmax``.

        Raises:
            NotFiniteError: some answers were not finite.
        """
        self.answers.require()
        found = {}
        for name, metric in self.metrics.items():
            place, _, rule = name.rpartition("/")
            for key, value in metric.compute().items():
                found[f"{place}/{key}" if key.startswith("pairs") else f"{place}/{key}_{rule}"] = value.float()
        found |= self._moves()
        for name, metric in self.averaged.items():
            place, _, rule = name.rpartition("/")
            found |= {f"{place}/{key}_averaged_{rule}": value.float() for key, value in metric.compute().items()}
        if self.ranked is not None and self.metrics:
            ranks = [each.rank for each in self.evaluated[""].values()]
            found[f"{self.ranked}/rank"] = torch.tensor(sum(ranks) / len(ranks))
        if self.row_share is not None and self.metrics:
            found["test/row_share"] = torch.tensor(self.row_share)
        self.metrics.clear()
        self.moved.clear()
        self.averaged.clear()
        diverging = {key: value for each in self.divergences.compute().values() for key, value in each.items()}
        if ROUND_TRIP in diverging:
            require_invertible(float(diverging[ROUND_TRIP]), ", ".join(map(str, self.interchange.placements)))
        return found | {f"test/{key}": value for key, value in diverging.items()}

    def _moves(self) -> dict[str, Tensor]:
        """Odds, logit differences and FLDD; the last also as a percentage of the full vector's, where that is known."""
        found = {
            f"{place}{part}/{key}": value.float()
            for (place, part), metrics in self.moved.items()
            for metric in metrics
            for key, value in metric.compute().items()
        }
        for place, part in self.moved:
            full = found.get(f"test/full_vector{part}/fldd")
            if full is not None and place != "test/full_vector":
                found[f"{place}{part}/fldd_relative"] = 100 * found[f"{place}{part}/fldd"] / full
        return found


def _parts(batch: CounterfactualBatch, device: torch.device) -> dict[str, Any]:
    """All rows of a batch and, of several groups of variables, those of each, under the ends of the figures' names."""
    parts: dict[str, Any] = {"": ...}
    if len(batch.groups) > 1:
        # Indices, worked out on the CPU: how many rows a mask holds, an accelerator would be waited for to tell.
        for number, names in enumerate(batch.groups):
            rows = (batch.group == number).nonzero()[:, 0]
            parts[f"/{'+'.join(names)}"] = rows.to(device, non_blocking=True)
    return parts


def _untrained(intervention: Intervention) -> Intervention:
    rank = min(intervention.rank, intervention.hidden_size)
    return intervention.untrained() or RandomSubspace(intervention.hidden_size, rank=rank)


def _is_all(control: Intervention) -> bool:
    """Whether a random choice of equal size is the same choice: all features, or all of the activation."""
    if isinstance(control, FixedMask):
        return bool(control.gate.all())
    return control.rank == control.hidden_size and len(getattr(control, "blocks", [""])) == 1
