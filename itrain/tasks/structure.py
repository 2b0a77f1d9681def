"""The variables of a declared task: run in order under conditions, and the values that each of them can take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from itrain.tasks.expressions import Expression
from itrain.tasks.operations import ExpressionError, Value

SETTINGS = 100_000
"""Settings that are gone through to find the values of a variable."""
OPERATIONS = 30_000_000
"""Operations of expressions that this may take for all variables together."""
STEPS = 10_000_000
"""Operations that the search for one pair may take."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What gives a variable its value: its parents, and a function of a mapping that has them."""

    parents: tuple[str, ...]
    run: Callable[[Mapping[str, Any]], Value]
    operations: int = 1


class MechanismError(ValueError):
    """A mechanism or a condition has no value where its parents have some."""

    def __init__(self, key: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.key = key


Step = tuple[tuple[str | int, ...], str | None, Mechanism]
"""The key of a mechanism or a condition in the file, the variable that it sets (None: a condition), and itself."""


class Structure:
    """Inputs with their values, mechanisms for all other variables, and conditions that settings must meet.

    Args:
        inputs: the values of each input.
        mechanisms: for all other variables, in any order, without circles.
        conditions: each with its number in the file.
    """

    def __init__(
        self,
        *,
        inputs: Mapping[str, Sequence[Value]],
        mechanisms: Mapping[str, Mechanism],
        conditions: Sequence[Expression],
    ) -> None:
        self.inputs, self.mechanisms, self._given = inputs, mechanisms, conditions
        self.conditions: list[Step] = [
            (("where", number), None, Mechanism(parents=each.variables, run=each.run, operations=each.operations))
            for number, each in enumerate(conditions)
        ]
        self._plan = self._planned(set(mechanisms), self.conditions, frozenset())
        self._left = OPERATIONS
        self._bare = [step for step in self._plan if step[1] is not None]

    def of(self, inputs: Mapping[str, Sequence[Value]]) -> Structure:
        """The same with other values of the inputs."""
        return Structure(inputs=inputs, mechanisms=self.mechanisms, conditions=self._given)

    @property
    def variables(self) -> list[str]:
        return [*self.inputs, *self.mechanisms]

    def draws(self, most: int) -> int:
        """How often a setting may be drawn in search of one: the most, or fewer where each takes long."""
        return max(100, min(most, STEPS // (sum(step[2].operations for step in self._plan) or 1)))

    def ancestors(self, names: Iterable[str], cut: Collection[str] = ()) -> set[str]:
        """The variables that these depend on, themselves among them; nothing lies behind those in ``cut``."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += [] if name in cut or name in self.inputs else self.mechanisms[name].parents
        return found

    def run(self, setting: Mapping[str, Value]) -> dict[str, Any] | None:
        """All variables' values, None where a condition is not met.

        Raises:
            MechanismError: a mechanism has no value for it.
        """
        values = dict(setting)
        return values if _go(self._plan, values) else None

    def interchange(self, setting: Mapping[str, Value], fixed: Mapping[str, Value]) -> dict[str, Any]:
        """The same with some variables held, whatever the conditions say."""
        values = {**setting, **fixed}
        _go((step for step in self._bare if step[1] not in fixed), values)
        return values

    def values(self) -> tuple[dict[str, list[Value] | None], list[MechanismError]]:
        """The values that each variable takes in some setting, None where there are too many to go through.

        Where only the settings are too many, those that the values of its parents give it, in any combination. What
        goes wrong in a setting comes second, once for each mechanism.
        """
        found: dict[str, list[Value] | None] = {name: list(values) for name, values in self.inputs.items()}
        errors: dict[tuple[str | int, ...], MechanismError] = {}
        for name in reversed([step[1] for step in self._bare if step[1] is not None]):
            if name in found:
                continue
            needed, conditions = self._together({name})
            taken, wrong = self.reached(needed, conditions, {})
            errors |= {error.key: errors.get(error.key, error) for error in wrong}
            if taken is None:
                found[name] = None
            else:
                found |= {each: values for each, values in taken.items() if each not in self.inputs}
        for _, name, mechanism in self._bare:
            if name is not None and found[name] is None:
                found[name] = _combined(mechanism, {parent: found[parent] for parent in mechanism.parents})
        return found, list(errors.values())

    def after(
        self, output: str, held: Mapping[str, Sequence[Value]]
    ) -> tuple[list[Value] | None, list[MechanismError]]:
        """The values that the output takes while some variables are held at these, and what goes wrong in it."""
        needed = self.ancestors({output}, held)
        conditions = [
            each
            for each in self.conditions
            if self.ancestors(each[2].parents).isdisjoint(held) and self.ancestors(each[2].parents) <= needed
        ]
        taken, wrong = self.reached(needed, conditions, held)
        return (None if taken is None else taken[output]), wrong

    def reached(
        self, needed: set[str], conditions: Sequence[Step], held: Mapping[str, Sequence[Value]]
    ) -> tuple[dict[str, list[Value]] | None, list[MechanismError]]:
        """The values of these variables in all settings of theirs; None where there are too many settings."""
        free = {name: held.get(name, self.inputs.get(name, ())) for name in self.variables if name in needed}
        free = {name: values for name, values in free.items() if name in held or name in self.inputs}
        plan = self._planned(needed, conditions, frozenset(held))
        settings = prod(map(len, free.values()))
        operations = settings * sum(step[2].operations for step in plan)
        if settings > SETTINGS or operations > self._left:
            return None, []
        self._left -= operations
        found: dict[str, dict[Value, None]] = {name: {} for name in needed}
        errors: dict[tuple[str | int, ...], MechanismError] = {}
        for chosen in product(*free.values()):
            values = dict(zip(free, chosen, strict=True))
            try:
                met = _go(plan, values)
            except MechanismError as error:
                errors.setdefault(error.key, error)
                continue
            if met:
                for name, seen in found.items():
                    seen[values[name]] = None
        return {name: list(seen) for name, seen in found.items()}, list(errors.values())

    def _together(self, names: set[str]) -> tuple[set[str], list[Step]]:
        """What these depend on, and the conditions on any of it, with what they depend on in turn."""
        needed, conditions = self.ancestors(names), list[Step]()
        grown = True
        while grown:
            grown = False
            for each in self.conditions:
                behind = self.ancestors(each[2].parents)
                if each not in conditions and not needed.isdisjoint(behind & set(self.inputs)):
                    conditions.append(each)
                    needed |= behind
                    grown = True
        return needed, conditions

    def _planned(self, needed: set[str], conditions: Sequence[Step], held: frozenset[str]) -> list[Step]:
        """Mechanisms after their parents, and conditions as soon as they can be asked, since they guard the others."""
        first = self.ancestors((parent for each in conditions for parent in each[2].parents), held)
        plan: list[Step] = []
        known = {*self.inputs, *held}
        waiting = [name for name in self.mechanisms if name in needed and name not in held]
        waiting.sort(key=lambda name: name not in first)
        asked = list(conditions)
        while True:
            plan += [each for each in asked if known.issuperset(each[2].parents)]
            asked = [each for each in asked if not known.issuperset(each[2].parents)]
            ready = next((name for name in waiting if known.issuperset(self.mechanisms[name].parents)), None)
            if ready is None:
                return plan
            waiting.remove(ready)
            known.add(ready)
            plan.append((("mechanisms", ready), ready, self.mechanisms[ready]))


def _combined(mechanism: Mechanism, parents: Mapping[str, list[Value] | None]) -> list[Value] | None:
    """What a mechanism gives for the values of its parents in any combination, of which some may never occur."""
    given = [values for values in parents.values() if values is not None]
    if len(given) < len(parents) or prod(map(len, given)) > min(SETTINGS, STEPS // mechanism.operations):
        return None
    found: dict[Value, None] = {}
    for values in product(*given):
        with suppress(ExpressionError):
            found[mechanism.run(dict(zip(parents, values, strict=True)))] = None
    return list(found)


def _go(plan: Iterable[Step], values: dict[str, Any]) -> bool:
    """Run the steps; whether all conditions are met.

    Raises:
        MechanismError: a step has no value.
    """
    for key, variable, mechanism in plan:
        try:
            value = mechanism.run(values)
        except ExpressionError as error:
            given = ", ".join(f"{name}={values[name]!r}" for name in mechanism.parents)
            raise MechanismError(key, f"{error} ({given})" if given else str(error)) from error
        if variable is not None:
            values[variable] = value
        elif not value:
            return False
    return True


def circle(mechanisms: Mapping[str, Mechanism]) -> Iterator[str]:
    """The variables that depend on themselves, or on one that does."""
    waiting = {name: set(each.parents) & set(mechanisms) for name, each in mechanisms.items()}
    while ready := [name for name, parents in waiting.items() if parents.isdisjoint(waiting)]:
        for name in ready:
            del waiting[name]
    yield from waiting
