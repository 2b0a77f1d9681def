"""The contract of a task, checked on a few of its samples before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor

from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ModelInputs
from itrain.signatures import nearest
from itrain.tasks import TaskError
from itrain.tasks.base import SPLITS, Pair, Split, Task, TextTask
from itrain.tasks.responses import ResponseTask
from itrain.tasks.sequences import Sequences, listable

SAMPLES = 16
"""Pairs of each split that are looked at."""
Answer = TypeVar("Answer")


def label_tokens(task: Task, output: Any) -> tuple[int, ...]:
    """The class, or the tokens, that stand for an output.

    Raises:
        TaskError: the label is none of these.
    """
    label = task.label(output)
    tokens = (label,) if isinstance(label, Integral) else label
    if not isinstance(tokens, Sequence) or not tokens or not all(isinstance(each, Integral) for each in tokens):
        raise TaskError(f"{_name(task)}: label({output!r}) is {label!r}; return a class, a token or several tokens")
    if min(tokens) < 0:
        raise TaskError(f"{_name(task)}: label({output!r}) is {label!r}; classes and tokens count from 0")
    return tuple(int(each) for each in tokens)


def answer_length(task: Task) -> int:
    """The number of tokens or classes of the task's longest answer."""
    if isinstance(task.outputs, Sequences):
        return task.outputs.length
    return max(len(label_tokens(task, output)) for output in task.outputs)


def count_classes(task: Task, variable: str) -> int:
    """The number of values of a variable, which probes tell apart.

    Raises:
        TaskError: there are not two.
    """
    if (count := len(task.values(variable))) < 2:
        raise TaskError(
            f"{_name(task)}: '{variable}' has {count} value, and probes tell values apart; let values() list them, or "
            f"give a table the columns base_values.{variable} and source_values.{variable}"
        )
    return count


def pair_identity(task: Task, pair: Pair) -> tuple[Hashable, ...]:
    """What tells the pair from others, as the base model sees them: first its base, then each variable's source."""
    return task.identity(pair.base), *sorted((name, _identity(task, each)) for name, each in pair.sources.items())


def _identity(task: Task, source: Setting | Pair) -> Hashable:
    if not isinstance(source, Pair):
        return task.identity(source)
    return pair_identity(task, source) if source.sources else task.identity(source.base)


def check_task(task: Task) -> None:
    """Refuse a task whose pairs, outputs, values or inputs are not what :class:`~itrain.tasks.base.Task` says.

    Raises:
        TaskError: naming the task, what is wrong with it and the remedy.
    """
    if isinstance(task, ResponseTask):
        raise TaskError(f"{_name(task)} has responses and no pairs; use it with data=responses")
    _check_kind(task)
    _check_variables(task)
    outputs, values = _check_outputs(task), {variable: _check_values(task, variable) for variable in task.variables}
    pairs = {split: _some(task, split) for split in SPLITS}
    for split, of_split in pairs.items():
        for pair in of_split:
            _check_labels(task, pair, pair.place or f"a pair of '{split}'", outputs, values)
    some = [pair for of_split in pairs.values() for pair in of_split[:SAMPLES]]
    settings = [setting for pair in some for setting in _settings(pair).values()]
    try:
        _check_inputs(task, settings[:SAMPLES])
    except TaskError as error:
        if not some[0].place:
            raise
        raise at_fault(task, some, error) from error
    if isinstance(task, TextTask):
        _check_answers(task, settings)


def at_fault(task: Task, pairs: Sequence[Pair], error: TaskError) -> TaskError:
    """An error of ``task.inputs``, with the place of the first pair that has one and the number of the others."""
    found: list[str] = []
    for pair in pairs:
        try:
            task.inputs(list(pair.settings()))
        except TaskError as fault:
            found.append(f"{pair.place}: {fault}" if pair.place else str(fault))
    others = f" (and {len(found) - 1} more pairs)" if len(found) > 1 else ""
    return TaskError(f"{found[0]}{others}") if found else error


