"""CounterfactualBatch: pairs of base and source as tensors, labelled by the causal model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from itrain.causal_model import Setting
from itrain.data.splits import Batch
from itrain.inputs import ModelInputs
from itrain.metrics import UNUSED
from itrain.tasks import TaskError
from itrain.tasks.base import Pair, Question, Task, TextTask
from itrain.tasks.contract import answer_length, label_tokens


class PairError(ValueError):
    """The task's pairs cannot be used."""


class Interchanging:
    """Runs of which each interchanges some variables: those of its group."""

    groups: tuple[tuple[str, ...], ...]
    group: Int[Tensor, " batch"]

    def rows(self, variable: str) -> Int[Tensor, " rows"] | None:
        """The runs that interchange the variable, on the CPU; None where all do."""
        holds = [variable in group for group in self.groups]
        return None if all(holds) else torch.tensor(holds)[self.group].nonzero()[:, 0]


@dataclass(eq=False, kw_only=True)
class IntervenedInputs(ModelInputs, Interchanging):
    """The inputs of sources that are intervened runs: each is edited by sources of its own before it is read.

    They are taken, moved and pinned together with their sources. Whoever runs them as inputs runs them unedited.

    Args:
        sources: for each variable, the runs its value is taken from, which may be intervened too.
        groups, group: as in :class:`CounterfactualBatch`; a run that nothing edits belongs to the empty group.
    """

    sources: Mapping[str, ModelInputs]
    groups: tuple[tuple[str, ...], ...]
    group: Int[Tensor, " batch"]

    @classmethod
    def of(cls, inputs: ModelInputs, sources: Sources) -> IntervenedInputs:
        """The inputs, edited by these sources."""
        given = {each.name: getattr(inputs, each.name) for each in fields(ModelInputs) if each.init}
        made = cls(**given, **sources._asdict())
        made._with(**inputs._known())
        return made

    @property
    def base(self) -> ModelInputs:
        """The runs that are edited."""
        return self

    def take(self, rows: Int[Tensor, " rows"]) -> IntervenedInputs:
        sources = {variable: source.take(rows) for variable, source in self.sources.items()}
        return IntervenedInputs.of(super().take(rows), Sources(sources, self.groups, self.group[rows]))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> IntervenedInputs:
        sources = {variable: source.to(device, non_blocking) for variable, source in self.sources.items()}
        return IntervenedInputs.of(super().to(device, non_blocking), Sources(sources, self.groups, self.group))

    def pin_memory(self) -> IntervenedInputs:
        sources = {variable: source.pin_memory() for variable, source in self.sources.items()}
        return IntervenedInputs.of(super().pin_memory(), Sources(sources, self.groups, self.group))


class Sources(NamedTuple):
    """What edits some runs: the sources of each variable, and the group of variables that each run interchanges."""

    sources: Mapping[str, ModelInputs]
    groups: tuple[tuple[str, ...], ...]
    group: Int[Tensor, " batch"]


