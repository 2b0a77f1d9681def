"""The grid of a sweep, and its fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from itrain.architectures import architecture, blocks, has, heads_of, locate
from itrain.bounds import require_at_least
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.opening import Opened
from itrain.placements import plain_sites
from itrain.results.columns import STEP, WHOLE
from itrain.sites import Site, SiteLike
from itrain.training.base import Training
from itrain.training.detecting import names_of
from itrain.training.monitoring import Monitoring
from itrain.training.probing import ProbeTraining

WHOLE_TEXT = "all"
"""The position of all tokens of a text."""
HEADS = ".heads"
"""The end of a component each of whose heads is meant."""
_OF_STACK = re.compile(r"([a-z]+\.)((?!head\d)[a-z_]+(?:\.head\d+)?)")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The methods, sites, ranks and seeds of a sweep.

    Args:
        methods: interventions, and trainings of probes or detectors, by name.
        layers: ``all``, ``every(2)`` from the last one down, or numbers.
        positions: ``all``, for the tokens that the task names, the first and the last, or, where its inputs have no
            tokens, for whole activations; of detectors also for all tokens of a text together, and for no token that
            they leave out; or a list, also of whole spans.
        components: the components of each layer, also of one head: ``attention_value_output.head3``, or of each of its
            heads: ``attention_value_output.heads``.
        sites: in place of these three: whole sites, such as the modules of a model that the table of architectures
            lacks, and their calls: ``module:cell.output.step2``.
        window: layers that are edited together, centred on each: of all components, or for some of them by name.
        ranks: for the methods that have one.
        seeds: each gives its own data, model and start.
        patience: epochs without a lower validation loss after which a fit stops; None: all go to the end.
        control_task: whether all interventions are fitted and tested once more on the task's control task, whose labels
            are arbitrary, for the selectivity of their odds.
        random_model: whether what is trained is fitted once more on a randomly initialised model, as a control.
        words: as typed on the command line, for the commands that repeat single fits.
        named: whether the methods are choices of a configuration's groups, which those commands name.

    Raises:
        ValueError: the layers cannot be read, something is empty or listed twice, sites are named in both ways, a
            method cannot have its name or is of the trained model alone, or a window is less than 1 layer or one of
            probes.
    """

    methods: Mapping[str, Callable[..., Intervention] | Callable[..., Training]]
    layers: str | Sequence[int] = "all"
    positions: str | Sequence[str | int] = "all"
    components: Sequence[str] = ("block_output",)
    sites: Sequence[SiteLike] = ()
    window: int | Mapping[str, int] = 1
    ranks: Sequence[int] = (1,)
    seeds: Sequence[int] = (0,)
    patience: int | None = None
    control_task: bool = False
    random_model: bool = True
    words: Sequence[str] = ()
    named: bool = True

    def __post_init__(self) -> None:
        for name in ("methods", "layers", "positions", "components", "ranks", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"sweep.{name} is empty; name one or more")
        for name in ("layers", "positions", "components", "sites", "ranks", "seeds"):
            _require_once(name, getattr(self, name))
        for method in self.methods:
            # The fits of a layer, too, are kept under a name.
            if not re.fullmatch(r"\w[\w-]*", method) or re.fullmatch(r"layer\d+", method):
                raise ValueError(f"sweep.methods: '{method}' is no name of a method; use letters, digits, '_' and '-'")
        for name, factory in self.methods.items() if self.random_model else ():
            if isinstance(getattr(factory, "keywords", {}).get("under"), str):
                raise ValueError(
                    f"sweep.methods.{name}.under: an export belongs to the model that it was trained on, not to a "
                    "random one; add sweep.random_model=false"
                )
        self._require_layers()
        require_at_least(1, **{"sweep.ranks": min(self.ranks), "sweep.patience": self.patience})
        require_at_least(0, **{"sweep.seeds": min(self.seeds)})
        if max(self.seeds) >= 2**32:
            raise ValueError(f"sweep.seeds: expected 0 to {2**32 - 1}, not {max(self.seeds)}")
        for component in (each.removesuffix(HEADS) for each in self.components if each.endswith(HEADS)):
            if one := [
                each for each in self.components if each.startswith(f"{component}.head") if each != component + HEADS
            ]:
                raise ValueError(f"sweep.components: {one[0]} is one of {component}{HEADS}; leave one of them out")
        if isinstance(self.positions, str) and self.positions != "all":
            raise ValueError(f"sweep.positions: '{self.positions}' is neither all nor a list such as [name,last]")
        if any(self.width(component) < 1 for component in self.components):
            raise ValueError(f"sweep.window: a window has 1 layer or more; got {self.window}")
        probes = [name for name, method in self.methods.items() if reads_only(method)]
        if probes and any(self.width(component) > 1 for component in self.components):
            raise ValueError(f"sweep.window: {probes[0]} reads one layer; leave it out, or the window")
        for name in probes:
            if getattr(self.methods[name], "keywords", {}).get("join_sites"):
                raise ValueError(
                    f"sweep.methods.{name}.join_sites: a sweep compares sites, each by itself; leave it out, or join "
                    "sites in a fit of its own"
                )

    def _require_layers(self) -> None:
        layers = self.layers
        if self.sites:
            usual = {"layers": "all", "positions": "all", "components": ["block_output"], "window": 1}
            for name, value in usual.items():
                given = getattr(self, name)
                if (list(given) if name == "components" else given) != value:
                    raise ValueError(f"sweep.sites names whole sites, and sweep.{name}={given} has no effect; drop one")
        if isinstance(layers, str):
            if layers != "all" and not re.fullmatch(r"every\([1-9]\d*\)", layers):
                raise ValueError(f"sweep.layers: '{layers}' is none of all, every(2), or a list such as [3,5]")
        elif wrong := [layer for layer in layers if not isinstance(layer, int) or isinstance(layer, bool)]:
            raise ValueError(f"sweep.layers: '{wrong[0]}' is not the number of a layer")

    @property
    def names_modules(self) -> bool:
        """Whether some sites are modules named by their paths."""
        return any(Site.parse(site).layer is None for site in self.sites)

    def width(self, component: str) -> int:
        """The number of layers that are edited together."""
        if isinstance(self.window, int):
            return self.window
        return self.window.get(component, self.window.get(component.split(".")[0], 1))

    def all_sites(self, opened: Opened) -> list[Site]:
        """The sites of all methods, layer by layer, each the centre of its window.

        Raises:
            ValueError: the model lacks a layer, a module or a component, or has no layers and no sites are named.
        """
        model = opened.network.model
        if self.sites:
            named = list(Site.parse_all(self.sites))
            for site in named:
                locate(model, site)
            return named
        if architecture(model) is None:
            try:
                blocks(model)
            except ValueError as error:
                raise ValueError(f"{error}, in a sweep by sweep.sites=[...]") from error
        # A window may be given for components that this sweep leaves out, but not for one that the model lacks.
        for component in () if isinstance(self.window, int) else self.window:
            layers_with(model, component.removesuffix(HEADS))
        layers = {component: self._layers_of(model, component) for component in self.components}
        every = [layer for found in layers.values() for layer in found]
        # Numbers on a command line are no text.
        positions = self._of_texts(opened) if isinstance(self.positions, str) else list(map(str, self.positions))
        suffixes = [f"@{position}" for position in positions] or [""]
        return [
            Site.parse(f"{activation}{suffix}")
            for layer in (sorted(set(every)) if isinstance(self.layers, str) else self.layers)
            for component in self.components
            if layer in layers[component]
            for activation in _activations(model, layer, component)
            for suffix in suffixes
        ]

    def _of_texts(self, opened: Opened) -> list[str]:
        """The positions of a task's texts; of detectors first all tokens, then those that they count."""
        examples = opened.data.edited()[0]
        if not all(map(detects, self.methods.values())):
            return tokens_of(examples)
        left = getattr(opened.base_model.tokenizer, "all_special_ids", ())
        return [WHOLE_TEXT, *tokens_of(examples, without=left)]

    def _layers_of(self, model: nn.Module, component: str) -> list[int]:
        """The layers of a component: those that are listed, or those of its stack of blocks that have it.

        Raises:
            ValueError: a listed layer does not exist or lacks the component, or all layers lack it.
        """
        name = component.removesuffix(HEADS)
        having, count = layers_with(model, name), len(_blocks_of(model, name))
        if isinstance(self.layers, str):
            step = 1 if self.layers == "all" else int(self.layers[len("every(") : -1])
            return [layer for layer in having if (count - 1 - layer) % step == 0]
        for layer in self.layers:
            if not 0 <= layer < count:
                raise ValueError(f"sweep.layers: there is no layer {layer}; the model has 0 to {count - 1}")
            locate(model, Site.parse(_in_layer(layer, name)))
        return list(self.layers)

    def left_out(self, model: nn.Module) -> list[str]:
        """For each component that only some of the layers have, a line that says which layers the sweep goes over."""
        if self.sites or not isinstance(self.layers, str):
            return []
        found = {component: layers_with(model, component.removesuffix(HEADS)) for component in self.components}
        return [
            f"{component} is in layers {', '.join(map(str, having))} only; the sweep leaves out the others"
            for component, having in found.items()
            if len(having) < len(_blocks_of(model, component))
        ]

    def together(self, site: Site, layers: Collection[int]) -> list[Site]:
        """The sites of the window around a site, as far as there are layers that have its component."""
        if site.layer is None:
            return [site]
        width = self.width(site.component)
        start = site.layer - width // 2
        return [replace(site, layer=layer) for layer in range(start, start + width) if layer in layers]


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
    detector: str = ""
    """The detector of a training that fits several at a site."""

    @property
    def label(self) -> str:
        """The method as the table names it: of detectors each is one."""
        return f"{self.method}_{self.detector}" if self.detector else self.method

    @property
    def name(self) -> str:
        rank = "" if self.rank is None else f" rank{self.rank}"
        # A module's name may hold no dots, and no site holds another colon.
        return f"{self.label} {self.site}{rank}".replace(".", ":")

    @property
    def place(self) -> tuple[str, str, str]:
        """Its component, layer and position in the table; of a module of one's own its path, and the call it means."""
        site = self.site
        of_head = "" if site.head is None else f".head{site.head}"
        if site.layer is None:
            calls = [] if site.step is None else [f"{STEP}{site.step}"]
            places = [site.position] if site.position else []
            return "module", site.component.removeprefix("module:"), ", ".join([*calls, *places]) or WHOLE
        of_step = "" if site.step is None else f".step{site.step}"
        return f"{site.component}{of_head}{of_step}", str(site.layer), site.position or WHOLE