def check_responses(task: ResponseTask) -> None:
    """Refuse a task whose settings or responses are not what :class:`~itrain.tasks.responses.ResponseTask` says.

    Raises:
        TaskError: naming the task, what is wrong with it and the remedy.
    """
    _check_kind(task)
    for split in SPLITS:
        call = f"settings('{split}')"
        once, again = (_asked(task, call, task.settings, split) for _ in range(2))
        if isinstance(once, str) or not isinstance(once, Sequence):
            raise TaskError(f"{_name(task)}: {call} gives a {type(once).__name__}; return a list of settings")
        if not _same(once, again):
            raise TaskError(f"{_name(task)}: {call} differs between two calls; give the same settings in one order")
        for setting in once[:SAMPLES]:
            run = _check_setting(task, setting, call)
            response = run[task.causal_model.output]
            if not isinstance(response, str) or not response:
                raise TaskError(f"{_name(task)}: a response of {call} is {response!r}; it must be text")
        _check_answers(task, once[:SAMPLES])


def _name(task: object) -> str:
    return f"task {type(task).__name__}"


def _asked(task: Task, call: str, ask: Callable[..., Answer], *arguments: Any) -> Answer:
    """What the task answers; an error of its own is told in one line that names the call."""
    try:
        return ask(*arguments)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"{_name(task)}: {call} raises {type(error).__name__}: {error}") from error


def _same(one: Any, other: Any) -> bool:
    # What == gives for tensors is no bool.
    return one is other or repr(one) == repr(other) or (one == other) is True


def _settings(pair: Pair) -> dict[str, Setting]:
    """The settings of all runs that the pair takes, under names for messages."""
    found = {"the base": pair.base}
    for name, source in pair.sources.items():
        role = f"the source of '{name}'"
        if isinstance(source, Pair):
            inner = _settings(source)
            found[role] = inner.pop("the base")
            found |= {f"{of} in {role}": setting for of, setting in inner.items()}
        else:
            found[role] = source
    return found


def _check_kind(task: Task) -> None:
    if not isinstance(task, Task):
        given = f"the class {task.__name__}; make one: {task.__name__}()" if isinstance(task, type) else repr(task)
        raise TaskError(f"a task is an instance of a subclass of itrain.Task, and this is {given}")
    if not isinstance(getattr(task, "causal_model", None), CausalModel):
        raise TaskError(f"{_name(task)} has no causal_model; set it to an itrain.CausalModel")
    if isinstance(task, TextTask):
        _asked(task, "tokenizer", getattr, task, "tokenizer")


def _check_variables(task: Task) -> None:
    names, model = getattr(task, "variables", ()), task.causal_model
    if isinstance(names, str):
        raise TaskError(f"{_name(task)}: variables is the text '{names}'; write variables = ('{names}',)")
    if not isinstance(names, Sequence) or not names:
        raise TaskError(f"{_name(task)}: variables is {names!r}; name the variables that pairs interchange")
    for number, name in enumerate(names):
        if name not in model.variables:
            raise TaskError(
                f"{_name(task)}: variables has '{name}', which its causal model does not have"
                f"{nearest(str(name), model.variables)}"
            )
        if name in names[:number]:
            raise TaskError(f"{_name(task)}: variables has '{name}' twice")
    if task.control is not None and task.control not in model.variables:
        raise TaskError(
            f"{_name(task)}: control is '{task.control}', which its causal model does not have"
            f"{nearest(str(task.control), model.variables)}"
        )


def _check_outputs(task: Task) -> Container[Any]:
    every = _asked(task, "outputs", lambda: task.outputs)
    listed = listable(every)
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise TaskError(f"{_name(task)}: outputs is a {type(listed).__name__}; list them in a fixed order")
    for output in listed:
        if not _is_hashable(output):
            raise TaskError(f"{_name(task)}: the output {output!r} has no hash; use numbers or text")
    if len(set(listed)) < max(len(listed), 2):
        twice = next((each for number, each in enumerate(listed) if each in listed[:number]), None)
        has = f"has {twice!r} twice" if len(listed) > 1 else f"has {len(listed)} value"
        raise TaskError(f"{_name(task)}: outputs {has}; list two or more, each once")
    _check_told_apart(task, listed)
    if not isinstance(every, Sequences):
        return set(listed)
    if other := next((each for each in listed if label_tokens(task, each) != each), None):
        raise TaskError(f"{_name(task)}: label({other!r}) is {task.label(other)!r}; a sequence is its own label")
    return every


