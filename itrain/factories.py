"""Factories as plain data: the import path of a class, and the arguments that it is given."""

from __future__ import annotations

import functools
import importlib
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from itrain.sites import Site

Kind = TypeVar("Kind")


class FactoryError(ValueError):
    """A factory cannot be described, or a description cannot be turned into a factory."""


def describe(name: str, value: Any) -> Any:
    """An argument as plain data: sites by name, a factory as its class path and arguments, all else as it is.

    Raises:
        FactoryError: a callable is neither a class of a module or optimizer nor a partial of one.
    """
    if name == "sites":
        return [str(site) for site in Site.parse_all(value)]
    if isinstance(value, Site):
        return str(value)
    if not callable(value):
        return value
    cls, arguments = (value.func, dict(value.keywords)) if isinstance(value, functools.partial) else (value, {})
    if not (isinstance(cls, type) and issubclass(cls, nn.Module | Optimizer)):
        raise FactoryError(
            f"give the {name} as a class or functools.partial(class, argument=...), so that it can be built again"
        )
    return {"class": class_path(cls), "arguments": {key: describe(key, each) for key, each in arguments.items()}}


def rebuild(name: str, value: Any, place: str) -> Any:
    """The argument that :func:`describe` described; messages name ``place``, where it was read.

    Raises:
        FactoryError: the class cannot be imported, or is not a module or an optimizer.
    """
    if name == "sites":
        return [Site.parse(site) for site in value]
    if isinstance(value, dict) and value.keys() == {"class", "arguments"}:
        arguments = {key: rebuild(key, each, place) for key, each in value["arguments"].items()}
        cls: Any = find_class(value["class"], name, Optimizer if name == "optimizer" else nn.Module, place)
        return functools.partial(cls, **arguments)
    return value


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def find_class(path: str, role: str, kind: type[Kind], place: str) -> type[Kind]:
    """The class at an import path.

    Raises:
        FactoryError: it cannot be imported, or is not of this kind.
    """
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise FactoryError(f"'{place}' needs the {role} {path}, which cannot be imported here") from error
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise FactoryError(f"'{place}' names {path}, which is no {role}")
    return cls
