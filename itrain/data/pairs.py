"""CounterfactualDataModule: pairs of a task with the causal model's labels, the same in every process."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import product
from random import Random
from typing import Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from itrain.causal_model import Setting
from itrain.data.answered import Answered
from itrain.data.balance import balance, is_balanced
from itrain.data.counterfactual import (
    CounterfactualBatch,
    IntervenedInputs,
    PairError,
    Runs,
    answerable,
    collate,
    labels,
)
from itrain.data.splits import SplitDataModule, SplitDataset
from itrain.devices import device_of
from itrain.inputs import ModelInputs
from itrain.metrics import UNUSED, beats, is_right
from itrain.networks.base import Network
from itrain.placements import Placement, require_served
from itrain.tasks import TaskError
from itrain.tasks.base import Pair, Split, Task, TextTask
from itrain.tasks.contract import at_fault, check_task, pair_identity
from itrain.tasks.sequences import Sequences
from itrain.tasks.tokens import shown
from itrain.weights import without_values

ROUNDS = 20
"""How often the sampler is asked for more pairs while the filter leaves too few."""
SIZES: dict[Split, int] = {"train": 512, "validation": 128, "test": 256}
"""Pairs that are sampled of each split unless a number is given."""
ENOUGH = 4
"""Pairs sampled at most to balance a split, as a multiple of its size."""


class CounterfactualDataModule(SplitDataModule[CounterfactualBatch]):
    """Counterfactual pairs of a task that the base model answers correctly.

    No validation or test pair is in an earlier split, and none is there twice: such pairs are drawn again. A task that
    has too few gives smaller splits, and none to a task that leaves no pair out; see
    :attr:`~itrain.tasks.base.Task.exhaustive` for those that cannot.

    The pairs of a task that lists them are taken as they are: none is drawn twice or reordered to balance a split.

    Args:
        task: samples and labels the pairs, or lists them.
        network: the base model, for the filter and its reported accuracy.
        train_pairs, validation_pairs, test_pairs: pairs of each split. None takes 512, 128 and 256 of a task that
            samples them, and all of one that lists them; a number takes as many of these at random, or all
            where there are fewer.
        batch_size: examples of one training step, over all processes.
        eval_batch_size: the same in evaluation.
        keep: ``pairwise`` keeps pairs for whose base and sources the base model prefers the right answer to each other
            one, ``argmax`` those for which it prefers it to the whole vocabulary, ``all`` keeps every pair.
        balanced: whether the label changes in half of the validation and test pairs and, where the task has one
            variable, each answer is equally frequent in either half. Up to four times as many pairs are sampled for
            it. The training pairs are as the task samples them.
        seed: draws the pairs and their order.
        num_workers: of the data loaders. A batch is an index look-up, so 0 suits nearly all data.

    Raises:
        PairError: a split has no pairs, or none in which the label changes.
        TaskError: the task breaks its contract.
    """

    def __init__(
        self,
        *,
        task: Task,
        network: Network,
        train_pairs: int | None = None,
        validation_pairs: int | None = None,
        test_pairs: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        keep: Literal["pairwise", "argmax", "all"] = "pairwise",
        balanced: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        check_task(task)
        given: dict[Split, int | None] = {"train": train_pairs, "validation": validation_pairs, "test": test_pairs}
        super().__init__(
            network=network,
            sizes={split: _size(task, split) if size is None else size for split, size in given.items()},
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        self.task, self.keep, self.balanced = task, keep, balanced
        self.model_accuracy: dict[str, float] = {}
        self._answered: dict[Split, Answered] = {}
        self._known: dict[Split, list[tuple[Hashable, ...]]] = {}
        """The identities of each split's pairs."""
        self.pairs: dict[Split, Sequence[Pair]] = {}
        self._control: SplitDataset[CounterfactualBatch] | None = None

    def example(self) -> ModelInputs:
        return self.task.inputs([self.task.draw(Random(0), "train").base])

    def edited(self) -> list[ModelInputs]:
        return [dataset.examples.base for dataset in self.datasets.values()]

    def read(self) -> list[ModelInputs]:
        found = []
        for dataset in self.datasets.values():
            found += [*_untouched(dataset.examples), *dataset.examples.natural]
        return found

    def describe(self) -> dict[str, str]:
        train = self.datasets["train"].examples
        counts = []
        for split, dataset in self.datasets.items():
            wanted, answered = self.sizes[split], self._answered.get(split)
            why = "the task has no more" if answered is None else answered.why_fewer
            fewer = "" if len(dataset) == wanted else f" of {wanted}: {why}"
            counts.append(f"{len(dataset)} {split}{fewer} ({int(dataset.examples.changes.sum())} change the label)")
        lines = {"pairs": ", ".join(counts)} | (self._answered["test"].warning if self._answered else {})
        if (depth := _depth(train)) > 1:
            lines["sources"] = f"intervened runs themselves, in chains of up to {depth}"
        if self.task.exhaustive:
            lines["note"] = f"{type(self.task).__name__} holds no pairs out: its test pairs are among those trained on"
        elif seen := self.trained_on:
            lines["note"] = f"{seen} of the test bases are bases of training pairs too, with other sources"
        if isinstance(self.task, TextTask):
            answer = [token for token in train.base_label[0].view(-1).tolist() if token != UNUSED]
            lines |= shown(self.task.tokenizer, train.base, self.task.spelled(answer))
        return lines | dict(self.task.notes)

    def figures(self) -> dict[str, float]:
        """Figures about the test data, for a run's results.

        ``model/accuracy``: the base model's accuracy on the inputs, before the filter. ``data/pairs_distinct``
        and ``data/bases_distinct``: how many of the pairs, and of their bases, are different ones.
        ``data/bases_trained_on``: how many of the bases are bases of training pairs too.
        """
        pairs = self._known["test"]
        return {
            "model/accuracy": self.model_accuracy["test"],
            "data/pairs_distinct": float(len(set(pairs))),
            "data/bases_distinct": float(len({base for base, *_ in pairs})),
            "data/bases_trained_on": float(self.trained_on),
        }

    @property
    def trained_on(self) -> int:
        """The number of test pairs whose base is the base of a training pair too."""
        trained = {base for base, *_ in self._known.get("train", ())}
        return sum(base in trained for base, *_ in self._known.get("test", ()))

    def require(self, placements: Sequence[Placement]) -> None:
        """Refuse placements that these pairs do not fit: in their positions, token counts or variables.

        Raises:
            PositionError: naming the site and the example.
            ValueError: naming a variable that the task lacks, or that pairs interchange and no placement serves.
        """
        splits = [dataset.examples for dataset in self.datasets.values()]
        if any(each.variables is not None for each in placements):
            interchanged = [variable for pairs in splits for variable in _interchanged(pairs)]
            require_served(placements, dict.fromkeys(interchanged), self.task.variables)
        for pairs, each in product(splits, placements):
            pairs.base.require(each.write)
            _require_sources(pairs, each)

    def collect(self, split: Split) -> CounterfactualBatch:
        held_out = split != "train" and not self.task.exhaustive
        known = {pair for pairs in self._known.values() for pair in pairs} if held_out else None
        listed = self.task.pairs(split)
        if listed is not None:
            pairs = self._listed(split, listed, without=known or set())
        else:
            random, balanced = Random(f"{self.seed} {split}"), self.balanced and split != "train"
            pairs = self._sample(split, self.sizes[split], random, balanced=balanced, without=known)
        self._known[split], self.pairs[split] = [pair_identity(self.task, pair) for pair in pairs], pairs
        return self._collated(split, pairs)

    def control_dataloader(self) -> DataLoader[CounterfactualBatch]:
        """Test examples of control probes: types of the training split in contexts it does not have.

        They come from the test split or, where it shares no type with the training split, are drawn as its examples.

        Raises:
            PairError: every such context is in the training split.
        """
        if self._control is None:
            self._control = SplitDataset(self._held_out_contexts())
        return self.loader(self._control, self.eval_batch_size)

    def _held_out_contexts(self) -> CounterfactualBatch:
        train, found = self.datasets["train"].examples, self.datasets["test"].examples
        assert train.types is not None and found.types is not None, "only tasks with a control variable have controls"
        if not torch.isin(found.types, train.types).any():
            drawn = self._sample("train", self.sizes["test"], Random(f"{self.seed} control"), without=set())
            found = self._collated("train", drawn)
        known = torch.isin(cast(Tensor, found.types), train.types)
        seen = torch.isin(found.base.keys, train.base.keys)
        if not (known & ~seen).any():
            raise PairError(
                f"the {len(train)} train pairs leave no context of '{self.task.control}' to test control probes on; "
                "set data.train_pairs lower"
            )
        return found.take((known & ~seen).nonzero()[:, 0])

    def _sample(
        self,
        split: Split,
        wanted: int,
        random: Random,
        *,
        balanced: bool = False,
        without: set[tuple[Hashable, ...]] | None = None,
    ) -> list[Pair]:
        """Pairs of a split, sampled until enough of them pass the filter.

        ``without`` holds the pairs that may not be drawn, to which those drawn are added; None: pairs may repeat.
        """
        if wanted < 1:
            raise PairError(f"the {split} split has {wanted} pairs; set data.{split}_pairs to 1 or more")
        kept: list[Pair] = []
        chosen: list[Pair] = []
        drawn = 0
        for _ in range(ROUNDS):
            pairs = self._new([self.task.draw(random, split) for _ in range(wanted)], without)
            drawn += len(pairs)
            if not pairs:
                continue
            kept += [pair for pair, right in zip(pairs, self._right(pairs, split), strict=True) if right]
            chosen = (balance(self.task, kept) if balanced else kept)[:wanted]
            even = not balanced or is_balanced(self.task, chosen)
            if len(kept) >= (wanted if even else ENOUGH * wanted):
                break
        if not drawn:
            raise PairError(
                f"{type(self.task).__name__} samples no {split} pair that is in no earlier split, so none would be "
                "held out; let sample() draw each split from settings of its own, set data.train_pairs lower, or set "
                "exhaustive = True on a task that has no more"
            )
        self._require_left(split, chosen, drawn)
        return chosen

    def _require_left(self, split: Split, kept: Sequence[Pair], drawn: int) -> None:
        """Refuse a filter that leaves none of the pairs."""
        if not kept:
            raise PairError(
                f"no {split} pair is left: the base model answers base and source correctly in none of {drawn} pairs "
                f"(accuracy {self.model_accuracy[split]:.2f}); try another model, or data.keep=all"
            )

    def _listed(self, split: Split, pairs: Sequence[Pair], *, without: set[tuple[Hashable, ...]]) -> list[Pair]:
        """The listed pairs of a split that pass the filter; none may be in ``without``."""
        name, wanted = type(self.task).__name__, self.sizes[split]
        if wanted < 1:
            raise PairError(f"data.{split}_pairs={wanted} takes no pairs; ask for 1 or more, or leave it out for all")
        if wanted < len(pairs):
            pairs = Random(f"{self.seed} {split}").sample(pairs, wanted)
        try:
            if again := next((pair for pair in pairs if pair_identity(self.task, pair) in without), None):
                raise PairError(
                    f"{again.place or name}: this {split} pair is in an earlier split too; leave it out of one of them"
                )
            rights = self._right(pairs, split)
        except TaskError as error:
            raise at_fault(self.task, pairs, error) from error
        kept = [pair for pair, right in zip(pairs, rights, strict=True) if right]
        self._require_left(split, kept, len(pairs))
        return kept

    def _new(self, pairs: Sequence[Pair], without: set[tuple[Hashable, ...]] | None) -> list[Pair]:
        """The pairs that are not in ``without``, which then has them."""
        if without is None:
            return list(pairs)
        found = []
        for pair in pairs:
            identity = pair_identity(self.task, pair)
            if identity not in without:
                without.add(identity)
                found.append(pair)
        return found

    def _collated(self, split: Split, pairs: Sequence[Pair]) -> CounterfactualBatch:
        batch = collate(self.task, pairs)
        if not bool(batch.changes.any()):
            raise PairError(
                f"the label changes in none of the {len(batch)} {split} pairs, so there is nothing to learn; "
                f"base model accuracy on the inputs before any filter: {self.model_accuracy[split]:.2f} "
                f"(data.keep={self.keep})"
            )
        return batch

    @torch.no_grad()
    def _right(self, pairs: Sequence[Pair], split: Split) -> list[bool]:
        """Whether the base model answers base and sources correctly, at any depth, by the rule of ``keep``."""
        if without_values():
            self.model_accuracy[split] = float("nan")
            return [True] * len(pairs)
        of_pairs = [self._asked(pair) for pair in pairs]
        settings = [setting for of_pair in of_pairs for setting in of_pair]
        outputs = self.task.outputs
        others = None if isinstance(outputs, Sequences) else labels(self.task, outputs)
        rights: dict[str, list[Tensor]] = {"argmax": [], "pairwise": []}
        right_answers = [self.task.causal_model.run(setting)[self.task.causal_model.output] for setting in settings]
        for start in range(0, len(settings), self.eval_batch_size):
            chunk, answers = (each[start : start + self.eval_batch_size] for each in (settings, right_answers))
            label = labels(self.task, answers)
            device = device_of(self.network)
            logits = self.network(answerable(self.task, chunk, answers).to(device)).cpu()
            self._require_classes(label if others is None else others, logits.shape)
            rights["argmax"].append(is_right(logits, label))
            if others is None:  # a sequence beats all others where it does at each place
                rights["pairwise"].append(rights["argmax"][-1])
                continue
            same = (label[:, None] == others).view(len(label), len(others), -1).all(2)
            rights["pairwise"].append((beats(logits, label, others) | same).all(1))
        right = {rule: torch.cat(parts) for rule, parts in rights.items()}
        accuracy = float(right["argmax" if self.keep == "argmax" else "pairwise"].float().mean())
        self.model_accuracy.setdefault(split, accuracy)
        if self.keep == "all":
            return [True] * len(pairs)
        found = [bool(part.all()) for part in right[self.keep].split(list(map(len, of_pairs)))]
        self._answered.setdefault(split, Answered.of(accuracy, right_answers)).count(found)
        return found

    def _asked(self, pair: Pair) -> list[Setting]:
        """The settings that the base model must answer for the pair to be kept."""
        model = self.task.causal_model
        return [each for each in (*pair.settings(), *pair.known) if model.run(each)[model.output] is not None]

    def _require_classes(self, labels: Tensor, logits: Sequence[int]) -> None:
        """Refuse labels that the model has no logits for, of the shape that its answers have."""
        name = f"task {type(self.task).__name__}"
        if tuple(logits[1:-1]) != tuple(labels.shape[1:]):
            places = labels.shape[1] if labels.ndim > 1 else 1
            raise TaskError(
                f"{name}: answers are {places} class{'es' * (places > 1)}, and the model's output has shape "
                f"{tuple(logits)}; let it be (examples, {f'{places}, ' * (places > 1)}classes)"
            )
        if int(labels.max()) >= logits[-1]:
            raise TaskError(
                f"{name}: the largest label is {int(labels.max())}, and the model gives {logits[-1]} logits, counted "
                "from 0; check label(), or take a model of this task"
            )


