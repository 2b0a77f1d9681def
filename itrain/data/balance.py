"""Balance: pairs that change the label and pairs that keep it, in equal numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from itrain.tasks.base import Pair, Task

Item = TypeVar("Item")


def balance(task: Task, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs in an order in which changed and kept labels alternate, until one of them runs out.

    With one variable, the counterfactual labels alternate too within either.
    """
    kinds = _in_turn([(_kind(task, pair), pair) for pair in pairs], key=lambda each: each[0])
    return [pair for _, pair in _in_turn(kinds, key=lambda each: each[0][0])]


def is_balanced(task: Task, pairs: Sequence[Pair]) -> bool:
    """Whether as many pairs change the label as keep it and labels are equally frequent in either, to one pair."""
    kinds = [_kind(task, pair) for pair in pairs]
    halves = Counter(changes for changes, _ in kinds)
    answers = [Counter(answer for changes, answer in kinds if changes == half) for half in halves]
    return all(max(counts.values()) - min(counts.values()) <= 1 for counts in (halves, *answers) if counts)


def _kind(task: Task, pair: Pair) -> tuple[bool, Hashable]:
    """Whether the pair changes the label and, if the task has one variable, to which.

    With several variables, the labels of one of them would crowd out the others.
    """
    model = task.causal_model
    before, after = model.run(pair.base)[model.output], task.counterfactual(pair)
    return before != after, after if len(task.variables) == 1 else None


def _in_turn(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[Item]:
    """The first item of each key, then the second of each, and so on."""
    seen: Counter[Hashable] = Counter()
    places = []
    for item in items:
        places.append((seen[key(item)], item))
        seen[key(item)] += 1
    return [item for _, item in sorted(places, key=lambda each: each[0])]
