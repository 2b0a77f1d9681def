"""Compiled blocks: what a replayed run does above its edits, as a few graphs instead of many small operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from itrain.architectures import locate
from itrain.networks.replay.forwards import Forwards, unbound
from itrain.networks.replay.prefix import Before
from itrain.sites import Site

BACKEND = "inductor"
LIMIT = 64
"""A process's graphs at most; torch's own limit of 8 is for functions of which each new graph is a mistake."""


class CompileError(RuntimeError):
    """Compiled blocks fail, or do something else than blocks as they are."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}; network.compile=false leaves blocks as they are")


def unedited(layers: Sequence[nn.Module], model: nn.Module, sites: Sequence[Site], below: int) -> dict[int, nn.Module]:
    """The blocks from ``below`` on, by their place in the model, that no edit acts within."""
    edited = {locate(model, site).module for site in sites}
    # What a whole block is given or puts out is edited outside of its forward, which alone is compiled.
    inner = {place: {*block.modules()} - {block} for place, block in enumerate(layers) if place >= below}
    return {place: layers[place] for place, modules in inner.items() if edited.isdisjoint(modules)}


def compiled(blocks: Mapping[int, nn.Module]) -> Forwards:
    """Have the blocks, by their place in the model, run compiled; blocks of a kind share their graphs.

    A block that fails when compiled raises :class:`CompileError`.
    """
    return {block: partial(_run, place, block.forward) for place, block in blocks.items()}


def compiling() -> AbstractContextManager[None]:
    """For runs of compiled blocks."""
    # Earlier releases have the limit among torch's private settings alone.
    public: Any = torch.compiler.config
    settings: Any = public if hasattr(public, "recompile_limit") else torch._dynamo.config
    return settings.patch(recompile_limit=LIMIT)


def _run(place: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    def own(value: Any) -> Any:
        # Of what all blocks' keys and values lie in, a graph would serve one block only.
        return value.of(place) if isinstance(value, Before) else value

    positional, named = [own(value) for value in args], {name: own(value) for name, value in kwargs.items()}
    function, owner = unbound(forward)
    try:
        # Hooked runs forbid compiled code, which might skip hooks; no edit acts within this block.
        with torch.compiler.set_stance("default"):
            return compiled_call()(function, [*owner, *positional], named)
    except Exception as error:
        raise CompileError(f"block {place} fails when compiled, with {type(error).__name__}") from error


@cache
def compiled_call() -> Callable[..., Any]:
    return torch.compile(_call, backend=BACKEND, fullgraph=True, dynamic=True)


def _call(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return forward(*args, **kwargs)
