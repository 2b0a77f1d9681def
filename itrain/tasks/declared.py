"""DeclaredTask: a task in text that is data alone, so that a YAML file can describe it whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from random import Random
from typing import TYPE_CHECKING, Any

from itrain.bounds import require_share
from itrain.causal_model import CausalModel, Setting
from itrain.tasks import TaskError
from itrain.tasks.base import SPLITS, Pair, Split, TextTask
from itrain.tasks.declaration import (
    TEMPLATE,
    VARIABLES,
    Problems,
    as_call,
    equals_of,
    listed,
    mechanism_of,
    read_conditions,
    read_inputs,
    read_mechanisms,
    read_tables,
)
from itrain.tasks.divisions import SETTINGS, Division
from itrain.tasks.domains import check_texts, check_variables, find_outputs, find_values
from itrain.tasks.operations import Value, written
from itrain.tasks.structure import MechanismError, Structure, circle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DRAWS = 30_000
"""Settings that are drawn in search of a pair of the wanted kind."""
SEEN = 2000
"""Settings of a split that are looked at for the values of balanced variables."""
TARGETS = 100
"""Values, or sets of values, that may be balanced."""
TOGETHER = 6
"""Variables that may be interchanged at once."""
ENOUGH = 3
"""Kinds of pairs that are not found, after which no more are looked for."""
KINDS = {
    "changing": "the label changes",
    "isolating": "the variable differs and the label stays",
    "keeping": "the label stays",
    "any": "there are values for it",
}
"""The kinds of pairs, and what each of them means."""


class FewValuesError(TaskError):
    """A split has too few values for the pairs that are asked for."""


class DeclaredTask(TextTask):
    """A causal model, its texts and its pairs, as plain data: ``task=<file>.yaml``, or the keys of a recipe's task.

    docs/howto/tasks.md has a guide and examples of each key.

    Args:
        inputs: the values of each input: a list, a range ``0..9``, or a mapping with ``words``, ``keys`` of a table,
            ``like`` another input or a ``file`` of words; ``equals: {<input>: <share>}`` beside them makes it equal to
            another in a share of the settings.
        mechanisms: for each other variable an expression of its parents, or a table ``{of: <parents>, table: {...}}``.
        template: the text with ``{<variable>}`` fields, which become spans; several, of which one is drawn; or a table
            ``{of: <variable>, table: {...}}`` that chooses it.
        output: the variable that the model is to answer with.
        variables: the variable that pairs interchange, or several.
        tables: tables by name, which expressions read.
        where: what holds in every setting: one expression or several.
        balance: variables whose values are equally frequent in the bases.
        shared: variables that have the same value in base and source.
        changing: share of the pairs in which the label changes; None: as they come.
        isolating: share of the pairs in which the variable differs and the label must not change.
        together: whether several variables are also interchanged at once, each with a source of its own.
        split: what is disjoint between the splits; see :class:`~itrain.tasks.divisions.Division`.
        control: the variable whose values get random labels in the control tasks of probes.
        values: the values of variables that take too many to be found.
        one_token: inputs of which values that the tokenizer splits are left out.
        separator: what stands between a prompt that ends in no space and its answer.
        exhaustive: whether the splits may have pairs in common, in a task of so few that none can be held out.

    Raises:
        DeclarationError: something is wrong with it, naming the key and the remedy.
        ValueError: a share is none.
    """

    def __init__(
        self,
        *,
        inputs: Mapping[str, Any],
        template: str | Sequence[str] | Mapping[str, Any],
        output: str,
        variables: str | Sequence[str],
        mechanisms: Mapping[str, Any],
        tables: Mapping[str, Any] | None = None,
        where: str | Sequence[str] = (),
        balance: str | Sequence[str] = (),
        shared: str | Sequence[str] = (),
        changing: float | None = 0.5,
        isolating: float = 0.0,
        together: bool = False,
        split: str | Sequence[Any] | Mapping[str, Any] | None = SETTINGS,
        control: str | None = None,
        values: Mapping[str, Any] | None = None,
        one_token: str | Sequence[str] = (),
        separator: str = " ",
        exhaustive: bool = False,
    ) -> None:
        require_share(isolating=isolating, **({} if changing is None else {"changing": changing}))
        if (changing or 0) + isolating > 1:
            raise ValueError(f"isolating={isolating}: with changing={changing} there are more than all pairs")
        self.variables, self.control = tuple(listed(variables)), control
        self.separator, self.exhaustive = separator, exhaustive
        self.changing, self.isolating = changing, isolating
        self._balance, self._shared, self._split = listed(balance), listed(shared), split
        self._one_token, self._given_values, self._output = listed(one_token), values or {}, output
        if together and len(self.variables) > TOGETHER:
            raise ValueError(f"together: {len(self.variables)} variables have too many sets; name {TOGETHER} at most")
        sizes = range(len(self.variables) if together else 1)
        self._swaps = [swap for size in sizes for swap in combinations(self.variables, size + 1)]
        problems = Problems()
        self._read_parts(inputs, mechanisms, template, tables or {}, where, problems)
        problems.refuse()
        self._settle(self._structure.inputs)

    def _read_parts(
        self,
        inputs: Mapping[str, Any],
        mechanisms: Mapping[str, Any],
        template: Any,
        tables: Mapping[str, Any],
        where: Any,
        problems: Problems,
    ) -> None:
        """Read what does not depend on a tokenizer."""
        known = read_tables(tables, problems)
        found: dict[str, list[Value]] = read_inputs(inputs, known, problems)
        self._equals = {name: equals_of(inputs[name], name, found, ("inputs", name), problems) for name in found}
        self._template = template if isinstance(template, str) else None
        several = not isinstance(template, str | Mapping)
        if several:
            found[TEMPLATE] = [each for each in template if isinstance(each, str)]
            if len(set(found[TEMPLATE])) != len(template) or len(template) < 2:
                problems.add((TEMPLATE,), "give two or more texts, each once; a single one stands without brackets")
        names = [*found, *mechanisms, *([TEMPLATE] if isinstance(template, Mapping) else [])]
        for twice in set(found) & set(mechanisms):
            problems.add(("mechanisms", twice), f"'{twice}' is an input too; rename one of them")
        for twice in set(known) & set(names):
            problems.add(("tables", twice), f"'{twice}' is a variable too; rename the table")
        if len(names) > VARIABLES:
            problems.add(("mechanisms",), f"there are {len(names)} variables; {VARIABLES} at most")
        made = read_mechanisms(mechanisms, names, known, problems)
        if isinstance(template, Mapping):
            with problems.at(TEMPLATE):
                made[TEMPLATE] = mechanism_of(template, TEMPLATE, names, known)
        conditions = read_conditions(where, names, known, problems)
        problems.refuse()
        if turning := sorted(circle(made)):
            problems.add(("mechanisms", turning[0]), f"{', '.join(turning)} depend on each other in a circle")
        problems.refuse()
        self._structure = Structure(inputs=found, mechanisms=made, conditions=conditions)

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().bind(tokenizer)
        kept = dict(self._structure.inputs)
        for name in self._one_token:
            kept[name] = [value for value in kept[name] if self.is_one_token(written(value))]
            if len(kept[name]) < 2:
                raise TaskError(f"one_token: the tokenizer leaves {len(kept[name])} values of '{name}'; give others")
        if self._one_token:
            self._settle(kept)

    def _settle(self, inputs: Mapping[str, Sequence[Value]]) -> None:
        """Find the values of all variables, divide the settings, and refuse what cannot be run.

        Raises:
            DeclarationError: naming the key.
        """
        problems = Problems()
        self._structure = self._structure.of(inputs)
        structure = self._structure
        check_variables(
            structure,
            output=self._output,
            roles={
                "variables": self.variables,
                "control": listed(self.control) if self.control is not None else [],
                "balance": self._balance,
                "shared": self._shared,
                "one_token": self._one_token,
                "values": list(self._given_values),
            },
            problems=problems,
        )
        problems.refuse()
        self._values = find_values(structure, self._given_values, problems)
        problems.refuse()
        outputs = find_outputs(structure, self._output, self._swaps, self._values, self._given_values, problems)
        texts = [self._template] if self._template is not None else self._values[TEMPLATE] or []
        check_texts(structure, texts, self._values, self._output, problems)
        problems.refuse()
        self._outputs = [written(output) for output in outputs]
        with problems.at("split"):
            self._division = Division(self._split, structure, self._values)
        problems.refuse()
        self.causal_model = CausalModel(
            inputs=structure.inputs,
            mechanisms={
                name: as_call(each, output=name == self._output) for name, each in structure.mechanisms.items()
            },
            output=self._output,
        )
        self._targets = {split: self._targets_of(split, problems) for split in SPLITS}
        problems.refuse()
        self._check_kinds(problems)
        problems.refuse()

    @property
    def outputs(self) -> Sequence[str]:
        return self._outputs

    def values(self, variable: str) -> Sequence[Any]:
        if variable == self._output:
            return self._outputs
        found = self._values.get(variable)
        return super().values(variable) if found is None else found

    def template(self, setting: Setting) -> str:
        if self._template is not None:
            return self._template
        return setting[TEMPLATE] if TEMPLATE in setting else self.causal_model.run(setting)[TEMPLATE]

    def sample(self, random: Random, split: Split) -> Pair:
        swap, kind = random.choice(self._swaps), self._kind(random)
        return self._pair(random, split, swap, kind, random.choice(self._targets[split]))

    def _kind(self, random: Random) -> str:
        if self.changing is None and not self.isolating:
            return "any"
        place = random.random()
        if place < (self.changing or 0):
            return "changing"
        isolates = place < (self.changing or 0) + self.isolating
        return "isolating" if isolates else "any" if self.changing is None else "keeping"

    def _pair(self, random: Random, split: Split, swap: Sequence[str], kind: str, target: Mapping[str, Value]) -> Pair:
        """A pair of a kind, whose base has the values of the target.

        Raises:
            TaskError: none is found.
        """
        structure, tries = self._structure, self._tries()
        while (base := self._draw(random, split, tries, target)) is not None:
            shared = {name: base[name] for name in self._shared}
            sources = {name: self._draw(random, split, tries, shared) for name in swap}
            taken = {name: source[name] for name, source in sources.items() if source is not None}
            if len(taken) < len(swap):
                break
            inputs = {name: base[name] for name in structure.inputs}
            after = structure.interchange(inputs, taken)[self._output]
            changes, differs = after != base[self._output], all(base[name] != taken[name] for name in swap)
            if {"any": True, "changing": changes, "keeping": not changes, "isolating": differs and not changes}[kind]:
                made = {name: {each: run[each] for each in structure.inputs} for name, run in sources.items() if run}
                return Pair(base=inputs, sources=made, isolates=kind == "isolating")
        wanted = "".join(f" and the base's {name} is {written(value)}" for name, value in target.items())
        what = f"no {split} pair found in which '{'+'.join(swap)}' is interchanged, {KINDS[kind]}{wanted}"
        if kind in ("changing", "isolating") and (few := self._few(split, swap if kind == "isolating" else ())):
            raise FewValuesError(f"{what}: {few}; give inputs more values, or {split} a larger share (split)")
        raise TaskError(f"{what}; change the shares of changing and isolating, balance, shared, split or where")

    def _few(self, split: Split, swap: Sequence[str]) -> str | None:
        """What has a single value in a split, of the output and variables, so that no two of its settings differ there.

        The settings are drawn: where there are few values there are few settings.
        """
        random, tries = Random(f"few {split}"), iter(range(SEEN))
        runs = [run for _ in range(SEEN) if (run := self._draw(random, split, tries, {})) is not None]
        for name in (*swap, self._output):
            if runs and len(values := {run[name] for run in runs}) == 1:
                (value,) = values
                return f"'{name}' is {written(value)} in every {split} setting"
        return None

    def _tries(self) -> Iterator[int]:
        return iter(range(self._structure.draws(DRAWS)))

    def _draw(
        self, random: Random, split: Split, tries: Iterator[int], wanted: Mapping[str, Value]
    ) -> dict[str, Any] | None:
        """A run of a setting of the split in which variables have these values; None once the tries are used up."""
        for _ in tries:
            setting: dict[str, Any] = {}
            for name, values in self._division.parts[split].items():
                equals = self._equals.get(name, {})
                other = next((each for each, share in equals.items() if random.random() < share), None)
                setting[name] = random.choice(values) if other is None else setting[other]
                setting[name] = wanted.get(name, setting[name])
            if self._division.has(split, setting):
                run = self._structure.run(setting)
                if run is not None and all(run[name] == value for name, value in wanted.items()):
                    return run
        return None

    def _targets_of(self, split: Split, problems: Problems) -> list[dict[str, Value]]:
        """The values of the balanced variables that occur together in a split; one without any where none are."""
        random, tries, found = Random(f"targets {split}"), self._tries(), dict[tuple[Value, ...], None]()
        try:
            for _ in range(SEEN if self._balance else 1):
                if (run := self._draw(random, split, tries, {})) is not None:
                    found[tuple(run[name] for name in self._balance)] = None
        except MechanismError as error:
            problems.add(error.key, error)
            return []
        if len(found) > TARGETS:
            problems.add(("balance",), f"{', '.join(self._balance)}: {len(found)} values or more; at most {TARGETS}")
        if not found:
            problems.add(("split",), f"no setting of {split} found; give more values, other shares or a weaker where")
        return [dict(zip(self._balance, values, strict=True)) for values in sorted(found, key=repr)]

    def _check_kinds(self, problems: Problems) -> None:
        for split, swap, kind in product(SPLITS, self._swaps, self._kinds()):
            for target in self._targets[split]:
                try:
                    self._pair(Random(f"kinds {split}"), split, swap, kind, target)
                except FewValuesError as error:
                    problems.add(("inputs",), error)
                except TaskError as error:
                    problems.add(("isolating" if kind == "isolating" else "changing",), error)
                except MechanismError as error:
                    problems.add(error.key, f"after an interchange of {'+'.join(swap)}: {error}")
                if len(problems) >= ENOUGH:
                    return

    def _kinds(self) -> Iterator[str]:
        changing = self.changing or 0
        if changing:
            yield "changing"
        if self.isolating:
            yield "isolating"
        if changing + self.isolating < 1:
            yield "any" if self.changing is None else "keeping"