@dataclass(eq=False, kw_only=True)
class CounterfactualBatch(Batch, Interchanging):
    """Pairs of base and source with the causal model's labels.

    Labels are one token or class, (B,), or several, (B, A); a base label is cut or padded to the tokens of its
    counterfactual label. The source of a variable that a pair does not interchange is the base.

    Args:
        base: the runs that are edited; of answers of several tokens, with those of the counterfactual answer.
        sources: for each variable, the runs its value is taken from; :class:`IntervenedInputs` where some of them are
            intervened themselves.
        base_label: the causal model's answer for the base.
        counterfactual_label: its answer after the interchange.
        contrast_label: the answer that the pairwise rule compares the counterfactual label with: the base's where the
            label changes, else the source's, else the task's first other output.
        source_labels: its answer for the sources of each variable, as they are before anything edits them.
        variables: the base's value of each variable, as a class.
        groups: the sets of variables that are interchanged together.
        group: which of the groups a pair belongs to, on the CPU.
        isolates: whether nothing may change, on the CPU.
        types: hashes of the base's value of the task's ``control`` variable.
        candidates: the labels of the task's outputs, ascending, on the CPU; None: unknown, or of several tokens.
        questions: what the bases of a split ask, in order; empty where the task does not say.
        question: which of the questions a pair's base asks, on the CPU.
        difference: by how much the logit of the first of the two labels ``compared`` should be above that of the second
            after the interchange; None: the task does not say.
        answered, answered_sources: the bases and the sources, unedited and each with the tokens of its own answer;
            where answers are of one token these are ``base`` and ``sources``.
        natural: inputs whose unedited runs have the variables of each pair's counterfactual run, in several draws;
            empty unless a training asks for them.
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
    questions: tuple[Question, ...] = ()
    question: Int[Tensor, " batch"] | None = None
    difference: Float[Tensor, " batch"] | None = None
    compared: Int[Tensor, "batch 2 ..."] | None = None
    answered: ModelInputs | None = None
    answered_sources: Mapping[str, ModelInputs] = field(default_factory=dict)
    natural: tuple[ModelInputs, ...] = ()

    @property
    def own(self) -> ModelInputs:
        """The bases as they answer themselves, for ``base_label``."""
        return self.base if self.answered is None else self.answered

    def own_source(self, variable: str) -> ModelInputs:
        """The sources of a variable as they answer themselves, for ``source_labels``."""
        return self.answered_sources.get(variable, self.sources[variable])

    @property
    def changes(self) -> Bool[Tensor, " batch"]:
        """Whether the interchange changes the label."""
        return (self.base_label != self.counterfactual_label).view(len(self), -1).any(1)

    def __len__(self) -> int:
        return len(self.base_label)

    def among_candidates(self) -> CounterfactualBatch:
        """The batch restricted to the candidates: bases answer with their logits alone, labels are indices among them.

        A label that is no candidate becomes -1, at which losses raise.

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
            compared=None if self.compared is None else places(self.compared),
        )

    def take(self, rows: Int[Tensor, " rows"]) -> CounterfactualBatch:
        """Some of the pairs, as a batch of its own."""
        taken = self.each(lambda inputs: inputs.take(rows), lambda tensor: tensor[rows])
        question = None if self.question is None else self.question[rows]
        return replace(taken, group=self.group[rows], isolates=self.isolates[rows], question=question, weight=1.0)

    def each(
        self, change: Callable[[ModelInputs], ModelInputs], change_tensor: Callable[[Tensor], Tensor]
    ) -> CounterfactualBatch:
        return replace(
            self,
            base=change(self.base),
            sources={variable: change(source) for variable, source in self.sources.items()},
            answered=None if self.answered is None else change(self.answered),
            answered_sources={variable: change(source) for variable, source in self.answered_sources.items()},
            natural=tuple(change(inputs) for inputs in self.natural),
            base_label=change_tensor(self.base_label),
            counterfactual_label=change_tensor(self.counterfactual_label),
            contrast_label=change_tensor(self.contrast_label),
            source_labels={variable: change_tensor(labels) for variable, labels in self.source_labels.items()},
            variables={variable: change_tensor(values) for variable, values in self.variables.items()},
            types=None if self.types is None else change_tensor(self.types),
            difference=None if self.difference is None else change_tensor(self.difference),
            compared=None if self.compared is None else change_tensor(self.compared),
        )


Runs: TypeAlias = CounterfactualBatch | IntervenedInputs
"""Runs that sources edit: the bases of pairs, or sources that are intervened in their turn."""


def collate(task: Task, pairs: Sequence[Pair]) -> CounterfactualBatch:
    """The pairs as tensors, labelled by the causal model."""
    model, names = task.causal_model, task.variables
    bases = [model.run(pair.base) for pair in pairs]
    counterfactuals = [task.counterfactual(pair) for pair in pairs]
    outputs = [base[model.output] for base in bases]
    contrasts = [
        _contrast(task, [model.run(setting)[model.output] for setting in pair.settings()], new)
        for new, pair in zip(counterfactuals, pairs, strict=True)
    ]
    sources = _sources(task, pairs)
    difference, compared = _differences(task, pairs)
    asked = [task.question(pair.base) for pair in pairs]
    questions = () if None in asked else tuple(sorted({each for each in asked if each is not None}))
    places = {question: place for place, question in enumerate(questions)}
    counterfactual_label = labels(task, counterfactuals)
    return CounterfactualBatch(
        base=answerable(task, [pair.base for pair in pairs], counterfactuals),
        **sources._asdict(),
        base_label=labels(task, outputs),
        counterfactual_label=counterfactual_label,
        contrast_label=labels(task, contrasts),
        source_labels={
            variable: labels(task, [model.run(_pair(each).base)[model.output] for each in _runs(pairs, variable)])
            for variable in sources.sources
        },
        variables={name: torch.tensor([_place(task, name, base[name]) for base in bases]) for name in names},
        isolates=torch.tensor([pair.isolates for pair in pairs]),
        types=None if task.control is None else torch.tensor([_hash(base[task.control]) for base in bases]),
        candidates=labels(task, task.outputs).unique() if answer_length(task) == 1 else None,
        questions=questions,
        question=torch.tensor([places[each] for each in asked if each is not None]) if questions else None,
        difference=difference,
        compared=compared,
        **(_answered(task, pairs, list(sources.sources)) if counterfactual_label.ndim > 1 else {}),
    )


