"""Attention weights on their way: what a module's softmax gives is handed to those who read or edit it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SOFTMAX = frozenset({torch.softmax, torch.nn.functional.softmax, Tensor.softmax})


class _OnSoftmax(TorchFunctionMode):
    """While active, each softmax gives what is made of it."""

    def __init__(self, acts: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self._acts = acts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SOFTMAX:
            for act in self._acts:
                result = act(result)
        return result


@contextmanager
def on_weights(attention: nn.Module, acts: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within it, the attention weights of a module are those that the acts make of them, in the order given.

    Eager attention has one softmax, of (batch, heads, tokens, tokens), in its module's forward.
    """
    own = attention.__dict__.get("forward")
    forward: Callable[..., Any] = attention.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with _OnSoftmax(acts):
            return forward(*args, **kwargs)

    attention.__dict__["forward"] = run
    try:
        yield
    finally:
        if own is None:
            del attention.__dict__["forward"]
        else:
            attention.__dict__["forward"] = own
