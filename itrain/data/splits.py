"""Splits of examples, collated once and divided among the processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import lightning
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from itrain.bounds import require_at_least
from itrain.data.loading import BatchSampler, Loader, ResumableLoader, Share
from itrain.inputs import ModelInputs, needs_no_wait
from itrain.networks.base import Network, require_network
from itrain.placements import Placement
from itrain.tasks.base import SPLITS, Split

if TYPE_CHECKING:
    from typing_extensions import Self


# Not frozen, because Lightning casts floating-point tensors to the trainer's precision field by field.
@dataclass(eq=False, kw_only=True)
class Batch(ABC):
    """Examples as tensors; ``weight`` is the weight of this process's mean loss in the global mean."""

    weight: float = 1.0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, rows: Int[Tensor, " rows"]) -> Self:
        """Some of the examples, as a batch of its own."""

    @abstractmethod
    def each(self, change: Callable[[ModelInputs], ModelInputs], change_tensor: Callable[[Tensor], Tensor]) -> Self:
        """The batch with its inputs and tensors changed, except the tensors that stay on the CPU."""

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Self:
        """The batch on another device; ``non_blocking`` None: without waiting wherever that is safe."""
        non_blocking = needs_no_wait(device) if non_blocking is None else non_blocking
        return self.each(
            lambda inputs: inputs.to(device, non_blocking), lambda tensor: tensor.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> Self:
        """The batch in memory from which an accelerator copies without waiting."""
        return self.each(lambda inputs: inputs.pin_memory(), Tensor.pin_memory)


AnyBatch = TypeVar("AnyBatch", bound=Batch)


class SplitDataset(Dataset[AnyBatch], Generic[AnyBatch]):
    """A split, collated once; indexing with rows gives a batch, so a step costs no Python per example."""

    def __init__(self, examples: AnyBatch) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, share: Share) -> AnyBatch:
        if not isinstance(share, Share):
            raise TypeError(
                "this split is read in batches by the sampler of its own loader, not by one of single examples; in "
                "place of Trainer(overfit_batches=n), which sets such a sampler, use limit_train_batches=n"
            )
        return replace(self.examples.take(share.rows), weight=share.weight)


class SplitDataModule(lightning.LightningDataModule, ABC, Generic[AnyBatch]):
    """Train, validation and test examples of a task for a base model.

    Args:
        network: the base model, which is moved to the device that runs.
        sizes: the examples of each split.
        batch_size: examples of one training step, over all processes.
        eval_batch_size: the same in evaluation.
        seed: of the examples and their order.
        num_workers: of the data loaders. A batch is an index look-up, so 0 suits nearly all data.
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
        require_network(network)
        require_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        require_at_least(0, num_workers=num_workers)
        self.network, self.sizes = network, dict(sizes)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.num_workers = seed, num_workers
        self.datasets: dict[Split, SplitDataset[AnyBatch]] = {}

    @abstractmethod
    def collect(self, split: Split) -> AnyBatch:
        """All examples of a split; the same in every process."""

    @abstractmethod
    def example(self) -> ModelInputs:
        """One input of the task, from which sizes are read."""

    @abstractmethod
    def edited(self) -> list[ModelInputs]:
        """The inputs that interventions edit, a batch for each split."""

    def read(self) -> list[ModelInputs]:
        """The inputs that interventions read from."""
        return []

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """How many examples there are and of what kind, as lines by name."""

    def figures(self) -> dict[str, float]:
        """Figures about the data, for a run's results."""
        return {}

    def setup(self, stage: str) -> None:
        if self.trainer is not None:
            self.network.to(self.trainer.strategy.root_device)
        for split in SPLITS:
            if split not in self.datasets:
                self.datasets[split] = SplitDataset(self.collect(split))

    def require(self, placements: Sequence[Placement]) -> None:
        """Refuse sites whose position some example lacks, before the model runs.

        Raises:
            PositionError: naming the site and the example.
        """
        for each in placements:
            for inputs in self.edited():
                inputs.require(each.write)
            for inputs in self.read():
                inputs.require(each.read)

    def train_dataloader(self) -> DataLoader[AnyBatch]:
        return self.loader(self.datasets["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[AnyBatch]:
        return self.loader(self.datasets["validation"], self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[AnyBatch]:
        return self.loader(self.datasets["test"], self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[AnyBatch]:
        return self.test_dataloader()

    def whole(self, split: Split) -> Iterator[AnyBatch]:
        """All examples of a split in every process, in batches of one order and of the trainer's precision."""
        dataset = self.datasets[split]
        batches = (dataset[share] for share in BatchSampler(len(dataset), self.eval_batch_size, seed=None))
        return batches if self.trainer is None else map(self.trainer.precision_plugin.convert_input, batches)

    def loader(
        self, dataset: SplitDataset[AnyBatch], batch_size: int, *, shuffle: bool = False
    ) -> DataLoader[AnyBatch]:
        """This process's share of each batch of a dataset."""
        trainer = self.trainer
        if trainer is not None and trainer.state.stopped:
            trainer = None  # Another one may take the loader.
        # Processes that split a model's blocks take the same examples.
        sharing = {} if trainer is None else trainer.distributed_sampler_kwargs or {"num_replicas": 1}
        sampler = BatchSampler(
            len(dataset),
            batch_size,
            seed=self.seed if shuffle else None,
            rank=sharing.get("rank", 0),
            world_size=sharing.get("num_replicas"),
            trainer=trainer if shuffle else None,
        )
        kind = Loader if sampler.trainer is None else ResumableLoader
        return kind(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
