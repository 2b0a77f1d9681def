"""Under: interventions that act on the runs that probes read, as in amnesic probing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.utils import parametrize

from itrain.data import CounterfactualBatch
from itrain.data.splits import SplitDataModule
from itrain.devices import device_of
from itrain.interventions.base import Intervention
from itrain.networks.base import Network
from itrain.networks.lane import Edit
from itrain.placements import Placement
from itrain.sites import Site
from itrain.training.base import Training
from itrain.training.finite import require_finite
from itrain.training.interchange import Interchange, classes_of

Given: TypeAlias = Training | Callable[..., Interchange]
"""A trained module whose interventions act, or what makes an interchange of a network."""


class Under(nn.Module):
    """Interventions, frozen and as evaluated, under which a model is read.

    An intervention without a source acts on every base; one with sources on the bases that interchange its variable,
    which it takes from their sources.

    Args:
        given: a training of the same model, whose interventions are copied; or what builds an
            :class:`~itrain.training.interchange.Interchange` of a network, for example ``partial(Interchange,
            sites="layer2.block_output@last", intervention=Erasure)``, which is fitted in closed form.
        network: runs the model.

    Raises:
        ValueError: the training has no interventions that act on a frozen model's prompts by themselves, or is of
            another model.
    """

    known: Bool[Tensor, ""]
    """Whether the interventions are trained or fitted, or have been loaded."""

    def __init__(self, given: Given | str, network: Network) -> None:
        super().__init__()
        if isinstance(given, str):
            raise TypeError(f"under: load the export first: under=itrain.load('{given}', model)")
        self.factory = _factory(given) if isinstance(given, Training) else given
        """What builds the interventions again, without what they have learned."""
        self.interchange = _copied(given, network) if isinstance(given, Training) else _made(given, network)
        self.interchange.requires_grad_(False)
        self.fits = not isinstance(given, Training)
        """Whether closed-form statistics are fitted here."""
        self.register_buffer("known", torch.tensor(not self.fits))

    def __str__(self) -> str:
        return ", ".join(f"{type(each).__name__} at {place}" for place, each in self.interchange.trained.items())

    def require(self, data: SplitDataModule) -> None:
        """Refuse data in which the interventions cannot act; raises as ``data.require`` does."""
        trained = self.interchange.trained
        data.require([place if each.takes_source else Placement(write=place.write) for place, each in trained.items()])

    @torch.no_grad()
    def learn(self, batches: Sequence[CounterfactualBatch]) -> None:
        """Fit closed-form statistics to the bases, unless the interventions are those of a training.

        Several interventions are fitted in the order given, each in the run that those before it edit.
        """
        part = self.interchange
        self.to(device_of(part.network))  # a run reads before its trainer moves what it trains
        if not self.fits:
            return
        if len(set(part.trained.values())) < len(part.trained):
            part.learn(batches)  # one for all placements, which sees them all at once
        else:
            before: dict[Placement, Intervention] = {}
            for place, each in part.trained.items():
                if each.fits_activations:
                    self._fit(place, batches, before)
                before[place] = each.hardened()
        if not list(part.parameters()):
            self.known.fill_(True)

    def _fit(
        self, place: Placement, batches: Sequence[CounterfactualBatch], before: Mapping[Placement, Intervention]
    ) -> None:
        part, site, intervention = self.interchange, place.write, self.interchange.trained[place]
        found, classes = [], []
        for batch in (each.to(device_of(part.network)) for each in batches):
            activation = part.network.read(batch.base, [site], self._edits(batch, before))[site]
            rows, example = part.rows(activation, batch.base, site)
            found.append(rows)
            classes += [classes_of(batch, place, intervention)[example]] if intervention.needs_classes else []
        intervention.fit(require_finite(torch.cat(found), site), torch.cat(classes) if classes else None)

    def require_known(self) -> None:
        """Refuse interventions that are neither trained nor fitted.

        Raises:
            ValueError: naming them.
        """
        if not self.known:
            raise ValueError(
                f"under: {self} is learned, and here it is as it was made; give the training that has trained it"
            )

    @torch.no_grad()
    def read(self, batch: CounterfactualBatch, sites: Iterable[Site]) -> dict[Site, Tensor]:
        """What is read at the sites in the bases' run under the interventions."""
        network = self.interchange.network
        with network.unchanged(), parametrize.cached():
            return network.read(batch.base, sites, self._edits(batch, self.interchange.hardened()))

    def _edits(
        self, batch: CounterfactualBatch, interventions: Mapping[Placement, Intervention]
    ) -> list[tuple[Site, Edit]]:
        """The edits of the bases' run: of interventions without a source, then of those with sources."""
        part, taking, edits = self.interchange, {}, []
        for place, each in interventions.items():
            if each.takes_source:
                taking[place] = each
            else:
                edits.append((place.write, part.edit(each, None)))
        if taking:
            edits += part.edits(batch, taking, part.read(batch, taking))
        return edits


def _made(given: Callable[..., Interchange], network: Network) -> Interchange:
    """The interventions that a factory builds."""
    for name, each in inspect.signature(given).parameters.items():
        if each.default is each.empty and each.kind is each.KEYWORD_ONLY and name != "network":
            raise ValueError(f"under: {name} has no value; give it: under.{name}=<value>")
    made = given(network=network)
    if not isinstance(made, Interchange):
        raise ValueError(f"under: it makes a {type(made).__name__}; give partial(Interchange, ...)")
    return made


def _copied(training: Training, network: Network) -> Interchange:
    """The interventions of a training, for another network of its model."""
    part = getattr(training, "interchange", None)
    name = type(training).__name__
    if type(part) is not Interchange or training.trains_model:
        raise ValueError(
            f"under: {name} has no interventions that act by themselves on a frozen model; give an AlignmentSearch or "
            "a RepresentationFinetuning"
        )
    if getattr(training, "acts", "prompt") not in ("prompt", "all"):
        raise ValueError(f"under: the {name} edits generated tokens alone, and probes read prompts")
    if training.network.model is not network.model:
        raise ValueError(f"under: the {name} is of another model; load it onto this one: itrain.load(folder, model)")
    return deepcopy(part, {id(part.network): network})


def _factory(training: Training) -> Callable[..., Interchange]:
    taken = inspect.signature(Interchange).parameters
    return partial(Interchange, **{key: each for key, each in training.export_arguments().items() if key in taken})
