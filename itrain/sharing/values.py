"""The weights of a module as an export holds them: parametrised ones by their values, all of them finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from itrain.interventions.base import otherwise
from itrain.interventions.orthogonal import OrthonormalRows
from itrain.shards import divided
from itrain.sharing.reading import ExportError

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Precisions in which weights are read; they are cast to that of the module."""
UNEVEN = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far R R^T may be from 1 for rounding alone, where it is more than 1e-3."""


def fill(module: nn.Module, weights: Mapping[str, Tensor], place: str) -> None:
    """Set weights of a module, parametrised ones by their values.

    Raises:
        ExportError: a weight is not finite, has rows that are not orthonormal where they must be, or is the fingerprint
            of something else than what is here.
    """
    places = {name: _place(module, name) for name in weights}
    there = {name: getattr(*owned) for name, owned in places.items()}
    cast_weights = {name: weight.to(there[name].device, there[name].dtype) for name, weight in weights.items()}
    require_finite(cast_weights, module, place)  # what is large in fp64 is infinite in fp32
    for name, (owner, leaf) in places.items():
        if _is_orthonormal(owner, leaf):
            _require_orthonormal(weights[name], f"{place}: '{name}'")
        if (other := otherwise(owner, leaf, weights[name])) is not None:
            raise ExportError(f"{place}: {other}")
    with torch.no_grad():
        for name, (owner, leaf) in places.items():
            if parametrize.is_parametrized(owner, leaf):
                setattr(owner, leaf, cast_weights[name])
            else:
                there[name].copy_(divided(cast_weights[name], there[name]))


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _is_orthonormal(owner: nn.Module, leaf: str) -> bool:
    if not parametrize.is_parametrized(owner, leaf):
        return False
    (*_, last) = cast(Any, owner.parametrizations)[leaf]
    return isinstance(last, OrthonormalRows)


def require_finite(weights: Mapping[str, Tensor], module: nn.Module, place: str) -> None:
    for name, weight in weights.items():
        if not weight.is_floating_point():
            continue
        owner, leaf = _place(module, name)
        # Infinity in a buffer is a mask or a bound.
        found = weight.isnan() if leaf in owner._buffers else ~weight.isfinite()
        if found.any():
            raise ExportError(f"{place}: the weight '{name}' is not finite; the training that made it went wrong")


def _require_orthonormal(rows: Tensor, place: str) -> None:
    """Refuse rows that setting them would turn into others, without a word."""
    exact = rows.double()
    apart = float((exact @ exact.T - torch.eye(len(exact), dtype=exact.dtype)).abs().max())
    if apart > UNEVEN.get(rows.dtype, 1e-3):
        raise ExportError(f"{place} has rows that are not orthonormal (R R^T is {apart:.2g} from 1); it is damaged")


def saved_lately(module: nn.Module) -> set[str]:
    """The weights that earlier versions did not save, and that keep their initial values without them."""
    return {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        for name in getattr(part, "lately", ())
    }


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, with the value of each parametrised weight under its own name."""
    state = {name: tensor for name, tensor in module.state_dict().items() if "parametrizations." not in name}
    for path, owner in module.named_modules():
        if parametrize.is_parametrized(owner):
            leaves = cast(nn.ModuleDict, owner.parametrizations)
            state |= {f"{path}.{leaf}" if path else leaf: getattr(owner, leaf) for leaf in leaves}
    return state
