"""Causal models: variables, their parents and mechanisms, run as they are or under interchange."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from random import Random
from typing import Any, Protocol

Setting = Mapping[str, Any]
"""A value for each variable, or for some of them."""


class Intervened(Protocol):
    """A run under interchange: its base and, for each interchanged variable, the run that gives its value."""

    @property
    def base(self) -> Setting: ...

    @property
    def sources(self) -> Mapping[str, Setting | Intervened]: ...


class CausalModel:
    """A deterministic causal model: input variables with their values, and mechanisms for all others.

    A mechanism is a function whose parameter names are the variable's parents::

        CausalModel(
            inputs={"name": ["John", "Mary"]},
            mechanisms={"gender": lambda name: GENDERS[name], "pronoun": lambda gender: PRONOUNS[gender]},
            output="pronoun",
        )

    The mechanisms may stand in any order. Geiger et al. 2025, "Causal Abstraction: A Theoretical Foundation for
    Mechanistic Interpretability", definition 2.

    Raises:
        ValueError: a parent or the output is not a variable, or the mechanisms depend on each other in a circle.
    """

    def __init__(
        self, *, inputs: Mapping[str, Sequence[Any]], mechanisms: Mapping[str, Callable[..., Any]], output: str
    ) -> None:
        self.inputs = dict(inputs)
        self.parents = {variable: tuple(inspect.signature(f).parameters) for variable, f in mechanisms.items()}
        self.output = output
        for variable, parents in self.parents.items():
            for parent in parents:
                self._require(parent, f"a parent of '{variable}'")
        self._require(output, "the output")
        if twice := sorted(set(inputs) & set(mechanisms)):
            raise ValueError(f"causal model: '{twice[0]}' is both an input and the result of a mechanism")
        self._mechanisms = {variable: mechanisms[variable] for variable in self._in_order()}

    @property
    def variables(self) -> tuple[str, ...]:
        """All variables, inputs first, each after its parents."""
        return (*self.inputs, *self._mechanisms)

    def sample(self, random: Random) -> dict[str, Any]:
        """A value for each input, uniform and independent."""
        return {variable: random.choice(values) for variable, values in self.inputs.items()}

    def run(self, inputs: Setting, interventions: Setting | None = None) -> dict[str, Any]:
        """The value of every variable, with the variables in ``interventions`` held at the values given there.

        Raises:
            ValueError: an input is missing, a variable is unknown, or a mechanism raises.
        """
        fixed = dict(interventions or {})
        for variable in fixed:
            self._require(variable, "an intervention")
        setting = {}
        for variable in self.inputs:
            if variable not in fixed and variable not in inputs:
                raise ValueError(f"causal model: the input '{variable}' has no value; give every input one")
            setting[variable] = fixed.get(variable, inputs.get(variable))
        for variable, mechanism in self._mechanisms.items():
            if variable in fixed:
                setting[variable] = fixed[variable]
            else:
                values = [setting[parent] for parent in self.parents[variable]]
                try:
                    setting[variable] = mechanism(*values)
                except Exception as error:
                    given = ", ".join(map("{}={!r}".format, self.parents[variable], values))
                    raise ValueError(
                        f"causal model: the mechanism of '{variable}' raises {type(error).__name__}: {error} ({given})"
                    ) from error
        return setting

    def interchange(self, base: Setting, sources: Mapping[str, Setting | Intervened]) -> dict[str, Any]:
        """The run of ``base`` in which each variable of ``sources`` has the value that it takes in its source's run.

        A source that is itself intervened, to any depth, is run under its own sources first. The output is the
        counterfactual label (Geiger et al. 2022, "Inducing Causal Structure for Interpretable Neural Networks", section
        3).
        """
        for variable in sources:
            self._require(variable, "an interchange")
        runs = {
            variable: self.run(source) if isinstance(source, Mapping) else self.interchange(source.base, source.sources)
            for variable, source in sources.items()
        }
        return self.run(base, {variable: run[variable] for variable, run in runs.items()})

    def _in_order(self) -> Iterator[str]:
        done = set(self.inputs)
        waiting = dict(self.parents)
        while waiting:
            ready = [variable for variable, parents in waiting.items() if done.issuperset(parents)]
            if not ready:
                raise ValueError(f"causal model: {', '.join(sorted(waiting))} depend on each other in a circle")
            for variable in ready:
                del waiting[variable]
            done.update(ready)
            yield from ready

    def _require(self, variable: str, role: str) -> None:
        if variable not in self.inputs and variable not in self.parents:
            known = [*self.inputs, *self.parents]
            near = get_close_matches(variable, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"causal model: '{variable}', {role}, is not a variable; {hint}")
