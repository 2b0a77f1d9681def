"""CounterfactualDataModule: pairs of a task with the causal model's labels, the same in every process."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal, TypeVar, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import DataLoader

from itrain.causal_model import Setting
from itrain.inputs import ModelInputs
from itrain.metrics import UNUSED, is_right
from itrain.networks.base import Network
from itrain.sites import Site
from itrain.splits import Batch, SplitDataModule, SplitDataset
from itrain.tasks.base import Pair, Split, Task, TextTask

ROUNDS = 20
"""How often the sampler is asked for more pairs when the filter leaves too few."""
ENOUGH = 4
"""How many times the pairs that are asked for are sampled at most so that they can be balanced."""

Item = TypeVar("Item")


class PairError(ValueError):
    """The task's pairs cannot be used."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CounterfactualBatch(Batch):
    """Pairs of base and source with the causal model's answers.

    Labels are one token or class, (B,), or several tokens, (B, A), of which the base holds those that the
    counterfactual label has. ``contrast_label`` is the answer that the pairwise rule holds the counterfactual label
    against: the base's answer where the label changes, else the source's, else the task's first other output.
    ``groups`` are the sets of variables that are interchanged together, and ``group`` says which of them a pair is of;
    it and ``isolates`` lie on the CPU. The source of a variable that a pair leaves alone is the base. ``types`` are
    hashes of the base's value of the task's ``control`` variable, the same in every process. ``candidates`` are the
    labels that the task's outputs can have, ascending, on the CPU; None: not known, or of several tokens. ``weight`` is
    what the mean loss of this process's share counts in the mean over processes.
    """

    base: ModelInputs
    sources: Mapping[str, ModelInputs]
    base_label: Int[Tensor, "batch ..."]
    counterfactual_label: Int[Tensor, "batch ..."]
    contrast_label: Int[Tensor, "batch ..."]
    source_labels: Mapping[str, Int[Tensor, "batch ..."]]
    variables: Mapping[str, Int[Tensor, " batch"]]
    groups: tuple[tuple[str, ...], ...]
    group: Int[Tensor, " batch"]
    isolates: Bool[Tensor, " batch"]
    types: Int[Tensor, " batch"] | None = None
    candidates: Int[Tensor, " candidates"] | None = None

    @property
    def changes(self) -> Bool[Tensor, " batch"]:
        """Whether the interchange changes the label."""
        return (self.base_label != self.counterfactual_label).view(len(self), -1).any(1)

    @property
    def values(self) -> Int[Tensor, " batch"] | None:
        """The base's value of the first variable that is interchanged, as a class; None where it has none listed."""
        return next((self.variables[name] for name in self.sources if name in self.variables), None)

    def rows(self, variable: str) -> Int[Tensor, " rows"] | None:
        """The pairs that interchange the variable, on the CPU; None where all do."""
        holds = [variable in group for group in self.groups]
        return None if all(holds) else torch.tensor(holds)[self.group].nonzero()[:, 0]

    def __len__(self) -> int:
        return len(self.base_label)

    def among_candidates(self) -> CounterfactualBatch:
        """The batch with the candidates as all there is: bases answer with their logits, labels are their places.

        A label that is no candidate becomes -1, which losses refuse.

        Raises:
            ValueError: the candidates are not known.
        """
        if self.candidates is None:
            raise ValueError("the labels have no candidates: they are of several tokens, or the batch names none")
        candidates = self.candidates.to(self.base_label.device, non_blocking=True)

        def places(label: Tensor) -> Tensor:
            place = torch.searchsorted(candidates, label).clamp(max=len(candidates) - 1)
            return place.where(candidates[place] == label, -1)

        return replace(
            self,
            base=self.base.among(candidates),
            base_label=places(self.base_label),
            counterfactual_label=places(self.counterfactual_label),
            contrast_label=places(self.contrast_label),
            source_labels={variable: places(label) for variable, label in self.source_labels.items()},
            candidates=None,
        )

    def take(self, rows: Int[Tensor, " rows"]) -> CounterfactualBatch:
        """Some of the pairs, as a batch of its own."""
        taken = self.each(lambda inputs: inputs.take(rows), lambda tensor: tensor[rows])
        return replace(taken, group=self.group[rows], isolates=self.isolates[rows], weight=1.0)

    def each(
        self, change: Callable[[ModelInputs], ModelInputs], change_tensor: Callable[[Tensor], Tensor]
    ) -> CounterfactualBatch:
        return replace(
            self,
            base=change(self.base),
            sources={variable: change(source) for variable, source in self.sources.items()},
            base_label=change_tensor(self.base_label),
            counterfactual_label=change_tensor(self.counterfactual_label),
            contrast_label=change_tensor(self.contrast_label),
            source_labels={variable: change_tensor(labels) for variable, labels in self.source_labels.items()},
            variables={variable: change_tensor(values) for variable, values in self.variables.items()},
            types=None if self.types is None else change_tensor(self.types),
        )


