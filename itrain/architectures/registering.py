"""Rows from outside: what a caller, a recipe or an export says of a model, as plain data that names no code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from itrain.architectures.parts import STREAM, Architecture, Component, Heads, grouped, interleaved, side_by_side, whole
from itrain.architectures.table import ARCHITECTURES
from itrain.layouts import OneRow
from itrain.sites import ATTENTION_WEIGHTS
from itrain.trust import shown

LAYOUTS = {"whole": whole, "side_by_side": side_by_side, "interleaved": interleaved, "grouped": grouped}
"""How attention heads lie in a component's columns: alone, or with others in a fused projection."""
PARTS = ("query", "key", "value")
ONE_ROW = "one_row"
"""The layout of tokens of all examples in a row."""
NEEDED = ("blocks", "causal", "components")
KEYS = (*NEEDED, "recurrent", "weights", "num_heads")
OF_COMPONENT = ("path", "end", "heads", "part", "layout")
MOST_HEADS = 10_000
_BOUND = "_itrain_row"
"""Where a model holds the row that was given with it."""
_NAME = re.compile(r"[a-z_]+")
_PATH = re.compile(r"[\w.]*(\|[\w.]+)*")


@dataclass(frozen=True, kw_only=True)
class GivenRow(Architecture):
    """A row from outside.

    Args:
        num_heads: how many attention heads a block has; None: what the model's configuration says.
        described: the row as plain data, by which rows are compared and saved.
    """

    num_heads: int | None = None
    described: Mapping[str, Any]


REGISTERED: dict[str, GivenRow] = {}
"""By a model_type, or by the path of a class of one's own."""


def register_architecture(of: str | type[nn.Module], row: Mapping[str, Any], *, replace: bool = False) -> None:
    """Give models that the table lacks named layers and components, in this process.

    ``{"blocks": "layers", "causal": True, "components": {"block_output": {"path": "", "end": "output"}, ...}}``

    ``blocks`` is the path of the list of blocks; ``causal`` says whether a token sees only itself and those before it.
    A component is the ``input`` or ``output`` (``end``) of the module at a ``path`` within the block, ``""`` for the
    block itself, under a name of :class:`Architecture` or another one. ``block_input`` and ``block_output`` are the
    block's own unless the row says otherwise. Where it holds attention heads, ``heads`` says
    how they lie: ``whole``, or ``side_by_side``, ``interleaved`` or ``grouped`` with a ``part``: query, key or value.
    The size of a head is read from ``attention_value_output``, their number from the configuration or ``num_heads``.
    ``layout: one_row`` is for modules that see the tokens of all examples in a row. ``recurrent`` and ``weights`` are
    those of :class:`Architecture`, and false unless said.

    Args:
        of: a ``model_type`` of transformers, or a class of one's own, which stands for its subclasses too.
        row: the row; to give the same twice is fine.
        replace: put it in the place of a row that there is.

    Raises:
        ValueError: something in the row is wrong, or there is another one; the message names the key.
    """
    if not isinstance(of, str) and not (isinstance(of, type) and issubclass(of, nn.Module)):
        raise ValueError(f"register_architecture: {shown(of)} is neither a model_type nor a class of modules")
    name = of if isinstance(of, str) else _path_of(of)
    given = parse_row(row, f"register_architecture: the row of '{name}'")
    there = row_of_type(name)
    if there is not None and not replace and described_row(there) != given.described:
        raise ValueError(
            f"register_architecture: '{name}' has another row, with blocks '{there.blocks}' and "
            f"{', '.join(there.components)}; add replace=True to put this one in its place"
        )
    REGISTERED[name] = given


def parse_row(row: Any, place: str) -> GivenRow:
    """A row from outside; messages name ``place`` and the key.

    Raises:
        ValueError: something in it is wrong.
    """
    _require_keys(row, KEYS, NEEDED, place)
    if not isinstance(row["components"], Mapping) or not row["components"]:
        raise ValueError(f"{place}: components: expected a mapping of names to path and end")
    components, described = dict(STREAM), {}
    for name, each in row["components"].items():
        where = f"{place}: components.{str(name)[:40]}"
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == ATTENTION_WEIGHTS:
            raise ValueError(f"{place}: components: {shown(name)} is no name of a component: small letters and _")
        components[name], described[name] = _component(each, where)
    flags = {key: _flag(row, key, place) for key in ("causal", "recurrent", "weights")}
    num_heads = row.get("num_heads")
    if num_heads is not None and (type(num_heads) is not int or not 1 <= num_heads <= MOST_HEADS):
        raise ValueError(f"{place}: num_heads: {shown(num_heads)} is not the number of a block's attention heads")
    if "attention_value_output" not in components and (found := [n for n, c in components.items() if c.heads]):
        raise ValueError(
            f"{place}: components.{found[0]}.heads: their size is read from attention_value_output; add it"
        )
    if flags["weights"] and "attention_input" not in components:
        raise ValueError(f"{place}: weights: they are those of the module of attention_input; add it")
    blocks = _path(row["blocks"], f"{place}: blocks")
    plain = {"blocks": blocks, "components": described, **flags}
    plain |= {} if num_heads is None else {"num_heads": num_heads}
    causal, recurrent, weights = flags.values()
    return GivenRow(
        blocks=blocks,
        causal=causal,
        recurrent=recurrent,
        weights=weights,
        components=components,
        num_heads=num_heads,
        described=plain,
    )


