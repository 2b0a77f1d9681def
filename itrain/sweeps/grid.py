"""The grid of a sweep, and its fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from itrain.architectures import blocks, locate
from itrain.experiment import Opened
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.sites import Site
from itrain.training.base import Training
from itrain.training.probing import ProbeTraining


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The methods, sites, ranks and seeds of a sweep.

    Args:
        methods: interventions and probe trainings, by name.
        layers: ``all``, ``every(2)`` from the last one down, or numbers.
        positions: ``all``, for the tokens that the task names, the first and the last; or a list, also of whole spans.
        components: the components of each layer.
        window: layers that are edited together, centred on each: of all components, or for some of them by name.
        ranks: for the methods that have one.
        seeds: each gives its own data, model and start.
        patience: epochs without a lower validation loss after which a fit stops; None: all go to the end.
        random_model: whether what is trained is fitted once more on a randomly initialised model, as a control.
        words: as typed on the command line, for the commands that repeat single fits.

    Raises:
        ValueError: the layers cannot be read, something is empty, or a window is less than 1 layer or one of probes.
    """

    methods: Mapping[str, Callable[..., Intervention] | Callable[..., Training]]
    layers: str | Sequence[int] = "all"
    positions: str | Sequence[str] = "all"
    components: Sequence[str] = ("block_output",)
    window: int | Mapping[str, int] = 1
    ranks: Sequence[int] = (1,)
    seeds: Sequence[int] = (0,)
    patience: int | None = None
    random_model: bool = True
    words: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("methods", "layers", "positions", "components", "ranks", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"sweep.{name} is empty")
        if isinstance(self.layers, str) and self.layers != "all" and not re.fullmatch(r"every\(\d+\)", self.layers):
            raise ValueError(f"sweep.layers: '{self.layers}' is none of all, every(2), or a list such as [3,5]")
        if any(self.width(component) < 1 for component in self.components):
            raise ValueError(f"sweep.window: a window has 1 layer or more; got {self.window}")
        probes = [name for name, method in self.methods.items() if reads_only(method)]
        if probes and any(self.width(component) > 1 for component in self.components):
            raise ValueError(f"sweep.window: {probes[0]} reads one layer; leave it out, or the window")

    def width(self, component: str) -> int:
        """The number of layers that are edited together."""
        return self.window if isinstance(self.window, int) else self.window.get(component, 1)

    def sites(self, opened: Opened) -> list[Site]:
        """Layer by layer, the sites of all methods, each the centre of its window."""
        count = len(blocks(opened.network.model))
        layers = list(range(count)) if isinstance(self.layers, str) else list(self.layers)
        if isinstance(self.layers, str) and self.layers != "all":
            step = int(self.layers[len("every(") : -1])
            layers = sorted(range(count - 1, -1, -step))
        if outside := [layer for layer in layers if not 0 <= layer < count]:
            raise ValueError(f"sweep.layers: there is no layer {outside[0]}; the model has 0 to {count - 1}")
        # A window may be given for components that this sweep leaves out, but not for one that the model lacks.
        for component in () if isinstance(self.window, int) else self.window:
            locate(opened.network.model, Site(layer=0, component=component))
        examples = opened.data.edited()[0]
        positions = tokens_of(examples) if isinstance(self.positions, str) else list(self.positions)
        return [
            Site(layer=layer, component=component, position=position)
            for layer in layers
            for component in self.components
            for position in positions
        ]

    def together(self, site: Site, count: int) -> list[Site]:
        """The sites of the window around a site, as far as the model's ``count`` layers go."""
        assert site.layer is not None, "a sweep goes over layers"
        width = self.width(site.component)
        start = site.layer - width // 2
        return [replace(site, layer=layer) for layer in range(max(start, 0), min(start + width, count))]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One row of the table, before it is fitted."""

    group: str
    method: str
    site: Site
    sites: Sequence[Site]
    """The sites of the window around the site."""
    rank: int | None
    seed: int

    @property
    def name(self) -> str:
        rank = "" if self.rank is None else f" rank{self.rank}"
        return f"{self.method} {self.site}{rank}".replace(".", "_")


def tokens_of(examples: ModelInputs) -> list[str]:
    """Positions of one token each, in order: the first token, the last, and the last of each span."""
    assert examples.tokens is not None, "positions are those of tokens"
    first, end = examples.tokens.unbind(1)
    named = {
        name if bool((span[:, 1] - span[:, 0] == 1).all()) else f"{name}.last": span[:, 1] - 1
        for name, span in examples.spans.items()
    }
    places = {"first": first, **named, "last": end - 1}
    # A span that is the first or the last token in all examples stands for it.
    doubled = [edge for edge in ("first", "last") if any(torch.equal(places[edge], named[name]) for name in named)]
    order = {name: float((place - first).float().mean()) for name, place in places.items() if name not in doubled}
    return sorted(order, key=lambda name: order[name])


def is_training(factory: Callable[..., Any]) -> bool:
    """Whether a method is a training of its own, and no intervention of the configuration's training."""
    return _makes(factory, Training)


def reads_only(factory: Callable[..., Any]) -> bool:
    """Whether a method trains probes, whose sites share a fit."""
    return _makes(factory, ProbeTraining)


def _makes(factory: Callable[..., Any], kind: type) -> bool:
    target = factory.func if isinstance(factory, partial) else factory
    return isinstance(target, type) and issubclass(target, kind)
