"""Splits of examples, collated once and dealt out to the processes, the same whatever their number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import lightning
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from itrain.inputs import ModelInputs
from itrain.networks.base import Network
from itrain.sites import Site
from itrain.tasks.base import Split

if TYPE_CHECKING:
    from typing_extensions import Self

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch(ABC):
    """Examples as tensors; ``weight`` is what the mean loss of this process's share counts in that over processes."""

    weight: float = 1.0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, rows: Int[Tensor, " rows"]) -> Self:
        """Some of the examples, as a batch of its own."""

    @abstractmethod
    def each(self, change: Callable[[ModelInputs], ModelInputs], change_tensor: Callable[[Tensor], Tensor]) -> Self:
        """The batch with its inputs and its tensors changed, but for those that stay on the CPU."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The batch on another device."""
        return self.each(
            lambda inputs: inputs.to(device, non_blocking), lambda tensor: tensor.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> Self:
        """The batch in memory from which an accelerator copies without waiting."""
        return self.each(ModelInputs.pin_memory, Tensor.pin_memory)


AnyBatch = TypeVar("AnyBatch", bound=Batch)


class SplitDataset(Dataset[AnyBatch], Generic[AnyBatch]):
    """A split, collated once; indexing with rows gives a batch, so a step costs no Python per example."""

    def __init__(self, examples: AnyBatch) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, share: Share) -> AnyBatch:
        return replace(self.examples.take(share.rows), weight=share.weight)


@dataclass(frozen=True)
class Share:
    """One process's rows of a batch, and what their mean counts in the mean over processes."""

    rows: Int[Tensor, " rows"]
    weight: float


class BatchSampler(Sampler[Share]):
    """Batches of row numbers, divided among the processes; shuffled by seed and epoch alone.

    ``batch_size`` is that of all processes together. No row is repeated, and none is left out, except that a last
    training batch with fewer rows than processes is dropped.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int | None, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < world_size:
            raise ValueError(f"batch_size {batch_size} is less than one example for each of {world_size} processes")
        self.length, self.batch_size, self.seed, self.rank, self.world_size = length, batch_size, seed, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _batches(self) -> list[Tensor]:
        if self.seed is None:
            # Equal batches, so that every process has a share of each and none waits for one that has ended.
            return list(torch.arange(self.length).tensor_split(len(self)))
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch))
        return list(order.split(self.batch_size))[: len(self)]

    def __iter__(self) -> Iterator[Share]:
        for batch in self._batches():
            rows = batch[self.rank :: self.world_size]
            yield Share(rows, weight=len(rows) * self.world_size / len(batch))

    def __len__(self) -> int:
        whole, rest = divmod(self.length, self.batch_size)
        if self.seed is None:
            return max(1, min(-(-self.length // self.batch_size), self.length // self.world_size))
        return whole + (rest >= self.world_size)


class SplitDataModule(lightning.LightningDataModule, ABC, Generic[AnyBatch]):
    """Train, validation and test examples of a task for a base model.

    Args:
        network: the base model, which is moved to the device that runs.
        sizes: the examples of each split.
        batch_size: examples of one training step, over all processes.
        eval_batch_size: the same in evaluation.
        seed: of the examples and their order.
        num_workers: of the data loaders; batches are index look-ups, so 0 is right for nearly all.
    """

    def __init__(
        self,
        *,
        network: Network,
        sizes: Mapping[Split, int],
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.sizes = network, dict(sizes)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.num_workers = seed, num_workers
        self.datasets: dict[Split, SplitDataset[AnyBatch]] = {}

    @abstractmethod
    def collect(self, split: Split) -> AnyBatch:
        """All examples of a split; the same in every process."""

    @abstractmethod
    def example(self) -> ModelInputs:
        """One input of the task, to learn sizes from."""

    @abstractmethod
    def edited(self) -> list[ModelInputs]:
        """The inputs that interventions edit, a batch for each split."""

    def read(self) -> list[ModelInputs]:
        """The inputs that interventions read from."""
        return []

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Lines that say how many examples there are, and of what kind."""

    def facts(self) -> dict[str, float]:
        """Figures about the data, which stand among a run's results."""
        return {}

    def setup(self, stage: str) -> None:
        if self.trainer is not None:
            self.network.to(self.trainer.strategy.root_device)
        for split in SPLITS:
            if split not in self.datasets:
                self.datasets[split] = SplitDataset(self.collect(split))

    def require(self, sites: Sequence[Site]) -> None:
        """Refuse sites whose position some example lacks, before anything is run on them.

        Raises:
            PositionError: naming the site and the example.
        """
        for inputs in (*self.edited(), *self.read()):
            for site in sites:
                inputs.require(site)

    def train_dataloader(self) -> DataLoader[AnyBatch]:
        return self.loader(self.datasets["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[AnyBatch]:
        return self.loader(self.datasets["validation"], self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[AnyBatch]:
        return self.loader(self.datasets["test"], self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[AnyBatch]:
        return self.test_dataloader()

    def whole(self, split: Split) -> Iterator[AnyBatch]:
        """All examples of a split in every process, in batches of one order."""
        dataset = self.datasets[split]
        return (dataset[share] for share in BatchSampler(len(dataset), self.eval_batch_size, seed=None))

    def loader(
        self, dataset: SplitDataset[AnyBatch], batch_size: int, *, shuffle: bool = False
    ) -> DataLoader[AnyBatch]:
        """This process's share of a dataset, in batches that all processes have together."""
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        sampler = BatchSampler(
            len(dataset), batch_size, seed=self.seed if shuffle else None, rank=rank, world_size=world_size
        )
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
