"""What a module computes on its way and puts out nowhere: it is handed to those who read or edit it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FUNCTIONS: Mapping[str, frozenset[Callable[..., Any]]] = {
    "weights": frozenset({torch.softmax, torch.nn.functional.softmax, Tensor.softmax}),
    "logits": frozenset({torch.nn.functional.linear}),
}
"""What gives attention its weights, and a router its logits over experts."""


class _OnResult(TorchFunctionMode):
    """While active, each call of the functions gives what is made of its result."""

    def __init__(self, functions: frozenset[Callable[..., Any]], acts: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self._functions, self._acts = functions, acts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self._functions:
            for act in self._acts:
                result = act(result)
        return result


@contextmanager
def on_the_way(module: nn.Module, what: str, acts: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within it, what a module computes on its way is what the acts make of it, in the order given.

    Eager attention has one softmax in its module's forward, of (batch, heads, tokens, tokens), and a router of experts
    one linear map.
    """
    own = module.__dict__.get("forward")
    forward: Callable[..., Any] = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with _OnResult(FUNCTIONS[what], acts):
            return forward(*args, **kwargs)

    module.__dict__["forward"] = run
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
