"""LabelledDataModule: texts with their labels, in splits and shifted test sets, the same in every process."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader

from itrain.causal_model import Setting
from itrain.data.arbitrary import NoControlError, arbitrary_labels, label_code
from itrain.data.splits import Batch, SplitDataModule, SplitDataset
from itrain.inputs import ModelInputs
from itrain.networks.base import Network
from itrain.tasks.base import SPLITS, Split, Task, TextTask
from itrain.tasks.labelled import UNLABELLED, LabelledBases, LabelledTask
from itrain.tasks.tokens import shown
from itrain.trust import shown as quoted

SHOWN = 10
"""How many concepts are listed."""


class LabelError(ValueError):
    """The labelled texts cannot be used."""


@dataclass(eq=False, kw_only=True)
class LabelledBatch(Batch):
    """Texts with their labels.

    Args:
        inputs: the texts.
        labels: 1 where a text has a concept, 0 where not, ``UNLABELLED`` where that is not known.
        sets: the names of the test sets, ``test`` first; of other splits, of the split alone.
        of: which of the sets each text belongs to, on the CPU.
        control: the arbitrary labels of the control task, of training texts; None: there are none.
    """

    inputs: ModelInputs
    labels: Int[Tensor, "batch concepts"]
    sets: tuple[str, ...]
    of: Int[Tensor, " batch"]
    control: Int[Tensor, "batch concepts"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Int[Tensor, " rows"]) -> LabelledBatch:
        """Some of the texts, as a batch of its own."""
        taken = self.each(lambda inputs: inputs.take(rows), lambda tensor: tensor[rows])
        return replace(taken, of=self.of[rows], weight=1.0)

    def each(
        self, change: Callable[[ModelInputs], ModelInputs], change_tensor: Callable[[Tensor], Tensor]
    ) -> LabelledBatch:
        control = None if self.control is None else change_tensor(self.control)
        return replace(self, inputs=change(self.inputs), labels=change_tensor(self.labels), control=control)


def collate(task: LabelledTask, settings: Mapping[str, Sequence[Setting]]) -> LabelledBatch:
    """The texts of some sets as tensors, with their labels."""
    every = [setting for each in settings.values() for setting in each]
    return LabelledBatch(
        inputs=task.inputs(every),
        labels=torch.tensor([list(task.labels(setting)) for setting in every]),
        sets=tuple(settings),
        of=torch.tensor([number for number, each in enumerate(settings.values()) for _ in each]),
    )


class LabelledDataModule(SplitDataModule[LabelledBatch]):
    """Texts with their labels; the test has those of the test split and of each shift.

    Args:
        task: gives texts and labels; of another task in text, the bases are the texts and its variables the labels.
        network: the base model, which is moved to the device that runs.
        variables, positive, shifts: as in :class:`~itrain.tasks.labelled.LabelledBases`, where the task is another one.
        train_texts, validation_texts, test_texts: texts of each split, and of each shift as of the test. None takes 512
            of a task that samples them, and all of one that lists them; a number takes as many of these at random.
        batch_size: texts of one training step, over all processes.
        eval_batch_size: the same in evaluation.
        seed: draws the texts and their order.
        num_workers: of the data loaders. A batch is an index look-up, so 0 suits nearly all data.

    Raises:
        LabelError: a split lacks texts with or without a concept, or an argument is for another task.
        TaskError: a text cannot be written for the model.
    """

    def __init__(
        self,
        *,
        task: Task,
        network: Network,
        variables: Sequence[str] | None = None,
        positive: Mapping[str, Any] | None = None,
        shifts: Mapping[str, TextTask] | None = None,
        train_texts: int | None = None,
        validation_texts: int | None = None,
        test_texts: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        asked: dict[Split, int | None] = {"train": train_texts, "validation": validation_texts, "test": test_texts}
        if isinstance(task, LabelledTask):
            for name, value in {"variables": variables, "positive": positive, "shifts": shifts}.items():
                if value:
                    raise LabelError(
                        f"data.{name}: {type(task).__name__} has labels of its own; set them there (task.{name})"
                    )
            self.task = task
        else:
            if not isinstance(task, TextTask):
                raise LabelError(f"{type(task).__name__} is no task in text, so that its bases are no texts")
            counts: dict[Split, int] = {split: count for split, count in asked.items() if count is not None}
            self.task = LabelledBases(
                task=task, variables=variables, positive=positive, shifts=shifts, counts=counts, seed=seed
            )
        super().__init__(
            network=network,
            sizes={split: self._size(split, wanted) for split, wanted in asked.items()},
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        for split in SPLITS:
            self._require_both(split)

    @property
    def concepts(self) -> list[str]:
        """What the labels are about."""
        return list(self.task.concepts)

    def collect(self, split: Split) -> LabelledBatch:
        sets = [split, *(self.task.shifts if split == "test" else ())]
        found = collate(self.task, {name: self._chosen(name, split) for name in sets})
        if split == "train" and self.has_control:
            found.control = self._arbitrary(self._chosen("train", "train"))
        return found

    @cached_property
    def control_task(self) -> Mapping[Hashable, Sequence[int]] | NoControlError:
        """The arbitrary labels of each type of the training texts; or why there are none."""
        train = self._chosen("train", "train")
        try:
            found = arbitrary_labels(
                [self.task.kind(each) for each in train], [self.task.labels(each) for each in train], seed=self.seed
            )
            tested = [found[self.task.kind(each)] for each in self._controlled(found)]
            if not tested or any(len({*column}) < 2 for column in zip(*tested, strict=True)):
                raise NoControlError("no new texts of types in the training split have both arbitrary labels")
        except NoControlError as error:
            return error
        return found

    @property
    def has_control(self) -> bool:
        """Whether the texts have types, with new texts to test arbitrary labels of them on."""
        return not isinstance(self.control_task, NoControlError)

    @property
    def control_code(self) -> int:
        """What tells the arbitrary labels from those of other texts or another seed; 0: there are none."""
        known = self.control_task
        return 0 if isinstance(known, NoControlError) else label_code(known)

    def control_dataloader(self) -> DataLoader[LabelledBatch]:
        """New texts of the types of the training split, with their arbitrary labels.

        They come from the test split or, where it shares no type with the training split, are drawn as its texts.

        Raises:
            NoControlError: there are none.
        """
        if isinstance(self.control_task, NoControlError):
            raise self.control_task
        texts = self._controlled(self.control_task)
        found = collate(self.task, {"test": texts})
        return self.loader(SplitDataset(replace(found, labels=self._arbitrary(texts))), self.eval_batch_size)

    def _controlled(self, types: Mapping[Hashable, object]) -> Sequence[Setting]:
        """The new texts of some types."""
        tested = [each for each in self._chosen("test", "test") if self.task.kind(each) in types]
        return tested or [each for each in self.task.further(self.sizes["test"]) if self.task.kind(each) in types]

    def _arbitrary(self, settings: Sequence[Setting]) -> Int[Tensor, "texts concepts"]:
        known = self.control_task
        assert not isinstance(known, NoControlError), "asked for where there is a control task"
        return torch.tensor([known[self.task.kind(each)] for each in settings])

    def example(self) -> ModelInputs:
        return self.task.inputs(self.task.settings("train")[:1])

    def edited(self) -> list[ModelInputs]:
        return [dataset.examples.inputs for dataset in self.datasets.values()]

    def describe(self) -> dict[str, str]:
        lines = {"texts": ", ".join(f"{len(dataset)} {split}" for split, dataset in self.datasets.items())}
        test = self.datasets["test"].examples
        if len(test.sets) > 1:
            counts = test.of.bincount(minlength=len(test.sets)).tolist()
            lines["test sets"] = ", ".join(f"{count} {name}" for name, count in zip(test.sets, counts, strict=True))
        train = self.datasets["train"].examples.labels
        found = [
            f"{name} {int((column == 1).sum())} of {int((column != UNLABELLED).sum())}"
            for name, column in zip(self.concepts[:SHOWN], train.T, strict=False)
        ]
        more = [f"and {len(self.concepts) - SHOWN} more"] if len(self.concepts) > SHOWN else []
        lines["concepts"] = ", ".join([*found, *more])
        example = shown(self.task.tokenizer, self.datasets["train"].examples.inputs)
        return lines | {"text": example["prompt"].removesuffix(" -> ")}

    def _chosen(self, name: str, split: Split) -> Sequence[Setting]:
        settings = self.task.settings(name)
        count = min(self.sizes[split], len(settings))
        return settings if count == len(settings) else Random(f"{self.seed} {name}").sample(settings, count)

    def _size(self, split: Split, wanted: int | None) -> int:
        count = len(self.task.settings(split))
        if not count:
            raise LabelError(f"the {split} split of {type(self.task).__name__} is empty; give it texts")
        listed = not isinstance(self.task, LabelledBases)
        if wanted is not None and not 1 <= wanted <= (count if listed else wanted):
            raise LabelError(
                f"data.{split}_texts={wanted}: the {split} split has {count} texts; ask for 1 to {count}, or for all "
                "of them with null"
            )
        return min(wanted or count, count)

    def _require_both(self, split: Split) -> None:
        """Refuse a split in which a concept has no text with it, or none without it: nothing could be told apart."""
        labels = [self.task.labels(setting) for setting in self._chosen(split, split)]
        for concept, column in zip(self.concepts, zip(*labels, strict=True), strict=True):
            for value, what in ((1, "with"), (0, "without")):
                if value not in column:
                    raise LabelError(
                        f"the {split} split has no text {what} the concept {quoted(concept)}, so that nothing can be "
                        "told apart; add some, or give the rows other splits"
                    )


def concepts_of(data: SplitDataModule) -> list[str]:
    """The concepts of labelled texts.

    Raises:
        LabelError: the data are others.
    """
    if not isinstance(data, LabelledDataModule):
        raise LabelError(f"detectors are trained on labelled texts, not on a {type(data).__name__}; add data=labelled")
    return data.concepts
