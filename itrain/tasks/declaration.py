"""The parts of a declared task, read from plain data: values, tables, mechanisms, conditions and templates."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from string import Formatter
from typing import Any, NamedTuple

from itrain.signatures import nearest
from itrain.sites import RESERVED
from itrain.tasks import TaskError
from itrain.tasks.expressions import Expression, parse
from itrain.tasks.operations import FUNCTIONS, ExpressionError, Value, look_up, written
from itrain.tasks.structure import Mechanism
from itrain.trust import LARGEST_NUMBER

TEMPLATE = "template"
"""The variable that has the text, where a task has several."""
MOST = 100_000
"""Values of all inputs."""
VARIABLES = 200
"""Variables of a task."""

_RANGE = re.compile(r"(-?\d{1,15})\.\.(-?\d{1,15})(?: by (\d{1,15}))?")
_SPEC = re.compile(r"0?\d{0,2}(\.\d)?[dfs]?")
_SOURCES = ("values", "words", "keys", "like", "file")

Key = tuple[str | int, ...]
"""Where something stands in the file: the keys that lead there."""


class Problem(NamedTuple):
    """What is wrong with a declared task, and where."""

    key: Key
    message: str

    def __str__(self) -> str:
        return f"{dotted(self.key)}: {self.message}"


class DeclarationError(TaskError):
    """A declared task is wrong; the message is its first problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        more = len(problems) - 1
        others = f" (and {more} more: itrain task check <file> lists all)" if more else ""
        super().__init__(f"{problems[0]}{others}")
        self.problems = problems


class Problems(list[Problem]):
    """The problems of a task, as they are found."""

    def add(self, key: Key, message: object) -> None:
        if Problem(key, str(message)) not in self:
            self.append(Problem(key, str(message)))

    @contextmanager
    def at(self, *key: str | int) -> Iterator[None]:
        """Note the error that ends the block, and go on."""
        try:
            yield
        except (ExpressionError, TaskError) as error:
            self.add(key, error)

    def refuse(self) -> None:
        """Raise what has been found.

        Raises:
            DeclarationError: there is something.
        """
        if self:
            raise DeclarationError(self)


def dotted(key: Key) -> str:
    """``where[1]`` or ``inputs.a``."""
    return "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in key).lstrip(".")