def collate(task: Task, pairs: Sequence[Pair]) -> CounterfactualBatch:
    """The pairs as tensors, labelled by the causal model."""
    model, names = task.causal_model, task.variables
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
    groups = sorted({tuple(pair.sources) for pair in pairs})
    sources = {
        variable: [pair.sources.get(variable, pair.base) for pair in pairs]
        for variable in dict.fromkeys(variable for group in groups for variable in group)
    }
    return CounterfactualBatch(
        base=answerable(task, [pair.base for pair in pairs], counterfactuals),
        sources={variable: task.inputs(settings) for variable, settings in sources.items()},
        base_label=labels(task, outputs),
        counterfactual_label=labels(task, counterfactuals),
        contrast_label=labels(task, contrasts),
        source_labels={
            variable: labels(task, [model.run(setting)[model.output] for setting in settings])
            for variable, settings in sources.items()
        },
        variables={name: torch.tensor([task.values(name).index(base[name]) for base in bases]) for name in names},
        groups=tuple(groups),
        group=torch.tensor([groups.index(tuple(pair.sources)) for pair in pairs]),
        isolates=torch.tensor([pair.isolates for pair in pairs]),
        types=None if task.control is None else torch.tensor([_hash(base[task.control]) for base in bases]),
        candidates=labels(task, task.outputs).unique() if _answers(task) == 1 else None,
    )


