"""Replaces modules' forwards for a run: what is below an edit, and what no later token sees.

The model's own forward runs, so that masks, rotary embeddings and the head are its own. Tensor letters: B batch, S
sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from itrain.networks.answer import Answers

Forwards = dict[nn.Module, Callable[..., Any]]
"""The forward that takes the place of each module's own."""


@contextmanager
def forwards(replacements: Forwards) -> Iterator[None]:
    """Give modules another forward, on the instance, where hooks and wrappers of the class still find it."""
    own = {module: module.__dict__["forward"] for module in replacements if "forward" in module.__dict__}
    for module, forward in replacements.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in replacements:
            if module in own:
                module.__dict__["forward"] = own[module]
            else:
                module.__dict__.pop("forward", None)


def unbound(forward: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[object, ...]]:
    """A method's function and what it is of.

    A bound method is another object at each look-up, for which earlier releases of torch would compile anew.
    """
    return (forward.__func__, (forward.__self__,)) if isinstance(forward, MethodType) else (forward, ())


class Watched:
    """What a block put out: the residual stream, and of how many outputs it was the first (0: the only one)."""

    hidden: Float[Tensor, "batch sequence hidden"]
    outputs: int


@contextmanager
def watched(block: nn.Module | None) -> Iterator[Watched]:
    """Note what the block puts out, before any hook changes it."""
    seen = Watched()
    if block is None:
        yield seen
        return
    forward = block.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.outputs = 0 if isinstance(output, Tensor) else len(output)
        seen.hidden = (output if isinstance(output, Tensor) else output[0]).detach()
        return output

    with forwards({block: watch}):
        yield seen


def resumed(below: Sequence[nn.Module], hidden: Float[Tensor, "batch sequence hidden"], outputs: int) -> Forwards:
    """Have the last of the blocks put out ``hidden``, one of so many ``outputs``, and those before it do nothing."""
    # Not the list of blocks is cut: models choose masks and rotary embeddings by a block's place in it.
    found: Forwards = dict.fromkeys(below[:-1], partial(_pass_on, outputs))
    return found | {below[-1]: lambda *args, **kwargs: (hidden, *[None] * (outputs - 1)) if outputs else hidden}


def only_at(at: Answers, module: nn.Module) -> Forwards:
    """Have a module that treats each token by itself run on some tokens only; elsewhere it puts out 0."""
    forward, owner = unbound(module.forward)

    # A function of its own in each run, not a partial: compiled blocks keep their graphs for it.
    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Some take the residual stream besides, and some see all examples' tokens in a row.
        if args or kwargs or hidden.ndim != 3 or hidden.shape[1] == 1:
            return forward(*owner, hidden, *args, **kwargs)
        output = forward(*owner, hidden[at])
        if not isinstance(output, Tensor):
            return forward(*owner, hidden)
        return output.new_zeros(*hidden.shape[:2], output.shape[-1]).index_put(at, output)

    return {module: run}


def _pass_on(outputs: int, *args: Any, **kwargs: Any) -> Any:
    hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return (hidden, *[None] * (outputs - 1)) if outputs else hidden
