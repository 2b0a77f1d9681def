"""CounterfactualDataModule: pairs of a task with the causal model's labels, the same in every process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import lightning
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from itrain.causal_model import Setting
from itrain.inputs import ModelInputs
from itrain.metrics import is_right
from itrain.networks.replay import Network
from itrain.sites import Site
from itrain.tasks.base import Pair, Split, Task

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
ROUNDS = 20
"""How often the sampler is asked for more pairs when the filter leaves too few."""


class PairError(ValueError):
    """The task's pairs cannot be used."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CounterfactualBatch:
    """Pairs of base and source with the causal model's answers.

    ``contrast_label`` is the answer that the pairwise rule holds the counterfactual label against: the base's answer
    where the label changes, else the source's, else the task's first other output. ``weight`` is what the mean loss of
    this process's share counts in the mean over processes.
    """

    base: ModelInputs
    sources: Mapping[str, ModelInputs]
    base_label: Int[Tensor, " batch"]
    counterfactual_label: Int[Tensor, " batch"]
    contrast_label: Int[Tensor, " batch"]
    variables: Mapping[str, Int[Tensor, " batch"]]
    weight: float = 1.0

    @property
    def changes(self) -> Bool[Tensor, " batch"]:
        """Whether the interchange changes the label."""
        return self.base_label != self.counterfactual_label

    def __len__(self) -> int:
        return len(self.base_label)

    def take(self, rows: Int[Tensor, " rows"]) -> CounterfactualBatch:
        """Some of the pairs, as a batch of its own."""
        return replace(self._each(lambda inputs: inputs.take(rows), lambda tensor: tensor[rows]), weight=1.0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CounterfactualBatch:
        """The batch on another device."""
        return self._each(
            lambda inputs: inputs.to(device, non_blocking), lambda tensor: tensor.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> CounterfactualBatch:
        """The batch in memory from which an accelerator copies without waiting."""
        return self._each(ModelInputs.pin_memory, Tensor.pin_memory)

    def _each(
        self, change: Callable[[ModelInputs], ModelInputs], change_tensor: Callable[[Tensor], Tensor]
    ) -> CounterfactualBatch:
        return replace(
            self,
            base=change(self.base),
            sources={variable: change(source) for variable, source in self.sources.items()},
            base_label=change_tensor(self.base_label),
            counterfactual_label=change_tensor(self.counterfactual_label),
            contrast_label=change_tensor(self.contrast_label),
            variables={variable: change_tensor(values) for variable, values in self.variables.items()},
        )


def collate(task: Task, pairs: Sequence[Pair]) -> CounterfactualBatch:
    """The pairs as tensors, labelled by the causal model."""
    model, label, names = task.causal_model, task.label, task.variables
    bases = [model.run(pair.base) for pair in pairs]
    counterfactuals = [model.interchange(pair.base, pair.sources)[model.output] for pair in pairs]
    outputs = [base[model.output] for base in bases]
    contrasts = [
        next(
            other
            for other in (base, *(model.run(s)[model.output] for s in pair.sources.values()), *task.outputs)
            if other != new
        )
        for base, new, pair in zip(outputs, counterfactuals, pairs, strict=True)
    ]
    return CounterfactualBatch(
        base=task.inputs([pair.base for pair in pairs]),
        sources={variable: task.inputs([pair.sources[variable] for pair in pairs]) for variable in pairs[0].sources},
        base_label=torch.tensor([label(output) for output in outputs]),
        counterfactual_label=torch.tensor([label(output) for output in counterfactuals]),
        contrast_label=torch.tensor([label(output) for output in contrasts]),
        variables={name: torch.tensor([task.values(name).index(base[name]) for base in bases]) for name in names},
    )


class CounterfactualDataset(Dataset[CounterfactualBatch]):
    """A split, collated once; indexing with rows gives a batch, so a step costs no Python per example."""

    def __init__(self, pairs: CounterfactualBatch) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, share: Share) -> CounterfactualBatch:
        return replace(self.pairs.take(share.rows), weight=share.weight)


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


class CounterfactualDataModule(lightning.LightningDataModule):
    """Counterfactual pairs of a task, on which the base model is right.

    Args:
        task: what is asked.
        network: the base model, for the filter and the accuracies that are reported.
        train_pairs, validation_pairs, test_pairs: pairs of each split.
        batch_size: examples of one training step, over all processes.
        eval_batch_size: the same in evaluation.
        keep: ``pairwise`` keeps pairs where the base model prefers the right answer to each other one for base and
            sources, ``argmax`` where it prefers it to the whole vocabulary, ``all`` keeps every pair.
        seed: of the pairs and their order.
        num_workers: of the data loaders; batches are index look-ups, so 0 is right for nearly all.

    Raises:
        PairError: a split has no pairs, or none in which the label changes.
    """

    def __init__(
        self,
        *,
        task: Task,
        network: Network,
        train_pairs: int = 512,
        validation_pairs: int = 128,
        test_pairs: int = 256,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        keep: Literal["pairwise", "argmax", "all"] = "pairwise",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.task, self.network = task, network
        self.sizes: dict[Split, int] = {"train": train_pairs, "validation": validation_pairs, "test": test_pairs}
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.keep, self.seed, self.num_workers = keep, seed, num_workers
        self.datasets: dict[Split, CounterfactualDataset] = {}
        self.model_accuracy: dict[str, float] = {}

    def example(self) -> ModelInputs:
        """One input of the task, to learn sizes from."""
        return self.task.inputs([self.task.sample(Random(0), "train").base])

    def setup(self, stage: str) -> None:
        if self.trainer is not None:
            self.network.to(self.trainer.strategy.root_device)
        for split in SPLITS:
            if split not in self.datasets:
                self.datasets[split] = CounterfactualDataset(self._pairs(split))

    def require(self, sites: Sequence[Site]) -> None:
        """Refuse sites whose position some example lacks, before anything is run on them.

        Raises:
            PositionError: naming the site and the example.
        """
        for pairs in (dataset.pairs for dataset in self.datasets.values()):
            for site in sites:
                pairs.base.require(site)
                for source in pairs.sources.values():
                    source.require(site)
                    pairs.base.require_same_count(source, site)

    def train_dataloader(self) -> DataLoader[CounterfactualBatch]:
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[CounterfactualBatch]:
        return self._loader("validation", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[CounterfactualBatch]:
        return self._loader("test", self.eval_batch_size)

    def _loader(self, split: Split, batch_size: int, shuffle: bool = False) -> DataLoader[CounterfactualBatch]:
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        dataset = self.datasets[split]
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

    def _pairs(self, split: Split) -> CounterfactualBatch:
        """Sample pairs of a split until enough of them pass the filter."""
        wanted, random = self.sizes[split], Random(f"{self.seed} {split}")
        if wanted < 1:
            raise PairError(f"the {split} split is asked for {wanted} pairs; set data.{split}_pairs to 1 or more")
        kept: list[Pair] = []
        for _ in range(ROUNDS):
            pairs = [self.task.sample(random, split) for _ in range(wanted)]
            kept += [pair for pair, right in zip(pairs, self._right(pairs, split), strict=True) if right]
            if len(kept) >= wanted:
                break
        if not kept:
            raise PairError(
                f"no {split} pair is left: on none of {ROUNDS * wanted} is the base model right for base and source "
                f"(accuracy {self.model_accuracy[split]:.2f}); try another model, or data.keep=all"
            )
        batch = collate(self.task, kept[:wanted])
        if not bool(batch.changes.any()):
            raise PairError(
                f"in none of the {len(batch)} {split} pairs does the label change, so nothing could be learned; "
                f"the base model is right on {self.model_accuracy[split]:.2f} of the inputs that were drawn (data.keep="
                f"{self.keep})"
            )
        return batch

    @torch.no_grad()
    def _right(self, pairs: Sequence[Pair], split: Split) -> list[bool]:
        """Whether the base model answers base and sources right, by the rule of ``keep``."""
        settings: list[Setting] = [setting for pair in pairs for setting in (pair.base, *pair.sources.values())]
        labels = torch.tensor([self.task.label(output) for output in self.task.outputs])
        rights: dict[str, list[Tensor]] = {"argmax": [], "pairwise": []}
        for start in range(0, len(settings), self.eval_batch_size):
            chunk = settings[start : start + self.eval_batch_size]
            answers = [self.task.causal_model.run(setting)[self.task.causal_model.output] for setting in chunk]
            label = torch.tensor([self.task.label(answer) for answer in answers])
            device = next(self.network.parameters()).device
            logits = self.network(self.task.inputs(chunk).to(device)).cpu()
            rights["argmax"].append(is_right(logits, label))
            rights["pairwise"].append(labels[logits[:, labels].argmax(1)] == label)
        right = {rule: torch.cat(parts) for rule, parts in rights.items()}
        self.model_accuracy.setdefault(
            split, float(right["argmax" if self.keep == "argmax" else "pairwise"].float().mean())
        )
        if self.keep == "all":
            return [True] * len(pairs)
        return right[self.keep].view(len(pairs), -1).all(1).tolist()
