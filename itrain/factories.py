"""Factories as plain data: the import path of a class, and the arguments that it is given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from itrain.placements import Placement
from itrain.sites import Site
from itrain.trust import PARTNER, QuotingError, TrustError, find, shown

PLACES = ("sites", "partner_sites")
"""The arguments that are placements."""


class FactoryError(QuotingError):
    """A factory cannot be described, or a description cannot be turned into a factory."""


def describe(name: str, value: Any) -> Any:
    """An argument as plain data: placements by their sites, tensors as lists, a factory by its class, all else as is.

    Raises:
        FactoryError: a callable is neither a class of a module or optimizer nor a partial of one.
    """
    if name in PLACES:
        return [_described(each) for each in Placement.parse_all(value)]
    if isinstance(value, Site):
        return str(value)
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: describe(name, each) for key, each in value.items()}
    if not callable(value):
        return value
    value = getattr(value, "__wrapped__", value)
    cls, arguments = (value.func, dict(value.keywords)) if isinstance(value, functools.partial) else (value, {})
    makes_model = name == PARTNER and inspect.isfunction(cls)
    if not (makes_model or (isinstance(cls, type) and issubclass(cls, nn.Module | Optimizer))):
        raise FactoryError(
            f"give the {name} as a class or functools.partial(class, argument=...), so that it can be built again"
        )
    return {"class": class_path(cls), "arguments": {key: describe(key, each) for key, each in arguments.items()}}


def rebuild(name: str, value: Any, place: str, *, trust: Sequence[str] = ()) -> Any:
    """The argument that :func:`describe` described; messages name ``place``, where it was read.

    Raises:
        FactoryError: a class is not trusted, cannot be imported, or is not a module or an optimizer; or a site cannot
            be read.
    """
    if name in PLACES:
        return _placements(value, place, trust)
    if isinstance(value, dict) and value.keys() == {"class", "arguments"} and isinstance(value["arguments"], dict):
        arguments = {key: rebuild(key, each, place, trust=trust) for key, each in value["arguments"].items()}
        if name == PARTNER:
            return _maker(value["class"], arguments, place, trust)
        kind = Optimizer if name == "optimizer" else nn.Module
        return functools.partial(find_class(value["class"], name, kind, place, trust=trust), **arguments)
    if isinstance(value, dict):
        return {key: rebuild(name, each, place, trust=trust) for key, each in value.items()}
    return value


def as_node(described: Any) -> Any:
    """What :func:`describe` gave, in the form in which a configuration says it."""
    if isinstance(described, dict):
        if described.keys() == {"class", "arguments"}:
            return {"_target_": described["class"], "_partial_": True, **as_node(described["arguments"])}
        return {key: as_node(each) for key, each in described.items()}
    return [as_node(each) for each in described] if isinstance(described, list | tuple) else described


def _described(placement: Placement) -> Any:
    plain = placement.described()
    if placement.intervention is None:
        return plain
    node = {"site": plain} if isinstance(plain, str) else plain
    return {**node, "intervention": describe("intervention", placement.intervention)}


def _placements(value: Any, place: str, trust: Sequence[str]) -> list[Placement]:
    """The placements that a file describes, with the factories of their own interventions."""
    if not isinstance(value, list):
        raise FactoryError(f"{place}: sites: expected a list, not {shown(value)}")
    found: list[Placement] = []
    for each in value:
        node = each
        if isinstance(each, dict):
            node = {key: rebuild(key, part, place, trust=trust) for key, part in each.items()}
        try:
            found += Placement.parse_all(node)
        except (TypeError, ValueError) as error:
            raise FactoryError(f"{place}: {error}") from error
    for each in found:
        if not (each.intervention is None or callable(each.intervention)):
            raise FactoryError(f"{place}: site '{each}': its intervention is {shown(each.intervention)}, and no class")
    return found


def _maker(path: Any, arguments: Mapping[str, Any], place: str, trust: Sequence[str]) -> Callable[[], Any]:
    """What makes a model, and has made it: a module that holds it may be limited to the size of other weights."""
    # A room above this one.
    kinds = (nn.Module, import_module("itrain.models").BaseModel)
    try:
        make = functools.cache(
            functools.partial(find(path, kinds, role=PARTNER, trust=trust, place=place), **arguments)
        )
    except TrustError as error:
        raise FactoryError(str(error)) from error
    with limits_of_model(path, place):
        make()
    return make


def class_path(cls: type | FunctionType) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def find_class(path: Any, role: str, kind: type, place: str, *, trust: Sequence[str] = ()) -> Any:
    """The class at an import path.

    Raises:
        FactoryError: it is not trusted, cannot be imported, or is not of this kind.
    """
    try:
        return find(path, (kind,), role=role, trust=trust, place=f"'{place}'")
    except TrustError as error:
        raise FactoryError(str(error)) from error


class Limited(TorchFunctionMode):
    """Refuses to make tensors, within the context, that are far larger than the weights of a file need.

    Sizes in a file are numbers like others, while memory is taken before its weights can be compared with the module.

    Raises:
        FactoryError: more is asked for.
    """

    def __init__(self, elements: int, place: str) -> None:
        super().__init__()
        self.left, self.place = SPARE + 8 * elements, place

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        settings = kwargs or {}
        if func in _MAKERS:
            try:
                size = func(*args, **{**settings, "device": "meta", "pin_memory": False}).numel()
            except RuntimeError as error:
                raise FactoryError(f"'{self.place}' asks for a tensor that cannot be made: {error}") from error
            self.left -= size
            if self.left < 0:
                raise FactoryError(f"'{self.place}' asks for tensors that are far larger than its weights")
        return func(*args, **settings)


def limits_of_model(path: Any, place: str | Path | None) -> AbstractContextManager[object]:
    """A context in which none of itrain's own networks can be made that is large, where a file says how large it is."""
    if place is None or not str(path).startswith(("itrain.tasks.", "itrain.models.untrained.")):
        return nullcontext()
    return Limited(LARGEST_MODEL // 8, str(place))


LARGEST_MODEL = 2**28
"""Elements of such a network."""
SPARE = 2**24
"""Elements that may always be made, for example of models that are small."""
_MAKERS: frozenset[Callable[..., Tensor]] = frozenset(
    (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye, torch.arange, torch.linspace)
)