def row_of(model: nn.Module) -> Architecture | None:
    """The row of a model without wrappers: given with it, of its class, or of its ``model_type``."""
    if (bound := vars(model).get(_BOUND)) is not None:
        return bound
    # Sharding puts a class of its own before the model's.
    of_class = (REGISTERED.get(_path_of(each)) for each in type(model).__mro__)
    return next((each for each in of_class if each is not None), None) or row_of_type(model_type_of(model))


def row_of_type(name: str) -> Architecture | None:
    """The row of a ``model_type``, or of the path of a class."""
    return REGISTERED.get(name) or ARCHITECTURES.get(name)


def model_type_of(model: nn.Module) -> str:
    found = getattr(getattr(model, "config", None), "model_type", "")
    return found if isinstance(found, str) else ""


def bind_row(model: nn.Module, row: Architecture | None) -> None:
    """Give one model, without wrappers, a row; None leaves it the one that it has."""
    if row is not None:
        setattr(model, _BOUND, row)


def described_row(row: Architecture | None) -> dict[str, Any] | None:
    """A row from outside as plain data; None for rows of the table."""
    return dict(row.described) if isinstance(row, GivenRow) else None


def nearest(name: str, names: Iterable[str]) -> str:
    """The most similar name."""
    return difflib.get_close_matches(name[:200], list(names), n=1, cutoff=0.0)[0]  # of a stranger's, which may be long


def _component(given: Any, place: str) -> tuple[Component, dict[str, Any]]:
    """A component, and the same as plain data."""
    _require_keys(given, OF_COMPONENT, ("path", "end"), place)
    path = _path(given["path"], f"{place}.path", empty=True)
    end = _one_of(given["end"], ("input", "output"), f"{place}.end")
    heads: Heads | None = None
    plain = {"path": path, "end": end}
    if given.get("heads") is not None:
        plain["heads"] = name = _one_of(given["heads"], LAYOUTS, f"{place}.heads")
        if (given.get("part") is None) != (name == "whole"):
            says = "holds nothing else: leave part out" if name == "whole" else f"needs part: {', '.join(PARTS)}"
            raise ValueError(f"{place}.heads: a projection that is {name} {says}")
        heads = LAYOUTS[name]
        if name != "whole":
            plain["part"] = _one_of(given["part"], PARTS, f"{place}.part")
            heads = partial(LAYOUTS[name], part=PARTS.index(plain["part"]))
    elif given.get("part") is not None:
        raise ValueError(f"{place}.part: it is a part of fused heads; add heads: {', '.join(LAYOUTS)}")
    if given.get("layout") is not None:
        plain["layout"] = _one_of(given["layout"], (ONE_ROW,), f"{place}.layout")
    return Component(path, end, heads, layout=OneRow() if "layout" in plain else None), plain  # type: ignore[arg-type]


def _require_keys(given: Any, known: tuple[str, ...], needed: tuple[str, ...], place: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{place}: expected a mapping with {', '.join(needed)}, not {shown(given)}")
    if unknown := [str(key) for key in given if key not in known]:
        raise ValueError(f"{place}: unknown key {shown(unknown[0])}; did you mean '{nearest(unknown[0], known)}'?")
    if lacking := [key for key in needed if key not in given]:
        raise ValueError(f"{place}: it lacks '{lacking[0]}'")


def _one_of(value: Any, known: Iterable[str], place: str) -> str:
    names = list(known)
    if value not in names:
        raise ValueError(
            f"{place}: {shown(value)} is none of {', '.join(names)}; did you mean '{nearest(str(value), names)}'?"
        )
    return value


def _path(value: Any, place: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not _PATH.fullmatch(value) or not (value or empty):
        raise ValueError(f"{place}: {shown(value)} is no path of modules, as in mlp.down")
    return value


def _flag(row: Mapping[str, Any], key: str, place: str) -> bool:
    if not isinstance(found := row.get(key, False), bool):
        raise ValueError(f"{place}: {key}: {shown(found)} is neither true nor false")
    return found


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
