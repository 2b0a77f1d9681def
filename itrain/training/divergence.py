"""Divergences: how far the activations that interventions make lie from natural ones, at the sites that are edited."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from itrain.data import CounterfactualBatch, IntervenedInputs, Runs
from itrain.inputs import ModelInputs
from itrain.inputs.keys import mixed, salt
from itrain.interventions.base import Intervention
from itrain.interventions.featurizers import Featurizer
from itrain.metrics.divergence import Divergence, Points
from itrain.sites import Site
from itrain.training.finite import NotFiniteError
from itrain.training.interchange import Activations, Interchange, Interventions

POINTS = 1000
"""The most activations of a sample."""
PAIRS = 2 * POINTS
"""The most pairs whose activations are sampled: a sample of intervened ones is of half of them."""
LOST = 1e-2
"""The largest share of an activation that may be lost on the way through a non-linear map and back."""
ROUND_TRIP = "round_trip_error"
"""The name of that share among figures."""
BASE = ""
"""Among the names of variables, stands for the base."""


class Divergences:
    """Divergence of the intervened activations at each edited site, and the baseline between natural ones.

    Natural are the activations of bases and, where sources are read at the site that is written, of sources, in the
    test pairs themselves: they are what the edits meet, and what statistics of other pairs would shift. Intervened is
    what is at the site after the edit, at each of its tokens; positions that are joined are one activation. A seeded
    sample of pairs is looked at, the same in every process; see :class:`~itrain.metrics.divergence.Divergence`.

    Args:
        members: interchanges of one network by name; what they read is read once for all.
    """

    def __init__(self, members: Mapping[str, Interchange]) -> None:
        self.members = members
        self.metrics: dict[tuple[str, Site], Divergence] = {}
        self.smallest = torch.empty(0, dtype=torch.long)
        self.lost: dict[str, Tensor] = {}
        """The largest share of an activation that each member's non-linear maps lose on the way there and back."""

    def reset(self) -> None:
        """Drop what an interrupted split has left."""
        self.metrics.clear()
        self.lost.clear()
        self.smallest = self.smallest[:0]

    def update(self, batch: CounterfactualBatch, interventions: Mapping[str, Interventions]) -> None:
        """Take up the pairs of a batch that may be in the sample, under each member's interventions."""
        network = next(iter(self.members.values())).network
        keys = pair_keys(batch)
        if not network.in_step:  # or processes would make different numbers of runs
            rows = self._wanted(keys)
            if not len(rows):
                return
            batch, keys = (batch, keys) if len(rows) == len(batch) else (batch.take(rows), keys[rows])
        with network.unchanged(), parametrize.cached():
            sites = dict.fromkeys(site for name in interventions for site in self.members[name].sites)
            natural = network.read(batch.base, sites)
            every = {place: each[place] for each in interventions.values() for place in each}
            shared = not any(isinstance(source, IntervenedInputs) for source in batch.sources.values())
            together = next(iter(self.members.values())).read(batch, every) if shared else {}
            for name, each in interventions.items():
                member = self.members[name]
                # What is read in an intervened run depends on whose interventions edit it.
                read = together if shared else member.read(batch, each)
                edited = _edited(member, batch, each, natural, read)
                for placement, intervention in each.items():
                    if is_nonlinear(intervention):
                        lost = _lost(intervention, member.joined(natural[placement.write]))
                        self.lost[name] = torch.maximum(self.lost.get(name, lost), lost)
                for site in member.sites:
                    known = _sources(batch, each, site, read)
                    self._take(name, site, edited[site], {BASE: natural[site], **known}, batch, keys)

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """``divergence`` and ``natural_divergence`` of each member, the means over its sites.

        Several sites have their own after a slash: ``divergence/layer1.block_output@last``.
        """
        found: dict[str, dict[str, Tensor]] = {name: {ROUND_TRIP: lost} for name, lost in self.lost.items()}
        for member in dict.fromkeys(name for name, _ in self.metrics):
            of = found.setdefault(member, {})
            sites = {site: metric.compute() for (name, site), metric in self.metrics.items() if name == member}
            for figure in ("divergence", "natural_divergence"):
                of[figure] = torch.stack([each[figure] for each in sites.values()]).mean().float()
                if len(sites) > 1:
                    of |= {f"{figure}/{site}": each[figure].float() for site, each in sites.items()}
        self.reset()
        return found

    def _wanted(self, keys: Int[Tensor, " batch"]) -> Int[Tensor, " rows"]:
        """The pairs that may be among those with the smallest keys of all."""
        self.smallest = torch.cat([self.smallest, keys]).sort().values[:PAIRS]
        return (keys <= self.smallest[-1]).nonzero()[:, 0]

    def _take(
        self,
        name: str,
        site: Site,
        edited: Tensor,
        natural: Mapping[str, Tensor],
        batch: CounterfactualBatch,
        keys: Int[Tensor, " batch"],
    ) -> None:
        """Add the activations of a batch at a site, where each example has tokens there."""
        member, parts = self.members[name], []
        for variable, activation in natural.items():
            rows = None if variable == BASE else batch.rows(variable)
            inputs = batch.base if variable == BASE else batch.sources[variable]
            inputs, of = (inputs, keys) if rows is None else (inputs.take(rows), keys[rows])
            parts.append(_points(member, activation, inputs, site, of, variable))
        metric = self.metrics.setdefault((name, site), Divergence(points=POINTS).to(edited.device))
        metric.update(
            _points(member, edited, batch.base, site, keys, BASE),
            Points(*(torch.cat([getattr(part, field) for part in parts]) for field in Points._fields)),
        )


