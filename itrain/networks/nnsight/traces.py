"""Traces: one run of a model under nnsight, with a block of its own for each place that is read or edited.

nnsight runs a block beside the model's forward, in the order in which the block asks for modules. In what order a
model calls its modules is not known here, so that each place gets a block of its own. A block's text is taken from this
file; all that it does is a call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

from itrain.networks.nnsight.library import load_nnsight
from itrain.networks.planned import Planned, on_input, on_output


class Tree:
    """nnsight's view of a model, whose wrappers are around the modules' forwards during runs alone.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        before = {module: dict(module.__dict__) for module in model.modules()}
        with warnings.catch_warnings():
            # Modules are found by what they are, so that it does not matter by what name nnsight calls them.
            warnings.filterwarnings("ignore", message=".*has a submodule named")
            self.traced = load_nnsight().NNsight(model)
        self._own = {module: attributes.get("forward") for module, attributes in before.items()}
        self._added = {
            module: {name: value for name, value in module.__dict__.items() if attributes.get(name) is not value}
            for module, attributes in before.items()
        }
        self._envoys = {envoy._module: envoy for envoy in self.traced.modules()}
        for module, added in self._added.items():
            _put(module, {name: before[module].get(name) for name in added})

    @property
    def current(self) -> bool:
        """Whether the model still has these modules, with these forwards."""
        modules = list(self.model.modules())
        return len(modules) == len(self._own) and all(
            module in self._own and module.__dict__.get("forward") is self._own[module] for module in modules
        )

    def envoy(self, module: nn.Module) -> Any:
        """nnsight's view of a module of the model."""
        return self._envoys[module]

    @contextmanager
    def wrapped(self) -> Iterator[Any]:
        """Within it, nnsight's wrappers are around the forwards; gives its view of the model."""
        for module, added in self._added.items():
            module.__dict__.update(added)
        try:
            yield self.traced
        finally:
            for module, added in self._added.items():
                _put(module, dict.fromkeys(added) | {"forward": self._own[module]})


def _put(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Set attributes of the module itself, or take them away where None is given."""
    for name, value in attributes.items():
        if value is None:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = value


@dataclass(eq=False, kw_only=True)
class Place:
    """One end of a module, with what acts there in the order given.

    Args:
        envoy: nnsight's view of the module.
        module: the module.
        end: ``input`` or ``output``.
        step: which of the module's calls is meant; None: the first.
        each: whether each of its calls is meant.
    """

    envoy: Any
    module: nn.Module
    end: str
    step: int | None = None
    each: bool = False
    acting: list[Callable[[Any], Any]] = field(default_factory=list)

    def act(self, tracer: Any) -> None:
        """Wait for the call that is meant, or for each, and have all act in it; run within a trace."""
        if self.each:
            for _ in tracer.iter[:]:
                self._once()
        elif self.step:
            for _ in tracer.iter[self.step : self.step + 1]:
                self._once()
        else:
            self._once()

    def _once(self) -> None:
        if self.end == "output":
            output = on_output(self.acting, self.module, (), self.envoy.output)
            if output is not None:
                self.envoy.output = output
        else:
            inputs = on_input(self.acting, self.module, *self.envoy.inputs)
            if inputs is not None:
                self.envoy.inputs = inputs

    @property
    def location(self) -> str:
        """What nnsight calls the place."""
        return f"{self.envoy.path}.{self.end}"


def trace(tree: Tree, forward: Callable[[], Any], places: Sequence[Place]) -> Any:
    """The result of a forward in which all act at their places.

    Raises:
        RuntimeError: a place was not reached, or was reached several times and none of the calls was named.
    """
    found: list[Any] = []
    counts = tree.traced.interleaver.counts
    before = [counts.get(place.location, 0) for place in places]
    with warnings.catch_warnings():
        # Blocks for each call of a module wait for another one when the run ends.
        warnings.filterwarnings("ignore", message=".*was never reached: the loop asked")
        late = _run(tree, forward, places, found)
    for place, was in zip(places, before, strict=True):
        _require_reached(place, counts.get(place.location, 0) - was, late)
    if late is not None:
        raise late
    return found[0]


def _run(tree: Tree, forward: Callable[[], Any], places: Sequence[Place], found: list[Any]) -> Exception | None:
    """Run the forward and append its result; return the error of a place that was not reached."""
    try:
        with tree.wrapped() as traced, traced.trace(fn=forward) as tracer:
            for place in places:
                with tracer.invoke():
                    place.act(tracer)
            with tracer.invoke():
                found.append(tracer.result)
    except _out_of_order() as error:
        return error
    return None


def _out_of_order() -> type[Exception]:
    return import_module("nnsight.intervention.interleaver").OutOfOrderError


def _require_reached(place: Place, calls: int, late: Exception | None) -> None:
    for each in place.acting:
        if not isinstance(each, Planned):
            continue
        if each.done and each.site.step is None and calls > 1:
            raise each.repeated()
        if not each.done:
            each.calls = calls
            raise each.missing() from late