def balance(task: Task, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs so ordered that those which change the label and those which do not take turns and, if the task has one
    variable, among either the counterfactual labels; what has run out is left out of the turns."""
    kinds = _in_turn([(_kind(task, pair), pair) for pair in pairs], key=lambda each: each[0])
    return [pair for _, pair in _in_turn(kinds, key=lambda each: each[0][0])]


def is_balanced(task: Task, pairs: Sequence[Pair]) -> bool:
    """Whether the pairs change the label or not equally often, and either to each label, to one pair."""
    kinds = [_kind(task, pair) for pair in pairs]
    halves = Counter(changes for changes, _ in kinds)
    answers = [Counter(answer for changes, answer in kinds if changes == half) for half in halves]
    return all(max(counts.values()) - min(counts.values()) <= 1 for counts in (halves, *answers) if counts)


def _kind(task: Task, pair: Pair) -> tuple[bool, Hashable]:
    """Whether the pair changes the label and, if the task has one variable, to which: with several, labels that go with
    one of them would crowd out the others."""
    model = task.causal_model
    before, after = model.run(pair.base)[model.output], model.interchange(pair.base, pair.sources)[model.output]
    return before != after, after if len(task.variables) == 1 else None


def _in_turn(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[Item]:
    """The first item of each key, then the second of each, and so on."""
    seen: Counter[Hashable] = Counter()
    places = []
    for item in items:
        places.append((seen[key(item)], item))
        seen[key(item)] += 1
    return [item for _, item in sorted(places, key=lambda each: each[0])]


def labels(task: Task, outputs: Sequence[Any]) -> Int[Tensor, "outputs ..."]:
    """The outputs as classes or tokens, (N,), or (N, A) if one of the task's outputs is several tokens."""
    width = _answers(task)
    rows = [list(_tokens(task, output)) for output in outputs]
    padded = torch.tensor([row + [UNUSED] * (width - len(row)) for row in rows])
    return padded[:, 0] if width == 1 else padded


def answerable(task: Task, settings: Sequence[Setting], outputs: Sequence[Any]) -> ModelInputs:
    """The settings as the model sees them when it is asked for these outputs."""
    width = _answers(task)
    if width == 1:
        return task.inputs(settings)
    if not isinstance(task, TextTask):
        raise PairError(f"{type(task).__name__}: only tasks in text can have answers of several tokens")
    inputs = task.inputs(settings, [_tokens(task, output) for output in outputs])
    assert inputs.answer is not None
    first, count = inputs.answer[:, :1], inputs.answer.shape[1]
    return replace(inputs, answer=torch.cat([inputs.answer, first.expand(-1, width - count)], 1))


def _hash(value: Any) -> int:
    """64 bits of a value's text; Python's own hash is another one in each process."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big", signed=True)


def _answers(task: Task) -> int:
    """The most tokens that an answer of the task has."""
    return max(len(_tokens(task, output)) for output in task.outputs)


def _tokens(task: Task, output: Any) -> Sequence[int]:
    label = task.label(output)
    return [label] if isinstance(label, int) else label


class CounterfactualDataModule(SplitDataModule[CounterfactualBatch]):
    """Counterfactual pairs of a task, on which the base model is right.

    Args:
        task: what is asked.
        network: the base model, for the filter and the accuracies that are reported.
        train_pairs, validation_pairs, test_pairs: pairs of each split.
        batch_size: examples of one training step, over all processes.
        eval_batch_size: the same in evaluation.
        keep: ``pairwise`` keeps pairs where the base model prefers the right answer to each other one for base and
            sources, ``argmax`` where it prefers it to the whole vocabulary, ``all`` keeps every pair.
        balanced: whether the label changes in half of the validation and test pairs and, where the task has one
            variable, each answer is right equally often in either half; as far as the task gives such pairs, of up to
            four times as many as are asked for. The training pairs are as the task samples them.
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
        balanced: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            network=network,
            sizes={"train": train_pairs, "validation": validation_pairs, "test": test_pairs},
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        self.task, self.keep, self.balanced = task, keep, balanced
        self.model_accuracy: dict[str, float] = {}
        self._control: SplitDataset[CounterfactualBatch] | None = None

    def example(self) -> ModelInputs:
        return self.task.inputs([self.task.sample(Random(0), "train").base])

    def edited(self) -> list[ModelInputs]:
        return [dataset.examples.base for dataset in self.datasets.values()]

    def read(self) -> list[ModelInputs]:
        return [source for dataset in self.datasets.values() for source in dataset.examples.sources.values()]

    def describe(self) -> dict[str, str]:
        pairs = (
            f"{len(dataset)} {split} ({int(dataset.examples.changes.sum())} change the label)"
            for split, dataset in self.datasets.items()
        )
        return {"pairs": ", ".join(pairs)}

    def facts(self) -> dict[str, float]:
        """``model/accuracy``: of the base model on the test inputs that were drawn, before the filter."""
        return {"model/accuracy": self.model_accuracy["test"]}

    def require(self, sites: Sequence[Site]) -> None:
        super().require(sites)
        for pairs in (dataset.examples for dataset in self.datasets.values()):
            for site in sites:
                for source in pairs.sources.values():
                    pairs.base.require_same_count(source, site)

    def collect(self, split: Split) -> CounterfactualBatch:
        balanced = self.balanced and split != "train"
        return self._sample(split, self.sizes[split], Random(f"{self.seed} {split}"), balanced=balanced)

    def control_dataloader(self) -> DataLoader[CounterfactualBatch]:
        """What control probes are tested on: types that the training split has, in contexts that it has not.

        The examples are the test split's or, where all its types are others, as many drawn as for the training split.

        Raises:
            PairError: every such context is in the training split.
        """
        if self._control is None:
            self._control = SplitDataset(self._held_out_contexts())
        return self.loader(self._control, self.eval_batch_size)

    def _held_out_contexts(self) -> CounterfactualBatch:
        train, found = self.datasets["train"].examples, self.datasets["test"].examples
        assert train.types is not None and found.types is not None, "asked for where the task has a control variable"
        if not torch.isin(found.types, train.types).any():
            found = self._sample("train", self.sizes["test"], Random(f"{self.seed} control"))
        known = torch.isin(cast(Tensor, found.types), train.types)
        seen = torch.isin(found.base.keys, train.base.keys)
        if not (known & ~seen).any():
            raise PairError(
                f"the {len(train)} train pairs leave no context of '{self.task.control}' to test control probes on; "
                "set data.train_pairs lower"
            )
        return found.take((known & ~seen).nonzero()[:, 0])

    def _sample(self, split: Split, wanted: int, random: Random, *, balanced: bool = False) -> CounterfactualBatch:
        """Pairs of a split, sampled until enough of them pass the filter."""
        if wanted < 1:
            raise PairError(f"the {split} split is asked for {wanted} pairs; set data.{split}_pairs to 1 or more")
        kept: list[Pair] = []
        chosen: list[Pair] = []
        for _ in range(ROUNDS):
            pairs = [self.task.sample(random, split) for _ in range(wanted)]
            kept += [pair for pair, right in zip(pairs, self._right(pairs, split), strict=True) if right]
            chosen = (balance(self.task, kept) if balanced else kept)[:wanted]
            even = not balanced or is_balanced(self.task, chosen)
            if len(kept) >= (wanted if even else ENOUGH * wanted):
                break
        if not chosen:
            raise PairError(
                f"no {split} pair is left: on none of {ROUNDS * wanted} is the base model right for base and source "
                f"(accuracy {self.model_accuracy[split]:.2f}); try another model, or data.keep=all"
            )
        batch = collate(self.task, chosen)
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
        others = labels(self.task, self.task.outputs)
        rights: dict[str, list[Tensor]] = {"argmax": [], "pairwise": []}
        for start in range(0, len(settings), self.eval_batch_size):
            chunk = settings[start : start + self.eval_batch_size]
            answers = [self.task.causal_model.run(setting)[self.task.causal_model.output] for setting in chunk]
            label = labels(self.task, answers)
            device = next(self.network.parameters()).device
            logits = self.network(answerable(self.task, chunk, answers).to(device)).cpu()
            wins = [
                is_right(logits, label, other.expand_as(label), "pairwise")
                | (label == other).view(len(label), -1).all(1)
                for other in others
            ]
            rights["argmax"].append(is_right(logits, label))
            rights["pairwise"].append(torch.stack(wins).all(0))
        right = {rule: torch.cat(parts) for rule, parts in rights.items()}
        self.model_accuracy.setdefault(
            split, float(right["argmax" if self.keep == "argmax" else "pairwise"].float().mean())
        )
        if self.keep == "all":
            return [True] * len(pairs)
        return [bool(part.all()) for part in right[self.keep].split([1 + len(pair.sources) for pair in pairs])]