def _check_told_apart(task: Task, listed: Sequence[Any]) -> None:
    """Refuse outputs of which one's tokens begin another's; in order, they stand side by side."""
    found = sorted(
        (_asked(task, f"label({output!r})", label_tokens, task, output), n) for n, output in enumerate(listed)
    )
    for (tokens, number), (more, following) in pairwise(found):
        one, other = listed[number], listed[following]
        if tokens == more:
            raise TaskError(f"{_name(task)}: the outputs {one!r} and {other!r} have one label, {task.label(one)!r}")
        if more[: len(tokens)] == tokens:
            raise TaskError(
                f"{_name(task)}: the tokens of the output {one!r} begin those of {other!r}, so that no answer tells "
                f"them apart; end both with a word that follows, as in {f'{one} .'!r} and {f'{other} .'!r}"
                + " by ending = ' .'"
                * isinstance(task, TextTask)
            )


def _check_values(task: Task, variable: str) -> Sequence[Any]:
    call = f"values('{variable}')"
    once, again = (_asked(task, call, task.values, variable) for _ in range(2))
    if isinstance(once, str) or not isinstance(once, Sequence):
        raise TaskError(f"{_name(task)}: {call} is a {type(once).__name__}; list the values in a fixed order")
    if not _same(once, again):
        raise TaskError(f"{_name(task)}: {call} differs between two calls; give the same values in one order")
    return once


def _some(task: Task, split: Split) -> list[Pair]:
    """Some pairs of a split, or all that are listed."""
    listed = _asked(task, f"pairs('{split}')", task.pairs, split)
    if listed is None:
        return _sampled(task, split)
    if not listed:
        raise TaskError(f"{_name(task)} lists no {split} pairs; give some, or take another rule for its splits")
    for number, pair in enumerate(listed):
        _check_pair(task, pair, getattr(pair, "place", "") or f"pairs('{split}')[{number}]")
    return list(listed)


def _sampled(task: Task, split: Split) -> list[Pair]:
    """Some pairs of a split, drawn twice from one random state."""
    call, drawn = f"sample(random, '{split}')", []
    for _ in range(2):
        random = Random(f"contract {split}")
        drawn.append([_asked(task, call, task.sample, random, split) for _ in range(SAMPLES)])
        for pair in drawn[-1]:
            _check_pair(task, pair, call)
    once, again = ([_asked(task, "identity(setting)", pair_identity, task, pair) for pair in pairs] for pairs in drawn)
    if once != again:
        raise TaskError(
            f"{_name(task)}: {call} gives other pairs where random has the same state; draw from random alone, not "
            "from the module random or a generator of the task's own"
        )
    if split == "train" and len(set(once)) == 1:
        raise TaskError(f"{_name(task)}: {call} gives the same pair each time; draw its settings from random")
    return drawn[0]


def _check_pair(task: Task, pair: Pair, call: str) -> None:
    if not isinstance(pair, Pair):
        raise TaskError(
            f"{_name(task)}: {call} returns a {type(pair).__name__}; return itrain.Pair(base=..., sources={{...}})"
        )
    _check_sources(task, pair, call)
    for place, setting in _settings(pair).items():
        _check_setting(task, setting, f"{place} of {call}")


def _check_sources(task: Task, pair: Pair, call: str) -> None:
    if not isinstance(pair.sources, Mapping):
        raise TaskError(
            f"{_name(task)}: the sources of {call} are a {type(pair.sources).__name__}; give one for each variable, as "
            f"in {{'{task.variables[0]}': ...}}"
        )
    for name, source in pair.sources.items():
        if name not in task.causal_model.variables:
            raise TaskError(
                f"{_name(task)}: {call} has a source of '{name}', which its causal model does not have"
                f"{nearest(str(name), task.causal_model.variables)}"
            )
        if isinstance(source, Pair):
            place = f"the source of '{name}' of {call}"
            if source.isolates:
                raise TaskError(
                    f"{_name(task)}: {place} has isolates=True, which only says something of the whole pair; set it "
                    "there"
                )
            _check_sources(task, source, place)


