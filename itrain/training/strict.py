"""Resampling what an alignment leaves to no variable, where strict training has the answer stay as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from random import Random
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.data import CounterfactualBatch, IntervenedInputs
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.placements import Placement, plain_sites
from itrain.sites import Site, SiteLike
from itrain.training.building import known_features
from itrain.training.interchange import Interchange, Interventions

Sampling: TypeAlias = Literal["individual", "sample_all", "all"]
"""Which nodes a training step resamples: one at random, each with a chance of one half, or all of them together."""


class Outside(Intervention):
    """Swaps all that aligned edits leave: the source, in which each edit takes its own part from the base again.

    With new = f(base, source) that swaps some coordinates, f(source, base) swaps all others.

    Args:
        hidden_size: features of the activation.
        edits: the aligned edits f, of all variables; none: the whole activation is swapped.
        rank: the coordinates that they swap together.
    """

    def __init__(
        self, hidden_size: int, *, edits: Sequence[Callable[[Tensor, Tensor], Tensor]] = (), rank: int = 0
    ) -> None:
        super().__init__()
        self.aligned = list(edits)
        self.hidden_size, self.rank = hidden_size, max(hidden_size - rank, 0)

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        for edit in self.aligned:
            source = edit(source, base)
        return source


class Resampling:
    """The nodes of a model that an alignment leaves to no variable, and the runs in which they are resampled.

    A node is a site: as a whole or, where interventions are placed there, the rest of it, all but the coordinates that
    they swap for any of the variables. By default the nodes are the rests of all the sites of the interventions. The
    rest of a low layer is no node where variables that are placed higher up pass through it: name the others then.

    A node is resampled from the pair's own source: that of its first variable, as it is before anything edits it. What
    is resampled thus depends neither on the batch that a pair is in nor on the number of processes.

    Args:
        interchange: holds the aligned interventions.
        sites: the nodes; None: the rests that the interventions leave.
        sampling: the nodes that a training step resamples.
        weight: of the loss on what it answers; 0: nodes are resampled in evaluation alone.

    Raises:
        ValueError: a site is listed twice, interventions leave nothing of it, or there is no such sampling, or no loss
            that it is for.
    """

    def __init__(
        self,
        interchange: Interchange,
        *,
        sites: Sequence[SiteLike] | None = None,
        sampling: Sampling = "individual",
        weight: float = 1.0,
    ) -> None:
        if sampling not in get_args(Sampling):
            raise ValueError(f"siit_sampling: '{sampling}' is none of {', '.join(get_args(Sampling))}")
        if sampling != "individual" and not weight:
            raise ValueError(
                f"siit_sampling={sampling} has no effect: strict_weight is 0; give a weight, or leave it out"
            )
        self.interchange, self.sampling = interchange, sampling
        self.sites = interchange.sites if sites is None else plain_sites(sites, who="strict_sites")
        whole = [Placement(write=site) for site in self.sites if site not in interchange.sites]
        joined = interchange.join_positions
        # Whole activations are swapped whatever their size, which only joined positions are held against.
        sizes = known_features(interchange.network, whole, join_positions=True) if joined else [1] * len(whole)
        self._whole = {each.write: Outside(size) for each, size in zip(whole, sizes, strict=True)}
        left = {at.write for at in self.nodes(interchange.trained)}
        if sites is not None and (full := [site for site in self.sites if site not in left]):
            raise ValueError(
                f"strict_sites: the interventions at '{full[0]}' leave none of its coordinates, or take no source; "
                "leave it out, or give the variables fewer coordinates"
            )

    def nodes(self, interventions: Interventions) -> dict[Placement, Outside]:
        """What resamples each node, given the aligned interventions as they act."""
        found = {site: self._whole.get(site) or _rest(site, interventions) for site in self.sites}
        return {Placement(write=site): each for site, each in found.items() if each is not None}

    def drawn(self, step: int) -> dict[Placement, Outside]:
        """The nodes of a training step, the same in all processes and in a fit that is resumed."""
        nodes, random = self.nodes(self.interchange.trained), Random(step)
        if self.sampling == "individual":
            return dict([random.choice(list(nodes.items()))])
        return nodes if self.sampling == "all" else {at: each for at, each in nodes.items() if random.random() < 0.5}

    def answers(
        self, batch: CounterfactualBatch, nodes: Mapping[Placement, Outside]
    ) -> Float[Tensor, "batch ... vocabulary"]:
        """The answers on the bases, with these nodes as they are in the sources; of no nodes, those of the bases."""
        return self.interchange.network(batch.own) if not nodes else self.interchange(_first_sources(batch), nodes)


def _rest(site: Site, interventions: Interventions) -> Outside | None:
    """What swaps the coordinates of a site that none of its interventions swaps; None: there are none, or no telling.

    There is no telling what an edit without a source is aligned with.
    """
    found = [(at, each) for at, each in interventions.items() if at.write == site]
    size, soft = found[0][1].hidden_size, any(each.hardened() is not each for _, each in found)
    edits, ranks = [], {}
    for placement, each in found:
        blocks: Mapping[str, int] = getattr(each, "blocks", {})
        own = [name for name in placement.variables or () if name in blocks]
        edits += [each.edit_for(name) for name in own] or [each]
        # One that is shared by placements swaps the same coordinates for each.
        ranks |= {(each, name): blocks[name] for name in own} or {(each, ""): each.rank}
    rank = 0 if soft else sum(ranks.values())
    if rank >= size or not all(each.takes_source for _, each in found):
        return None
    return Outside(size, edits=edits, rank=rank)


def _first_sources(batch: CounterfactualBatch) -> CounterfactualBatch:
    """The batch where each pair interchanges the first of its variables alone, with a source that nothing edits."""
    firsts = [group[:1] for group in batch.groups]
    groups = tuple(sorted(set(firsts)))
    group = torch.tensor([groups.index(first) for first in firsts])[batch.group]
    sources = {name: _plain(source) for name, source in batch.sources.items() if (name,) in groups}
    return replace(batch, base=batch.own, sources=sources, groups=groups, group=group)


def _plain(inputs: ModelInputs) -> ModelInputs:
    if not isinstance(inputs, IntervenedInputs):
        return inputs
    return ModelInputs(**{each.name: getattr(inputs, each.name) for each in fields(ModelInputs) if each.init})