def _in_layer(layer: int, component: str) -> str:
    """The site of a component; of a model of several stacks of blocks the component names the stack first."""
    stack, name = found.groups() if (found := _OF_STACK.fullmatch(component)) else ("", component)
    return f"{stack}layer{layer}.{name}"


def _blocks_of(model: nn.Module, component: str) -> nn.ModuleList:
    """The blocks of the stack that a component names, or of the model."""
    row, stack = architecture(model), component.partition(".")[0]
    return blocks(model, stack if row is not None and stack in row.stacks else None)


def layers_with(model: nn.Module, component: str) -> list[int]:
    """The layers that have a component, of its stack where the model has several.

    Raises:
        ValueError: none has it.
    """
    sites = [Site.parse(_in_layer(layer, component)) for layer in range(len(_blocks_of(model, component)))]
    found = [layer for layer, site in enumerate(sites) if has(model, site)]
    if not found:
        locate(model, sites[0])  # which says why
    return found


def _activations(model: nn.Module, layer: int, component: str) -> list[str]:
    """The site of a component, or of each of its heads."""
    whole = _in_layer(layer, component.removesuffix(HEADS))
    if not component.endswith(HEADS):
        return [whole]
    return [f"{whole}.head{head}" for head in range(heads_of(model, Site.parse(whole)))]