def _check_setting(task: Task, setting: Setting, place: str) -> dict[str, Any]:
    """Refuse a setting that the causal model does not run, or runs in two ways; return the run."""
    model = task.causal_model
    if not isinstance(setting, Mapping):
        raise TaskError(f"{_name(task)}: {place} is a {type(setting).__name__}; give a value for each input by name")
    if missing := [name for name in model.inputs if name not in setting]:
        raise TaskError(f"{_name(task)}: {place} has no value for the input '{missing[0]}'")
    if unknown := [name for name in setting if name not in model.variables]:
        raise TaskError(
            f"{_name(task)}: {place} has '{unknown[0]}', which its causal model does not have"
            f"{nearest(str(unknown[0]), model.variables)}"
        )
    run, again = (_asked(task, f"{place}, run by its causal model,", model.run, setting) for _ in range(2))
    for name, value in run.items():
        if not _same(value, again[name]):
            raise TaskError(
                f"{_name(task)}: the mechanism of '{name}' gives {value!r}, then {again[name]!r}, for {place}"
            )
        if name in setting and not _same(value, setting[name]):
            raise TaskError(
                f"{_name(task)}: {place} says '{name}' is {setting[name]!r}, and its causal model gives {value!r}; "
                "leave it out, since only inputs are set"
            )
    return run


def _check_labels(
    task: Task, pair: Pair, place: str, outputs: Container[Any], values: Mapping[str, Sequence[Any]]
) -> None:
    """Refuse outputs and values that the task does not list, and isolate pairs whose label changes."""
    model = task.causal_model
    new = task.counterfactual(pair)
    runs = {of: model.run(setting) for of, setting in _settings(pair).items()}
    answers = {of: run[model.output] for of, run in runs.items()}
    asked = [output for of, output in answers.items() if of == "the base" or output is not None]
    for output in (new, *asked):
        if not _is_hashable(output) or output not in outputs:
            raise TaskError(f"{_name(task)}: outputs lacks {output!r}, which its causal model gives for {place}")
    for variable, listed in values.items():
        for of, run in runs.items():
            if run[variable] not in listed:
                raise TaskError(
                    f"{_name(task)}: values('{variable}') lacks {run[variable]!r}, which {of} of {place} has"
                )
    if pair.isolates and new != runs["the base"][model.output]:
        raise TaskError(f"{_name(task)}: {place} isolates, and its label changes to {new!r}")


def _check_inputs(task: Task, settings: Sequence[Setting]) -> None:
    once, again = (_asked(task, "inputs(settings)", task.inputs, settings) for _ in range(2))
    if not isinstance(once, ModelInputs):
        raise TaskError(
            f"{_name(task)}: inputs(settings) returns a {type(once).__name__}; return "
            "itrain.ModelInputs(arguments={...})"
        )
    for name, argument in once.arguments.items():
        if not isinstance(argument, Tensor) or not argument.ndim or len(argument) != len(settings):
            has = f"{tuple(argument.shape)}" if isinstance(argument, Tensor) else f"a {type(argument).__name__}"
            raise TaskError(
                f"{_name(task)}: inputs(settings) gives '{name}' as {has} for {len(settings)} settings; give a tensor "
                "with a row for each"
            )
        if not torch.equal(argument.nan_to_num(), again.arguments[name].nan_to_num()):
            raise TaskError(f"{_name(task)}: inputs(settings) gives other values of '{name}' at a second call")


def _check_answers(task: TextTask, settings: Sequence[Setting]) -> None:
    """Refuse answers whose tokens depend on the prompt, unless the task's own labels do not ask for one."""
    for setting in settings if type(task).label is TextTask.label else ():
        run = task.causal_model.run(setting)
        output = run[task.causal_model.output]
        if output is None:
            continue
        here, usual = task.answer(setting, output), task.label(output)
        if here != usual:
            raise TaskError(
                f"{_name(task)}: the answer {output!r} is {here} after {task.template(setting)!r} and {usual} "
                "elsewhere, as tokens; end all templates alike, with or without a space"
            )


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