def _size(task: Task, split: Split) -> int:
    listed = task.pairs(split)
    return SIZES[split] if listed is None else len(listed)


def _taken(runs: Runs) -> Iterator[tuple[str, Tensor | None, ModelInputs]]:
    """Each variable, the runs that interchange it, and their sources."""
    for variable, source in runs.sources.items():
        rows = runs.rows(variable)
        yield variable, rows, source if rows is None else source.take(rows)


def _untouched(runs: Runs) -> list[ModelInputs]:
    """The sources that nothing edits, at any depth."""
    found = []
    for _, _, source in _taken(runs):
        found += _untouched(source) if isinstance(source, IntervenedInputs) else [source]
    return found


def _interchanged(runs: Runs) -> list[str]:
    """The variables that are interchanged, at any depth."""
    inner = [each for each in runs.sources.values() if isinstance(each, IntervenedInputs)]
    return [*runs.sources, *(variable for each in inner for variable in _interchanged(each))]


def _depth(runs: Runs) -> int:
    """How many runs lie above one another."""
    return 1 + max((_depth(each) for each in runs.sources.values() if isinstance(each, IntervenedInputs)), default=0)


def _require_sources(runs: Runs, placement: Placement) -> None:
    """Refuse sources in which the placement reads no token, or not as many as it writes, at any depth."""
    for variable, rows, source in _taken(runs):
        if placement.serves(variable):
            source.require(placement.read)
            if isinstance(runs, IntervenedInputs):
                (runs if rows is None else runs.take(rows)).require(placement.write)
            if placement.names_tokens:
                runs.base.require_same_count(runs.sources[variable], placement.write, placement.read, rows)
        if isinstance(source, IntervenedInputs):
            _require_sources(source, placement)
