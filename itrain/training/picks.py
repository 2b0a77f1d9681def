"""Scores of HyperDAS: the answers under its edits in each mode, and how often it picks the token that is known."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import MeanMetric

from itrain.data import CounterfactualBatch
from itrain.inputs import ModelInputs, PositionError
from itrain.interventions.controls import FullVector
from itrain.networks.base import Network
from itrain.sites import Site
from itrain.training.hypernetwork import one_to_one
from itrain.training.interchange import Interchange
from itrain.training.scores import InterchangeScores

RIGHT_BASE, RIGHT_SOURCE, RIGHT_PAIR = "right_base_token", "right_source_token", "right_pair"
EDITED = "edited_tokens"
LEAKAGE = "leakage"


class PickScores:
    """IIA, cause and isolate of each setup, by place, with the tokens that are picked.

    Of the one-to-one edit, ``right_base_token`` is the share of cause pairs in which it edits the known token of the
    base, ``right_source_token`` that in which some token takes the known one of the source, and ``right_pair`` that in
    which the former takes the latter; isolate pairs may as well be left alone. ``edited_tokens`` is the mean number of
    base tokens that it edits, in all pairs. Other tokens may hold the variable too: those after the known one, once
    attention has read it.
    ``leakage`` is what disentangling (of pairs of one kind, IIA) loses from soft to one-to-one weights.

    Args:
        network: the base model.
        site: whose tokens are picked.
        known: the site at the token that holds the variable; None: it is not known.
    """

    def __init__(self, network: Network, site: Site, known: Site | None) -> None:
        self.site, self.known = site, known
        # Of a whole swap at the site: what accounts for answers asks it for the network and the unedited run alone.
        whole = Interchange(network, sites=site, intervention=FullVector, hidden_sizes=[network.hidden_size(site)])
        self.answers = InterchangeScores(whole)
        self.picks: dict[str, MeanMetric] = {}

    def begin(self) -> None:
        """Drop what an interrupted split has left."""
        self.answers.reset()
        self.picks.clear()

    def unedited(self, batch: CounterfactualBatch) -> Float[Tensor, "batch ... vocabulary"]:
        """The model's answers on the bases where nothing is edited."""
        return self.answers.unedited(batch)

    def update(
        self,
        place: str,
        logits: Float[Tensor, "batch ... vocabulary"],
        batch: CounterfactualBatch,
        clean: Float[Tensor, "batch ... vocabulary"] | None,
    ) -> None:
        """Update the figures of a place, such as ``test/soft``, with the answers on a batch."""
        self.answers.update(place, logits, batch)
        if clean is not None:
            self.answers.compare(place, clean, logits, batch)

    def update_picks(
        self, place: str, weights: Float[Tensor, "batch source+1 base"], batch: CounterfactualBatch
    ) -> None:
        """Update what a place tells of the tokens that soft weights pick."""
        hard = one_to_one(weights)[:, :-1]
        found = {EDITED: hard.sum((1, 2))}
        if self.known is not None:
            base, source = (each.to(hard.device) for each in self._known(batch))
            rows = torch.arange(len(hard), device=hard.device)
            right = {RIGHT_BASE: hard.sum(1)[rows, base], RIGHT_SOURCE: hard.amax(2)[rows, source]}
            right[RIGHT_PAIR] = hard[rows, source, base]
            cause = (~batch.isolates).to(hard.device)
            found |= {name: values[cause] for name, values in right.items()}
        for name, values in found.items():
            metric = self.picks.setdefault(f"{place}/{name}", MeanMetric().to(values.device))
            if len(values):  # or a mean of nothing
                metric.update(values.float())

    def compute(self, split: str) -> dict[str, Tensor]:
        """All figures since the last call."""
        found = self.answers.compute() | {name: metric.compute() for name, metric in self.picks.items()}
        self.picks.clear()
        for figure in ("disentangle_argmax", "iia_argmax"):
            soft, hard = found.get(f"{split}/soft/{figure}"), found.get(f"{split}/{figure}")
            if soft is not None and hard is not None and not soft.isnan():
                return found | {f"{split}/{LEAKAGE}": soft - hard}
        return found

    def _known(self, batch: CounterfactualBatch) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
        """The places of the known token among those of base and source that can be picked, on the CPU."""
        source = torch.zeros(len(batch), dtype=torch.long)
        for variable, inputs in batch.sources.items():
            rows = batch.rows(variable)
            if rows is None:
                source = self._place(inputs)
            elif len(rows):
                source[rows] = self._place(inputs.take(rows))
        return self._place(batch.base), source

    def _place(self, inputs: ModelInputs) -> Int[Tensor, " batch"]:
        """The place of the known token among the site's.

        Raises:
            PositionError: the token cannot be picked.
        """
        assert self.known is not None, "asked for where a token is known"
        slots, token = inputs.indices(self.site, inputs.length).index.cpu(), inputs.earliest(self.known)
        found = (slots == token[:, None]) & inputs.present(self.site)
        if not found.any(1).all():
            where = inputs.name(int((~found.any(1)).nonzero()[0, 0]))
            raise PositionError(f"known={self.known.position}: in {where} it is none of the tokens of '{self.site}'")
        return found.float().argmax(1)
