"""Batches of row numbers, divided among the processes, and the loader that keeps their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

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

    No row is repeated, and none is left out, except that a last training batch with fewer rows than processes is
    dropped. Lightning leaves a DistributedSampler as it is; any other sampler it would divide once more.

    Args:
        length: the number of rows.
        batch_size: rows of a batch, over all processes.
        seed: shuffles the rows anew in each epoch; None keeps their order and makes batches equal.
        rank: which of the processes this is.
        world_size: how many processes there are.
        finished: how many batches of its epoch a fit has had already, for one that is resumed within an epoch.

    Raises:
        ValueError: a batch has fewer rows than there are processes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
        finished: Callable[[], int] | None = None,
    ) -> None:
        if batch_size < world_size:
            raise ValueError(f"batch_size {batch_size} is less than one example for each of {world_size} processes")
        self.length, self.batch_size, self.seed, self.rank, self.world_size = length, batch_size, seed, rank, world_size
        self.epoch, self.finished, self.in_fit = 0, finished, False

    def set_epoch(self, epoch: int) -> None:
        # Only Lightning calls this. Others who read the training data want all of it.
        self.epoch, self.in_fit = epoch, True

    def _batches(self) -> list[Tensor]:
        if self.seed is None:
            # Equal batches, so that every process has a share of each and none waits for one that has ended.
            return list(torch.arange(self.length).tensor_split(len(self)))
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch))
        return list(order.split(self.batch_size))[: len(self)]

    def __iter__(self) -> Iterator[Share]:
        finished = self.finished() if self.finished is not None and self.in_fit else 0
        for batch in self._batches()[finished:]:
            rows = batch[self.rank :: self.world_size]
            yield Share(rows, weight=len(rows) * self.world_size / len(batch))

    def __len__(self) -> int:
        whole, rest = divmod(self.length, self.batch_size)
        if self.seed is None:
            return max(1, min(-(-self.length // self.batch_size), self.length // self.world_size))
        return whole + (rest >= self.world_size)


class Loader(DataLoader[Loaded]):
    """A DataLoader whose workers start when the first batch is asked for.

    Workers take their first rows as soon as there is an iterator, and Lightning makes a resumed fit's first iterator
    before it tells the sampler the epoch.
    """

    def __iter__(self) -> Iterator[Loaded]:
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Empty: the trainer's progress says where an epoch goes on. Lightning wants it to resume within an epoch."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Nothing, as ``state_dict``."""
