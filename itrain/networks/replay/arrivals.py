"""Arrivals: what is kept in host memory or in files, on its way to an accelerator while the step goes on.

Tensor letters: B batch, P positions, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Arrivals(Sequence[Tensor]):
    """Rows of several parts of a store, (B, P, F) each, which are fetched in order and waited for where they are used.

    A thread copies them to pinned memory and has them copied from there on a stream of its own; the accelerator waits
    for a part before it computes with it, and the program never does. A block's keys and values so arrive while the
    blocks before it run.

    Args:
        parts: the rows that are kept.
        index: those that are wanted, on the CPU.
        device: where they are wanted.
    """

    def __init__(
        self,
        parts: Iterable[Float[Tensor, "tokens features"]],
        index: Int[Tensor, "batch positions"],
        device: torch.device,
    ) -> None:
        self._shape, self._flat, self._device = index.shape, index.flatten(), device
        self._coming = [_thread().submit(self._fetch, part) if part.device.type == "cpu" else part for part in parts]

    def __len__(self) -> int:
        return len(self._coming)

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, place: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        coming = self._coming[place]
        if isinstance(coming, Tensor):  # on the device already
            rows = coming.index_select(0, self._flat.to(self._device, non_blocking=True))
            return rows.view(*self._shape, -1)
        rows, arrived = coming.result()
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arrived)
        # Or the side stream could give its memory to other rows while the step still reads it.
        rows.record_stream(stream)
        return rows

    def _fetch(self, part: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        with torch.no_grad(), torch.cuda.stream(_stream(self._device)):
            pinned = torch.empty(len(self._flat), part.shape[1], dtype=part.dtype, pin_memory=True)
            rows = torch.index_select(part, 0, self._flat, out=pinned).to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return rows.view(*self._shape, -1), arrived


@cache
def _thread() -> ThreadPoolExecutor:
    """One for all stores, so that rows arrive in the order in which they are asked for."""
    return ThreadPoolExecutor(1, thread_name_prefix="itrain-arrivals")


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
