"""Batches of row numbers, divided among the processes, and the loader that keeps their order."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import lightning
import torch
from jaxtyping import Int
from torch import Tensor, distributed
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

Loaded = TypeVar("Loaded", covariant=True)

FILES, FILES_OF_WORKER = 64, 32
"""Open files of a run, and of each worker's batches."""


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
        world_size: how many processes there are; None: ``torch.distributed`` says so, and the rank, for each epoch.
        trainer: whose fit takes the batches; one that is resumed within an epoch takes the rest of that epoch.

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
        world_size: int | None = 1,
        trainer: lightning.Trainer | None = None,
    ) -> None:
        self.length, self.batch_size, self.seed, self.trainer = length, batch_size, seed, trainer
        self._rank, self._world_size = rank, world_size
        self.epoch, self.epoch_begins = 0, False
        self._processes()

    def set_epoch(self, epoch: int) -> None:
        # Only Lightning calls this. Others who read the training data want all of it.
        self.epoch, self.epoch_begins = epoch, True

    def _processes(self) -> tuple[int, int]:
        """The rank of this process, and how many there are."""
        rank, world_size = self._rank, self._world_size
        if world_size is None:
            divided = distributed.is_available() and distributed.is_initialized()
            rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if divided else (0, 1)
        if self.batch_size < world_size:
            raise ValueError(
                f"data.batch_size={self.batch_size} is less than one example for each of {world_size} processes; give "
                f"{world_size} or more"
            )
        return rank, world_size

    def _batches(self) -> list[Tensor]:
        if self.seed is None:
            # Equal batches, so that every process has a share of each and none waits for one that has ended.
            return list(torch.arange(self.length).tensor_split(len(self)))
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch))
        return list(order.split(self.batch_size))[: len(self)]

    def _finished(self) -> int:
        """How many batches of its epoch a resumed fit has had: for the first reader of the epoch, which is the fit."""
        if self.trainer is None or not (self.epoch_begins and self.trainer.training):
            return 0
        self.epoch_begins, fit = False, self.trainer.fit_loop
        return fit.epoch_loop.batch_progress.current.ready if fit.restarting else 0

    def __iter__(self) -> Iterator[Share]:
        rank, world_size = self._processes()
        for batch in self._batches()[self._finished() :]:
            rows = batch[rank::world_size]
            yield Share(rows, weight=len(rows) * world_size / len(batch))

    def __len__(self) -> int:
        _, world_size = self._processes()
        whole, rest = divmod(self.length, self.batch_size)
        if self.seed is None:
            return max(1, min(-(-self.length // self.batch_size), self.length // world_size))
        return whole + (rest >= world_size)


class Loader(DataLoader[Loaded]):
    """A DataLoader whose workers start when the first batch is asked for.

    Workers take their first rows as soon as there is an iterator, and Lightning makes a resumed fit's first iterator
    before it tells the sampler the epoch.
    """

    def __iter__(self) -> Iterator[Loaded]:
        if self.num_workers:
            _require_files(self.num_workers)
        yield from super().__iter__()


def _require_files(workers: int) -> None:
    """Have room for the tensors that workers send, each an open file: without it they would wait for good.

    Raises:
        ValueError: the system does not allow as many.
    """
    needed = FILES + FILES_OF_WORKER * workers
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed >= needed:
        return
    if most != resource.RLIM_INFINITY and most < needed:
        raise ValueError(
            f"num_workers={workers} needs about {needed} open files, and {most} are allowed; raise that with "
            f"`ulimit -n {needed}`, or set data.num_workers=0"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))


class ResumableLoader(Loader[Loaded]):
    """A Loader whose sampler knows the trainer, so that a fit can be resumed within an epoch.

    Lightning warns of such a fit unless the loader has a state. It restores that state only if nobody has asked for the
    number of steps before, as any learning-rate schedule does, so the state is empty and the trainer's progress counts.
    """

    def state_dict(self) -> dict[str, int]:
        """Empty: the trainer's progress says where an epoch goes on."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Nothing, as ``state_dict``."""