def tokens_of(examples: ModelInputs, *, without: Collection[int] = ()) -> list[str]:
    """Positions of one token each, in order: the first token, the last, and the last of each span; or no tokens'.

    Leaves out positions at which some text has one of the tokens ``without``.
    """
    if examples.tokens is None:
        return []
    first, end = examples.tokens.unbind(1)
    named = {
        name if bool((span[:, 1] - span[:, 0] == 1).all()) else f"{name}.last": span[:, 1] - 1
        for name, span in examples.spans.items()
    }
    places = {"first": first, **named, "last": end - 1}
    # A span that is the first or the last token in all examples stands for it.
    doubled = [edge for edge in ("first", "last") if any(torch.equal(places[edge], named[name]) for name in named)]
    if without:
        ids, left = examples.arguments["input_ids"], torch.tensor(list(without))
        doubled += [name for name, at in places.items() if torch.isin(ids.gather(1, at[:, None]), left).any()]
    order = {name: float((place - first).float().mean()) for name, place in places.items() if name not in doubled}
    return sorted(order, key=lambda name: order[name])


def _require_once(name: str, values: object) -> None:
    """Refuse what is listed twice: its second fits would count as if they were of another seed."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        return
    said = [str(_plain(value) if name == "sites" else value) for value in values]
    if twice := [each for place, each in enumerate(said) if each in said[:place]]:
        raise ValueError(f"sweep.{name}: {twice[0]} is listed twice; leave one of them out")


def _plain(site: SiteLike) -> Site:
    """A site of a sweep, which compares where one intervention acts."""
    try:
        (found,) = plain_sites(site, who="a sweep")
    except ValueError as error:
        raise ValueError(f"sweep.sites: {error}") from error
    return found


def is_training(factory: Callable[..., Any]) -> bool:
    """Whether a method is a training of its own, and no intervention of the configuration's training."""
    return _makes(factory, Training)


def reads_only(factory: Callable[..., Any]) -> bool:
    """Whether a method trains probes or detectors, whose sites share a fit."""
    return _makes(factory, ProbeTraining) or detects(factory)


def detects(factory: Callable[..., Any]) -> bool:
    """Whether a method trains detectors of labelled texts."""
    return _makes(factory, Monitoring)


def detectors_of(factory: Callable[..., Any]) -> list[str]:
    """The names of what a method trains at each site and a row is about: its detectors, or itself."""
    return names_of(getattr(factory, "keywords", {}).get("detectors")) if detects(factory) else [""]


def _makes(factory: Callable[..., Any], kind: type) -> bool:
    target = factory.func if isinstance(factory, partial) else factory
    return isinstance(target, type) and issubclass(target, kind)