def _answered(task: Task, pairs: Sequence[Pair], variables: Sequence[str]) -> dict[str, Any]:
    """The bases and each variable's sources, as they are before anything edits them, followed by their own answers."""

    def answering(settings: Sequence[Setting]) -> ModelInputs:
        answers = [task.causal_model.run(setting)[task.causal_model.output] for setting in settings]
        # Where the answer is not known nothing counts, whatever follows.
        some = next(iter(task.outputs))
        return answerable(task, settings, [some if answer is None else answer for answer in answers])

    of_variables = {name: [_pair(each).base for each in _runs(pairs, name)] for name in variables}
    return {
        "answered": answering([pair.base for pair in pairs]),
        "answered_sources": {name: answering(settings) for name, settings in of_variables.items()},
    }


def _differences(
    task: Task, pairs: Sequence[Pair]
) -> tuple[Float[Tensor, " batch"], Int[Tensor, "batch 2 ..."]] | tuple[None, None]:
    """By how much the logits of which outputs should lie apart, where the task says so of all pairs."""
    found = [each for each in map(task.difference, pairs) if each is not None]
    if len(found) < len(pairs):
        return None, None
    compared = [labels(task, outputs) for outputs in zip(*((each.more, each.less) for each in found), strict=True)]
    return torch.tensor([each.value for each in found]), torch.stack(compared, 1)


def _sources(task: Task, pairs: Sequence[Pair]) -> Sources:
    """The sources of each variable as inputs of the model, and the variables that each pair interchanges."""
    # By the task's order, so that {left, right} and {right, left} are one set.
    order = {variable: place for place, variable in enumerate(task.variables)}
    together = [tuple(sorted(pair.sources, key=lambda each: (order.get(each, len(order)), each))) for pair in pairs]
    groups = sorted(set(together))
    sources = {}
    for variable in dict.fromkeys(variable for group in groups for variable in group):
        runs = [_pair(run) for run in _runs(pairs, variable)]
        inputs = task.inputs([run.base for run in runs])
        edited = any(run.sources for run in runs)
        sources[variable] = IntervenedInputs.of(inputs, _sources(task, runs)) if edited else inputs
    return Sources(sources, tuple(groups), torch.tensor([groups.index(each) for each in together]))


def _runs(pairs: Sequence[Pair], variable: str) -> list[Setting | Pair]:
    """The sources of a variable; a pair that does not interchange it has its base in their place."""
    return [pair.sources.get(variable, pair.base) for pair in pairs]


def _pair(source: Setting | Pair) -> Pair:
    """The source as a run that others may edit."""
    return source if isinstance(source, Pair) else Pair(base=source, sources={})


def labels(task: Task, outputs: Sequence[Any]) -> Int[Tensor, "outputs ..."]:
    """The outputs as classes or tokens, (N,), or (N, A) if one of the task's is several tokens; None is padding."""
    width = answer_length(task)
    rows = [[] if output is None else list(label_tokens(task, output)) for output in outputs]
    for output, row in zip(outputs, rows, strict=True):
        if len(row) > width:
            raise TaskError(f"task {type(task).__name__}: outputs lacks {output!r}, which a pair has")
    padded = torch.tensor([row + [UNUSED] * (width - len(row)) for row in rows])
    return padded[:, 0] if width == 1 else padded


def answerable(task: Task, settings: Sequence[Setting], outputs: Sequence[Any]) -> ModelInputs:
    """The settings as inputs of the model, with the tokens or classes of these outputs to predict."""
    width = answer_length(task)
    if width == 1:
        return task.inputs(settings)
    answers = [label_tokens(task, output) for output in outputs]
    if not isinstance(task, TextTask):
        return task.told(settings, answers)
    inputs = task.inputs(settings, answers)
    assert inputs.answer is not None
    first, count = inputs.answer[:, :1], inputs.answer.shape[1]
    return replace(inputs, answer=torch.cat([inputs.answer, first.expand(-1, width - count)], 1))


def _contrast(task: Task, answers: Sequence[Any], new: Any) -> Any:
    """The first of the pair's answers, or of the task's outputs, that is another than the new one."""
    for other in chain(answers, task.outputs):
        if other is not None and other != new:
            return other
    raise TaskError(f"task {type(task).__name__}: outputs has no other value than {new!r}; list two or more")


def _hash(value: Any) -> int:
    """64 bits of a value's text; Python's own hash differs between processes."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big", signed=True)


def _place(task: Task, variable: str, value: Any) -> int:
    """The value as a class."""
    listed = task.values(variable)
    if value not in listed:
        raise TaskError(f"task {type(task).__name__}: values('{variable}') lacks {value!r}, which a pair has")
    return listed.index(value)
