"""Streams weights from files into shards: no process ever holds a whole model.

Transformers' own loader does the work. As it puts a weight into the model, the weight is replaced by one without values
(on the meta device), and only this process's part of the values is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from itrain.models.base import ModelError
from itrain.shards import assembled, is_sharded, part_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Shard = Callable[[nn.Module], object]
"""Divides a model's weights among processes in place; the weights may be on the meta device."""

_shard: ContextVar[Shard | None] = ContextVar("shard", default=None)
_PART = "_itrain_part"
"""Where a weight without values holds this process's part of them."""


class _Layout(NamedTuple):
    """How a weight is divided: among which processes, and along which dimensions."""

    mesh: DeviceMesh
    placements: Sequence[Any]


@contextmanager
def sharded_by(shard: Shard) -> Iterator[None]:
    """Within it, models are loaded from files into the shards that ``shard`` makes."""
    token = _shard.set(shard)
    try:
        yield
    finally:
        _shard.reset(token)


@contextmanager
def whole_in_each() -> Iterator[None]:
    """Within it, each process loads whole models."""
    token = _shard.set(None)
    try:
        yield
    finally:
        _shard.reset(token)


def sharding() -> bool:
    """Whether models are loaded into shards just now."""
    return _shard.get() is not None


@contextmanager
def streaming() -> Iterator[None]:
    """Within it, transformers' loader leaves this process's part of each weight in the model, if models are sharded.

    :func:`place_shards` makes shards of the parts.
    """
    shard = _shard.get()
    if shard is None:
        yield
        return
    cutting = _Cutting(shard)
    with ExitStack() as after:
        for hook in (
            register_module_module_registration_hook(cutting.note),
            register_module_parameter_registration_hook(cast(Any, cutting.cut)),
        ):
            after.callback(hook.remove)
        after.enter_context(_one_at_a_time())
        yield


def place_shards(model: nn.Module, name: str) -> str | None:
    """Divide a model that was loaded while streaming, in place; return the path of a weight that has no values.

    Nothing is done where models are not sharded.

    Raises:
        ModelError: the model is quantised, or lies on several devices.
    """
    shard = _shard.get()
    if shard is None:
        return None
    for attribute, how in (("hf_quantizer", "quantised"), ("hf_device_map", "spread over devices")):
        if getattr(model, attribute, None) is not None:
            raise ModelError(
                f"model '{name}': it is {how}, and such a model cannot be sharded over processes; use one process, or "
                "leave that out"
            )
    parts = {path: getattr(each, _PART, None) for path, each in model.named_parameters(remove_duplicate=False)}
    shard(model)
    weights: list[tuple[str, Any]] = list(model.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    for path, empty in weights:
        if not empty.is_meta:
            continue
        if id(empty) not in made:
            part = parts[path]
            if part is None or not is_sharded(empty) or part.shape != empty.to_local().shape:
                return path
            made[id(empty)] = nn.Parameter(assembled(part, empty), requires_grad=empty.requires_grad)
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[id(empty)])
    return None


class _Cutting:
    """Cuts the weights of a model as they are loaded."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._owners: dict[nn.Module, tuple[nn.Module, str]] = {}
        self._layouts: dict[str, _Layout] | None = None

    def note(self, owner: nn.Module, name: str, module: nn.Module | None) -> None:
        """A module was put into another."""
        if module is not None:
            self._owners[module] = (owner, name)

    def cut(self, module: nn.Module, name: str, weight: nn.Parameter | None) -> nn.Parameter | None:
        """A weight was put into a module: what to put there in its place, None for the weight itself."""
        # What is not marked as loaded is yet to be drawn or computed, for which it must be whole.
        if type(weight) is not nn.Parameter or weight.is_meta or not getattr(weight, "_is_hf_initialized", False):
            return None
        path = [name]
        while module in self._owners:
            module, part = self._owners[module]
            path.insert(0, part)
        if self._layouts is None:
            self._layouts = _layouts(module, self._shard)
        layout = self._layouts.get(".".join(path))
        if layout is None:
            return None
        empty = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
        vars(empty).update(vars(weight))
        part = part_of(weight.detach(), layout.mesh, layout.placements)
        setattr(empty, _PART, _copied(part, layout.mesh.device_type))
        return empty


def _layouts(model: nn.Module, shard: Shard) -> dict[str, _Layout]:
    """The layouts of a model's weights by their names; the model stays as it is, and has no values yet."""
    copy = deepcopy(model)
    shard(copy)
    weights: Iterator[tuple[str, Any]] = copy.named_parameters(remove_duplicate=False)
    return {name: _Layout(each.device_mesh, each.placements) for name, each in weights if is_sharded(each)}


def _copied(part: Shaped[Tensor, ...], device: str) -> Shaped[Tensor, ...]:
    """The part in memory of its own."""
    return torch.empty(part.shape, dtype=part.dtype, device=device).copy_(part)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Within it, transformers reads one weight after another, and keeps no file's pages in this process's memory."""
    from transformers import modeling_utils

    key: str = "HF_DEACTIVATE_ASYNC_LOAD"
    threads, opener = os.environ.get(key), modeling_utils.safe_open
    os.environ[key] = "1"
    modeling_utils.safe_open = lambda *where, **how: _Opened(partial(opener, *where, **how))
    try:
        yield
    finally:
        modeling_utils.safe_open = opener
        if threads is None:
            del os.environ[key]
        else:
            os.environ[key] = threads


class _Opened:
    """A file of safetensors, opened anew for each tensor: pages that are read leave memory with the tensor."""

    def __init__(self, opened: Callable[[], Any]) -> None:
        self._open, self._file = opened, opened()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        return self._file.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._file.get_slice(name), lambda: self._open().get_slice(name))


class _Slice:
    """A tensor in a file, of which nothing has been read."""

    def __init__(self, known: Any, again: Callable[[], Any]) -> None:
        self._known, self._again = known, again

    def __getattr__(self, name: str) -> Any:
        return getattr(self._known, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self._again()[index]
