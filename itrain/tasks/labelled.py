"""Labelled texts: texts, and which of some concepts each has, in splits and in shifted test sets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from itrain.causal_model import Setting
from itrain.signatures import nearest
from itrain.tasks import TaskError
from itrain.tasks.base import SPLITS, Pair, Split, TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLABELLED = -1
"""The label of a text of which it is not known whether it has a concept."""
BASES, DRAWS = 512, 8
"""Texts that are taken of a task's bases for each split, and how often each is drawn anew at most on average."""


class LabelledTask(TextTask):
    """Texts, and which of some concepts each has; there are no variables to interchange.

    Besides train, validation and test there may be *shifts*: test sets in other wordings or styles, by name.
    """

    variables = ()
    concepts: Sequence[str]
    """What is to be told of a text: a name for each label."""
    shifts: Sequence[str] = ()
    """The names of the shifted test sets."""

    @abstractmethod
    def settings(self, split: str) -> Sequence[Setting]:
        """All texts of a split or of a shift, in a fixed order."""

    @abstractmethod
    def labels(self, setting: Setting) -> Sequence[int]:
        """For each concept 1 if the text has it, 0 if not, and ``UNLABELLED`` where that is not known."""

    def kind(self, setting: Setting) -> Hashable | None:
        """The type of a text, which has a label of its own in the control task; None: texts have no types."""
        return None

    def further(self, count: int) -> Sequence[Setting]:
        """More texts like those of the training split, none of which is in a split; none where texts are listed."""
        return ()

    @property
    def outputs(self) -> Sequence[Any]:
        return ()

    def sample(self, random: Random, split: Split) -> Pair:
        return Pair(base=random.choice(self.settings(split)), sources={})


class LabelledBases(LabelledTask):
    """The bases of another task as labelled texts: what its causal model says of them are the labels.

    A variable of two values is the concept ``variable=value`` of its last value, or of the ``positive`` one; of more
    values each is a concept. No text of a later split, or of a shift, is in an earlier one.

    Args:
        task: samples the bases.
        variables: those whose values are the labels; None: the task's.
        positive: by variable, the value that is the concept.
        shifts: shifted test sets by name, each from the test bases of a task with the same variables.
        counts: the texts of each split that are sampled; a shift has as many as the test. A task of fewer gives fewer.
        seed: draws the texts.

    Raises:
        TaskError: a variable or a value is none of the task's, or a task is not in text.
    """

    def __init__(
        self,
        *,
        task: TextTask | None = None,
        variables: Sequence[str] | None = None,
        positive: Mapping[str, Any] | None = None,
        shifts: Mapping[str, TextTask] | None = None,
        counts: Mapping[Split, int] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(task, TextTask):
            raise TaskError(f"labelled texts are taken from the bases of a task in text, not {type(task).__name__}")
        self.task = task
        self.tasks: dict[str, TextTask] = {**dict.fromkeys(SPLITS, task), **dict(shifts or {})}
        self.shifts = list(shifts or {})
        self.classes = dict(_classes(task, variables or task.variables, positive or {}))
        self.concepts = [f"{name}={value}" for name, values in self.classes.items() for value in values]
        self.counts: dict[Split, int] = {**dict.fromkeys(SPLITS, BASES), **(counts or {})}
        self.seed = seed
        self.causal_model = task.causal_model
        self._settings: dict[str, list[Setting]] = {}
        if task._tokenizer is not None:
            self.bind(task.tokenizer)

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().bind(tokenizer)
        for each in self.tasks.values():
            each.bind(tokenizer)

    def settings(self, split: str) -> Sequence[Setting]:
        if not self._settings:
            self._sample()
        return self._settings[split]

    def labels(self, setting: Setting) -> Sequence[int]:
        found = setting["task"].causal_model.run(setting["base"])
        return [int(found[name] == value) for name, values in self.classes.items() for value in values]

    def template(self, setting: Setting) -> str:
        return setting["task"].template(setting["base"])

    def label(self, output: Any) -> Any:
        return self.task.label(output)

    def identity(self, setting: Setting) -> Hashable:
        return setting["task"].identity(setting["base"])

    def kind(self, setting: Setting) -> Hashable | None:
        task: TextTask = setting["task"]
        return None if task.control is None else task.causal_model.run(setting["base"])[task.control]

    def further(self, count: int) -> Sequence[Setting]:
        known = {self.identity(each) for split in self.tasks for each in self.settings(split)}
        return self._drawn("train", "control", count, known)

    def _render(self, setting: Setting) -> tuple[str, dict[str, tuple[int, int]]]:
        return setting["task"]._render(setting["base"])

    def _sample(self) -> None:
        """Draw the texts of all splits and shifts, none of them twice."""
        known: set[Hashable] = set()
        for split in self.tasks:
            of: Split = split if split in SPLITS else "test"  # type: ignore[assignment]
            self._settings[split] = self._drawn(split, split, self.counts[of], known)
            known |= set(map(self.identity, self._settings[split]))

    def _drawn(self, split: str, name: str, wanted: int, known: Collection[Hashable]) -> list[Setting]:
        """Texts of a split or shift that are not known, drawn by a name."""
        task, random = self.tasks[split], Random(f"{self.seed} {name}")
        of: Split = split if split in SPLITS else "test"  # type: ignore[assignment]
        found: dict[Hashable, Setting] = {}
        for _ in range(DRAWS * wanted):
            setting = {"task": task, "base": task.sample(random, of).base}
            text = self.identity(setting)
            if text not in known:
                found.setdefault(text, setting)
            if len(found) == wanted:
                break
        return list(found.values())


def _classes(
    task: TextTask, variables: Sequence[str], positive: Mapping[str, Any]
) -> Iterator[tuple[str, Sequence[Any]]]:
    """Of each variable the values that are concepts."""
    if stray := sorted(positive.keys() - set(variables)):
        raise TaskError(f"positive: '{stray[0]}' is no variable that is read{nearest(stray[0], variables)}")
    for name in variables:
        values = list(task.values(name))
        if name in positive:
            if positive[name] not in values:
                listed = ", ".join(map(str, values))
                raise TaskError(f"positive: '{name}' is never {positive[name]!r}; it is one of {listed}")
            values = [positive[name]]
        yield name, values if len(values) > 2 or name in positive else values[-1:]