def is_nonlinear(part: nn.Module) -> bool:
    """Whether it has a trained map that is not linear."""
    return any(isinstance(each, Featurizer) and each.trains_nonlinear_map for each in part.modules())


def require_invertible(lost: float, where: str) -> None:
    """Refuse figures of a map whose inverse rounding has spoiled.

    Raises:
        NotFiniteError: more of the activation is lost on the way there and back than a figure stands.
    """
    if not lost <= LOST:
        raise NotFiniteError(
            f"{where}: the map's inverse loses {lost:.2g} of the largest feature to rounding, so its figures mean "
            "nothing; set double=true in it, or lower training.optimizer.lr or its num_blocks"
        )


def _lost(intervention: Intervention, natural: Tensor) -> Tensor:
    """How far an activation that takes its own features from itself comes back changed, relative to its largest."""
    back = intervention(natural, natural)
    return ((back - natural).abs().max() / natural.abs().max().clamp(min=1e-30)).float()


def _edited(
    interchange: Interchange,
    batch: CounterfactualBatch,
    interventions: Interventions,
    natural: Mapping[Site, Tensor],
    read: Activations,
) -> dict[Site, Tensor]:
    """The activations at the edited sites after the edits."""
    edits = interchange.edits(batch, interventions, read)
    if len(interchange.sites) > 1:  # of which one may lie above another
        return interchange.network.read(batch.base, interchange.sites, edits)
    ((site, activation),) = [(site, natural[site]) for site in interchange.sites]
    for _, edit in edits:
        activation = edit(activation)
    return {site: activation}


def _sources(
    batch: CounterfactualBatch, interventions: Interventions, site: Site, read: Activations
) -> dict[str, Tensor]:
    """What has been read at the site in sources that nothing edits, for each variable that is served there."""
    found = {}
    for placement, intervention in interventions.items():
        if placement.write == placement.read == site and intervention.takes_source:
            for variable, source in batch.sources.items():
                if placement.serves(variable) and site in read[variable] and not isinstance(source, IntervenedInputs):
                    found[variable] = read[variable][site]
    return found


def _points(
    interchange: Interchange,
    activation: Tensor,
    inputs: ModelInputs,
    site: Site,
    keys: Int[Tensor, " batch"],
    variable: str,
) -> Points:
    """The activation as points, with keys that do not depend on the batch."""
    values, example = interchange.rows(activation, inputs, site)
    example = example.cpu()
    # Examples lie in order, so a point's number is counted from the first of its example.
    number = torch.arange(len(example)) - torch.searchsorted(example, example)
    of = keys[example]
    whose = 0 if variable == BASE else salt(variable)
    return Points(values, mixed(of ^ mixed(number + whose)), (of & 1).bool())


def pair_keys(batch: Runs) -> Int[Tensor, " batch"]:
    """A 64-bit hash of each pair, or intervened run, on the CPU: of its base and of the sources that it takes."""
    total = batch.base.keys
    for variable, source in batch.sources.items():
        rows = batch.rows(variable)
        keys = pair_keys(source) if isinstance(source, IntervenedInputs) else source.keys
        taken = mixed(keys + salt(variable))
        # Which variables a batch has depends on its other pairs.
        total = total + (taken if rows is None else torch.zeros_like(taken).index_copy(0, rows, taken[rows]))
    return mixed(total)
