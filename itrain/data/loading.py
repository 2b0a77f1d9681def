"""Batches of row numbers, divided among the processes, and the loader that follows their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

Loaded = TypeVar("Loaded", covariant=True)


@dataclass(frozen=True)
class Share:
    """One process's rows of a batch, and the weight of its mean loss in the global mean."""

    rows: Int[Tensor, " rows"]
    weight: float


class BatchSampler(DistributedSampler[Share]):
    """Batches of row numbers, divided among the processes; shuffled by seed and epoch alone.

    ``batch_size`` is that of all processes together. No row is repeated, and none is left out, except that a last
    training batch with fewer rows than processes is dropped. Lightning leaves a DistributedSampler as it is; any other
    sampler it would divide among the processes once more.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int | None, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < world_size:
            raise ValueError(f"batch_size {batch_size} is less than one example for each of {world_size} processes")
        self.length, self.batch_size, self.seed, self.rank, self.world_size = length, batch_size, seed, rank, world_size
        self.epoch = 0
        self.begun = (0, 0)
        """An epoch, and how many of its batches were handed out before."""

    def _batches(self) -> list[Tensor]:
        if self.seed is None:
            # Equal batches, so that every process has a share of each and none waits for one that has ended.
            return list(torch.arange(self.length).tensor_split(len(self)))
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch))
        return list(order.split(self.batch_size))[: len(self)]

    def __iter__(self) -> Iterator[Share]:
        for batch in self._batches()[self.left_out :]:
            rows = batch[self.rank :: self.world_size]
            yield Share(rows, weight=len(rows) * self.world_size / len(batch))

    @property
    def left_out(self) -> int:
        """How many batches an iteration leaves out, because a run before this one has had them."""
        epoch, count = self.begun
        return count if epoch == self.epoch else 0

    def __len__(self) -> int:
        whole, rest = divmod(self.length, self.batch_size)
        if self.seed is None:
            return max(1, min(-(-self.length // self.batch_size), self.length // self.world_size))
        return whole + (rest >= self.world_size)


class Loader(DataLoader[Loaded]):
    """A DataLoader over a BatchSampler, whose order a resumed run goes on with.

    Workers take their first rows as soon as there is an iterator, and Lightning makes a resumed run's first iterator
    before it tells the sampler the epoch. So the iterator is made when its first batch is asked for. A checkpoint holds
    how many batches of its epoch were handed out, and a run that goes on from it leaves these out.
    """

    _handed_out = (0, 0)

    def __iter__(self) -> Iterator[Loaded]:
        sampler = cast(BatchSampler, self.sampler)
        for count, batch in enumerate(super().__iter__(), sampler.left_out + 1):
            self._handed_out = (sampler.epoch, count)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return dict(zip(("epoch", "batches"), self._handed_out, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        cast(BatchSampler, self.sampler).begun = (state["epoch"], state["batches"])