def listed(given: Any) -> list[Any]:
    """One or several, as a list."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        return [given]
    return list(given)


def read_tables(given: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """The named tables, their keys as texts: ``{<key>: <value>}`` or ``{groups: {<value>: [<keys>]}}``.

    A table with a fault is empty, so that what reads it is not told to be at fault too.
    """
    found: dict[str, Any] = {}
    for name, table in given.items():
        found[name] = {}
        with problems.at("tables", name):
            _require_name(name)
            grouped = isinstance(table, Mapping) and set(table) == {"groups"}
            found[name] = _ungrouped(table["groups"], [name]) if grouped else _table(table)
    return found


def read_inputs(given: Mapping[str, Any], tables: Mapping[str, Any], problems: Problems) -> dict[str, list[Value]]:
    """The values of each input."""
    found: dict[str, list[Value]] = {}
    for name, spec in given.items():
        origin = _origin(spec, tables, found)
        found[name] = []
        if origin is not None and not origin:
            continue  # its table or input has a fault, which is told there
        with problems.at("inputs", name):
            _require_name(name)
            found[name] = values_of(spec, tables, found)
            if sum(map(len, found.values())) > MOST:
                found[name] = []
                raise TaskError(f"the inputs have more than {MOST} values together")
            if len(found[name]) < 2:
                raise TaskError(f"has {len(found[name])} value; give two or more, or write it into the template")
    return found


def values_of(spec: Any, tables: Mapping[str, Any], inputs: Mapping[str, Sequence[Value]]) -> list[Value]:
    """The values that a list, a range such as ``0..9``, or a mapping with one of :data:`_SOURCES` describes.

    Raises:
        TaskError: it describes none.
    """
    if isinstance(spec, Mapping):
        sources = [key for key in spec if key in _SOURCES]
        if len(sources) != 1 or not set(spec) <= {*sources, "equals"}:
            raise TaskError(
                f"give one of {', '.join(_SOURCES)}, and equals: {{<input>: <share>}} where some shall be equal"
            )
        return _described(sources[0], spec[sources[0]], tables, inputs)
    if isinstance(spec, str):
        found = _RANGE.fullmatch(spec.strip())
        if not found:
            raise TaskError(f"{spec!r} is no list of values; write [a, b], a range 0..9, or {{words: a b c}}")
        first, last, by = int(found[1]), int(found[2]), int(found[3] or 1)
        if by == 0 or not 0 < len(span := range(first, last + 1, by or 1)) <= MOST:
            raise TaskError(f"the range {spec} has no value, or more than {MOST}")
        return list(span)
    if not isinstance(spec, Sequence):
        raise TaskError(f"{spec!r} is no list of values; write [{written(spec)}, ...]")
    return _distinct(spec)


def _origin(spec: Any, tables: Mapping[str, Any], inputs: Mapping[str, Any]) -> Collection[Any] | None:
    """The table or the earlier input that an input takes its values from; None where it takes them from neither."""
    named = spec if isinstance(spec, Mapping) else {}
    origins = [known[named[key]] for key, known in (("keys", tables), ("like", inputs)) if named.get(key) in known]
    return origins[0] if origins else None


def equals_of(spec: Any, name: str, inputs: Mapping[str, Any], key: Key, problems: Problems) -> dict[str, float]:
    """With which other inputs an input is equal, in which share of the settings."""
    given = spec.get("equals", {}) if isinstance(spec, Mapping) else {}
    if not isinstance(given, Mapping):
        problems.add(key, "equals takes {<input>: <share>}")
        return {}
    for other, share in given.items():
        earlier = list(inputs)[: list(inputs).index(name)]
        if other not in earlier:
            problems.add(key, f"equals: '{other}' is no input before '{name}'{nearest(str(other), earlier)}")
        elif isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            problems.add(key, f"equals: give a share, above 0 to 1, not {share!r}")
        elif not set(inputs[other]) <= set(inputs[name]):
            problems.add(key, f"equals: '{name}' lacks values of '{other}'")
    return {str(other): share for other, share in given.items()}


def read_mechanisms(
    given: Mapping[str, Any], variables: Sequence[str], tables: Mapping[str, Any], problems: Problems
) -> dict[str, Mechanism]:
    """The mechanism of each variable that is no input."""
    found = {}
    for name, spec in given.items():
        with problems.at("mechanisms", name):
            _require_name(name)
            found[name] = mechanism_of(spec, name, variables, tables)
    return found


def mechanism_of(spec: Any, name: str, variables: Sequence[str], tables: Mapping[str, Any]) -> Mechanism:
    """An expression's mechanism, or that of ``{of: <parents>, table: {...}}`` or ``{of: <parent>, groups: {...}}``.

    Raises:
        ValueError: it is none of these, or a parent is no variable.
    """
    if not isinstance(spec, Mapping):
        read = parse(written(spec), variables, tables)
        return Mechanism(parents=read.variables, run=read.run, operations=read.operations)
    kinds = [kind for kind in ("table", "groups") if kind in spec]
    if "of" not in spec or len(kinds) != 1 or len(spec) > 2:
        raise TaskError(
            "is neither an expression nor a table; write {of: <parent>, table: {<value>: <result>}}, "
            "{of: [<parents>], table: {...}} or {of: <parent>, groups: {<result>: [<values>]}}"
        )
    parents = listed(spec["of"])
    for parent in parents:
        if parent not in variables:
            raise TaskError(f"of: '{parent}' is no variable{nearest(str(parent), variables)}")
    table = _table(spec["table"]) if "table" in spec else _ungrouped(spec["groups"], parents)
    said = f"the table of '{name}'"

    def run(values: Mapping[str, Any]) -> Value:
        result = look_up(table, [values[parent] for parent in parents], said)
        if isinstance(result, Mapping):
            raise ExpressionError(f"{said} has a row of {', '.join(result)} there; name the parents of all its levels")
        return result

    return Mechanism(parents=tuple(parents), run=run)


def read_conditions(
    given: Any, variables: Sequence[str], tables: Mapping[str, Any], problems: Problems
) -> list[Expression]:
    found = []
    for number, text in enumerate(listed(given)):
        with problems.at("where", number):
            found.append(parse(written(text), variables, tables))
            if not found[-1].variables:
                raise TaskError(f"{text!r} has no variable")
    return found


def check_template(text: Any, variables: Sequence[str]) -> list[str]:
    """The fields of a template.

    Raises:
        TaskError: it is no template over these variables.
    """
    if not isinstance(text, str):
        raise TaskError(f"{text!r} is no text; write it in quotes")
    try:
        parts = [(name, spec or "", how) for _, name, spec, how in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise TaskError(f"{text!r} is no template: {error}; a brace of its own is written twice") from error
    names = [name for name, _, _ in parts]
    for name, spec, conversion in parts:
        if name not in variables:
            raise TaskError(f"{text!r}: the field '{name}' is no variable{nearest(str(name), variables)}")
        if conversion or not _SPEC.fullmatch(spec):
            raise TaskError(f"{text!r}: write the field as {{{name}}}, or with a plain width, as {{{name}:02d}}")
        if names.count(name) > 1:
            raise TaskError(
                f"{text!r} has {{{name}}} twice, so '@{name}' names no one place; write one as another variable, with "
                f"the mechanism {name}_again: {name}"
            )
        if RESERVED.fullmatch(name):
            raise TaskError(f"{text!r}: '@{name}' already names tokens by their place; rename '{name}'")
    if not names:
        raise TaskError(f"{text!r} has no field, so that all its prompts are one; write {{<variable>}}")
    return names


def _described(
    source: str, given: Any, tables: Mapping[str, Any], inputs: Mapping[str, Sequence[Value]]
) -> list[Value]:
    if source == "values":
        return values_of(given, tables, inputs)
    if source == "words":
        return _distinct(str(given).split())
    if source == "keys":
        if given not in tables:
            raise TaskError(f"keys: there is no table '{given}'{nearest(str(given), tables)}")
        return list(tables[given])
    if source == "like":
        if not inputs.get(given):
            raise TaskError(f"like: '{given}' is no input before this one{nearest(str(given), list(inputs)[:-1])}")
        return list(inputs[given])
    raise TaskError("a file of words is read from a task's own file or a recipe's; here, give words: or values:")


def _distinct(values: Sequence[Any]) -> list[Value]:
    if len(values) > MOST:
        raise TaskError(f"has {len(values)} values; give {MOST} at most")
    found: dict[str, Value] = {}
    for value in values:
        _require_plain(value)
        if written(value) in found:
            raise TaskError(f"has {written(value)!r} twice")
        found[written(value)] = value
    return list(found.values())


def _table(given: Any, depth: int = 0) -> dict[str, Any]:
    """A table of tables, or of values, with its keys as texts."""
    if not isinstance(given, Mapping) or not given:
        raise TaskError(f"{given!r} is no table; write {{<value>: <result>}}")
    if depth > 5:
        raise TaskError("the table has more than 6 levels")
    found: dict[str, Any] = {}
    for key, value in given.items():
        if written(key) in found:
            raise TaskError(f"the table has the key {written(key)!r} twice")
        if not isinstance(value, Mapping):
            _require_plain(value)
        found[written(key)] = _table(value, depth + 1) if isinstance(value, Mapping) else value
    return found


def _ungrouped(groups: Any, parents: Sequence[str]) -> dict[str, Any]:
    if len(parents) != 1:
        raise TaskError(f"groups are of one parent, not {len(parents)}")
    if not isinstance(groups, Mapping) or not groups:
        raise TaskError("groups are written {<result>: [<values>]}, or {<result>: {words: a b c}}")
    found: dict[str, Any] = {}
    for result, members in groups.items():
        if not isinstance(result, str):
            raise TaskError(
                f"groups: the result {written(result)} is no text; put it in quotes, and write int(<table>[<key>]) "
                "where a number is needed"
            )
        for value in values_of(members, {}, {}):
            if written(value) in found:
                raise TaskError(f"groups: {written(value)!r} is in two, {found[written(value)]!r} and {result!r}")
            found[written(value)] = result
        if len(found) > MOST:
            raise TaskError(f"groups: there are more than {MOST} values")
    return found


def _require_plain(value: Any) -> None:
    if value is None or not isinstance(value, str | int | float):
        raise TaskError(f"{value!r} is no value; give text, a number, true or false")
    if not isinstance(value, str) and not abs(value) <= LARGEST_NUMBER:
        raise TaskError(
            f"{value!r} is beyond {LARGEST_NUMBER}, which no saved configuration may hold; write it as text"
        )


def _require_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TaskError(f"{name!r} is no name; YAML reads yes, no, on and off as true and false: write it in quotes")
    if not name.isidentifier() or keyword.iskeyword(name) or name in ("true", "false", TEMPLATE, *FUNCTIONS):
        raise TaskError(
            f"'{name}' is no name for a variable or a table; use letters, digits and _, and no word of the language"
        )


def as_call(mechanism: Mechanism, *, output: bool) -> Callable[..., Any]:
    """The mechanism as a causal model takes it; an output's value is text."""
    from inspect import Parameter, Signature

    def call(*values: Value) -> Value:
        value = mechanism.run(dict(zip(mechanism.parents, values, strict=True)))
        return written(value) if output else value

    call.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_ONLY) for name in mechanism.parents])  # type: ignore[attr-defined]
    return call
