"""ResponseDataModule: prompts of a task with the responses to learn, the same in every process."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from jaxtyping import Int
from torch import Tensor

from itrain.causal_model import Setting
from itrain.data.splits import Batch, SplitDataModule
from itrain.inputs import ModelInputs
from itrain.metrics import UNUSED
from itrain.networks.base import Network
from itrain.tasks.base import SPLITS, Split
from itrain.tasks.contract import check_responses
from itrain.tasks.responses import ResponseTask
from itrain.tasks.tokens import shown


class ResponseError(ValueError):
    """The task's responses cannot be used."""


@dataclass(eq=False, kw_only=True)
class ResponseBatch(Batch):
    """Prompts followed by their responses.

    The labels are the response's tokens, each predicted at the token before it; shorter responses are padded with
    ``UNUSED``.
    """

    inputs: ModelInputs
    label: Int[Tensor, "batch response"]
    has_concept: Int[Tensor, " batch"] | None = None
    """1 where the response has the task's concept, 0 where it is one without, for directions between the two."""
    rejected: ResponseBatch | None = None
    """The same prompts, each followed by a response without the concept; None unless a training asks for them."""

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: Int[Tensor, " rows"]) -> ResponseBatch:
        """Some of the examples, as a batch of its own."""
        has_concept = None if self.has_concept is None else self.has_concept[rows]
        rejected = None if self.rejected is None else self.rejected.take(rows)
        return ResponseBatch(
            inputs=self.inputs.take(rows), label=self.label[rows], has_concept=has_concept, rejected=rejected
        )

    def each(
        self, change: Callable[[ModelInputs], ModelInputs], change_tensor: Callable[[Tensor], Tensor]
    ) -> ResponseBatch:
        has_concept = None if self.has_concept is None else change_tensor(self.has_concept)
        return replace(
            self,
            inputs=change(self.inputs),
            label=change_tensor(self.label),
            has_concept=has_concept,
            rejected=None if self.rejected is None else self.rejected.each(change, change_tensor),
        )


def collate(task: ResponseTask, settings: Sequence[Setting]) -> ResponseBatch:
    """The settings as tensors, each prompt followed by its response."""
    return _collated(task, settings, [task.response(setting) for setting in settings])


def _collated(task: ResponseTask, settings: Sequence[Setting], responses: Sequence[Sequence[int]]) -> ResponseBatch:
    width = max(map(len, responses))
    label = torch.tensor([[*response] + [UNUSED] * (width - len(response)) for response in responses])
    has_concept = torch.tensor([int(task.has_concept(setting)) for setting in settings])
    return ResponseBatch(inputs=task.inputs(settings, responses), label=label, has_concept=has_concept)


class ResponseDataModule(SplitDataModule[ResponseBatch]):
    """Prompts of a task with the responses to learn.

    Args:
        task: gives prompts and responses.
        network: the base model, which is moved to the device that runs.
        train_examples, validation_examples, test_examples: drawn from each split without replacement; None takes all.
        batch_size: examples of one training step, over all processes.
        eval_batch_size: the same in evaluation.
        seed: draws the examples and their order.
        num_workers: of the data loaders. A batch is an index look-up, so 0 suits nearly all data.

    Raises:
        ResponseError: a split has no examples, or fewer than are asked for, or prompts of an earlier one.
        TaskError: the task breaks its contract.
    """

    def __init__(
        self,
        *,
        task: ResponseTask,
        network: Network,
        train_examples: int | None = None,
        validation_examples: int | None = None,
        test_examples: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        if not isinstance(task, ResponseTask):
            raise ResponseError(f"{type(task).__name__} has no responses; its pairs are for data=counterfactual")
        check_responses(task)
        _require_held_out(task)
        asked: dict[Split, int | None] = {
            "train": train_examples,
            "validation": validation_examples,
            "test": test_examples,
        }
        super().__init__(
            network=network,
            sizes={split: self._size(task, split, wanted) for split, wanted in asked.items()},
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        self.task = task

    def collect(self, split: Split) -> ResponseBatch:
        return collate(self.task, self._drawn(split))

    def _drawn(self, split: Split) -> list[Setting]:
        return Random(f"{self.seed} {split}").sample(self.task.settings(split), self.sizes[split])

    def add_rejected(self) -> bool:
        """Give the training examples responses to reject, and say whether the task has them for all of its prompts."""
        settings, dataset = self._drawn("train"), self.datasets["train"]
        found = [each for each in map(self.task.rejected, settings) if each is not None]
        if len(found) == len(settings) and dataset.examples.rejected is None:
            dataset.examples = replace(dataset.examples, rejected=_collated(self.task, settings, found))
        return len(found) == len(settings)

    def example(self) -> ModelInputs:
        return collate(self.task, self.task.settings("train")[:1]).inputs

    def edited(self) -> list[ModelInputs]:
        return [dataset.examples.inputs for dataset in self.datasets.values()]

    def describe(self) -> dict[str, str]:
        counts = ", ".join(f"{len(dataset)} {split}" for split, dataset in self.datasets.items())
        longest = max(dataset.examples.label.shape[1] for dataset in self.datasets.values())
        lines = {"texts": f"{counts}, with responses of up to {longest} tokens"}
        if self.task.exhaustive:
            lines["note"] = f"{type(self.task).__name__} holds no prompts out: those of its test may be trained on"
        first = self.datasets["train"].examples
        response = [token for token in first.label[0].tolist() if token != UNUSED]
        return lines | shown(self.task.tokenizer, first.inputs, self.task.spelled(response))

    def figures(self) -> dict[str, float]:
        """``data/bases_distinct``: how many of the test prompts are different ones."""
        return {"data/bases_distinct": float(len(self.datasets["test"].examples.inputs.keys.unique()))}

    def text(self, tokens: Int[Tensor, " tokens"]) -> str:
        """A response or a generation as text, up to its end token."""
        return self.task.text([token for token in tokens.tolist() if token != UNUSED])

    @staticmethod
    def _size(task: ResponseTask, split: Split, wanted: int | None) -> int:
        count = len(task.settings(split))
        if not count:
            raise ResponseError(f"the {split} split of {type(task).__name__} is empty; give it examples")
        if wanted is not None and not 1 <= wanted <= count:
            raise ResponseError(
                f"data.{split}_examples={wanted}: the {split} split has {count} examples; ask for 1 to {count}, or for "
                "all of them with null"
            )
        return wanted or count


def _require_held_out(task: ResponseTask) -> None:
    """Refuse splits that share prompts, unless the task says that they may."""
    known: dict[Hashable, Split] = {}
    for split in () if task.exhaustive else SPLITS:
        prompts = [task.identity(setting) for setting in task.settings(split)]
        if shared := [prompt for prompt in prompts if prompt in known]:
            raise ResponseError(
                f"{len(shared)} of the {len(prompts)} {split} prompts of {type(task).__name__} are in the "
                f"{known[shared[0]]} split too, for example {shared[0]!r}, so they are not held out; leave them out of "
                "one of the two"
            )
        for prompt in prompts:
            known[prompt] = split
