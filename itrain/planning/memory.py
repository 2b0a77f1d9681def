"""The memory of a run's tensors and its operations: counted as operations make tensors and as they go, fake or not."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    # Without these, torch counts nothing for attention on a CPU.
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}
"""How many floating-point operations each matrix product, convolution and attention is; others count as none."""


class Memory(TorchDispatchMode):
    """Within it, bytes of all tensors that are alive, the most there were at once, and floating-point operations.

    Tensors that are mapped from a file take none. What kernels take and give back within one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were made before; return the bytes that this added."""
        before = self.now
        for tensor in tensors:
            self._count(tensor)
        return self.now - before

    def begin(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := FLOPS.get(getattr(func, "_overloadpacket", None))) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._count(each, mapped=func is _ATEN.from_file.default)
        return result

    def _count(self, tensor: Tensor, *, mapped: bool = False) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, 0 if mapped else storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
