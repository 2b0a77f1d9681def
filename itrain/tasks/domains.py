"""What the variables of a declared task can be: checked in their roles, and gone through for their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from itrain.signatures import nearest
from itrain.tasks import TaskError
from itrain.tasks.declaration import TEMPLATE, Problems, check_template, values_of
from itrain.tasks.operations import Value, written
from itrain.tasks.structure import Structure

Values = Mapping[str, Sequence[Value] | None]
"""The values that each variable can take; None: too many to go through."""


def check_variables(
    structure: Structure,
    *,
    output: str,
    roles: Mapping[str, Sequence[str]],
    problems: Problems,
) -> None:
    """Note names in some role that are no variables, or none that can have it."""
    known = structure.variables
    for role, names in {"output": [output], **roles}.items():
        for number, name in enumerate(names):
            key = (role, name) if role == "values" else (role,)
            if name not in known:
                problems.add(key, f"'{name}' is no variable{nearest(str(name), known)}")
            elif name in names[:number]:
                problems.add(key, f"'{name}' stands there twice")
            elif role in ("output", "values") and name in structure.inputs:
                problems.add(key, f"'{name}' is an input; name the result of a mechanism")
            elif role == "one_token" and name not in structure.inputs:
                problems.add(key, f"'{name}' is no input")
    if not roles["variables"]:
        problems.add(("variables",), "name the variables that pairs interchange")
    if problems:
        return
    behind = structure.ancestors({output})
    for name in roles["variables"]:
        if name == output or name not in behind:
            what = "is the output itself" if name == output else f"does not act on the output '{output}'"
            problems.add(("variables",), f"'{name}' {what}, so that nothing is learned from interchanging it")


def check_texts(structure: Structure, texts: Sequence[Any], values: Values, output: str, problems: Problems) -> None:
    """Note templates with fields that are none, truth values and outputs in texts, and inputs that nothing reads."""
    fields: set[str] = set()
    for number, text in enumerate(texts):
        with problems.at(*((TEMPLATE,) if len(texts) == 1 else (TEMPLATE, number))):
            names = check_template(text, structure.variables)
            fields.update(names)
            if output in names:
                raise TaskError(f"{text!r} shows the output '{output}'")
            for name in names:
                if any(isinstance(value, bool) for value in values.get(name) or ()):
                    raise TaskError(
                        f"{text!r}: '{name}' is true or false, which is no word of a text; YAML reads Yes, No, On and "
                        "Off so, unless they stand in quotes"
                    )
    if problems:
        return
    read = {name for each in structure.conditions for name in each[2].parents}
    read = read.union(fields, (TEMPLATE,), *(each.parents for each in structure.mechanisms.values()))
    for name in structure.inputs:
        if name not in read:
            problems.add(("inputs", name), "nothing reads it: no mechanism, template or condition; leave it out")


def find_values(structure: Structure, given: Mapping[str, Any], problems: Problems) -> dict[str, list[Value] | None]:
    """The values of each variable: those that are given, else those that it takes in some setting."""
    found, errors = structure.values()
    for error in errors:
        problems.add(error.key if error.key != ("mechanisms", TEMPLATE) else (TEMPLATE,), error)
    for name, spec in given.items():
        with problems.at("values", name):
            found[name] = values_of(spec, {}, {})
    return found


def find_outputs(
    structure: Structure,
    output: str,
    swaps: Sequence[Sequence[str]],
    values: Values,
    given: Mapping[str, Any],
    problems: Problems,
) -> list[Value]:
    """The values of the output, also after interchanges, in order."""
    for name in dict.fromkeys([*(each for swap in swaps for each in swap), output]):
        if values[name] is None:
            inputs = sorted(structure.ancestors({name}) & set(structure.inputs))
            count = prod(len(structure.inputs[each]) for each in inputs)
            problems.add(
                ("values",),
                f"'{name}' depends on {', '.join(inputs)}, {count:,} settings, which are too many to go through; "
                f"list what it can be: values: {{{name}: [...]}}",
            )
        elif name not in structure.inputs and len(values[name] or ()) < 2:
            of = ("output",) if name == output else ("mechanisms", name)
            problems.add(of, f"'{name}' is {_shown(values[name])} in every setting, so that there is nothing to find")
    if problems:
        return []
    found = dict.fromkeys(values[output] or ())
    for swap in () if output in given else swaps:
        taken, errors = structure.after(output, {name: values[name] or () for name in swap})
        for error in errors:
            problems.add(error.key, f"after an interchange of {'+'.join(swap)}: {error}")
        found |= dict.fromkeys(taken or ())
    if any(isinstance(each, bool) for each in found):
        problems.add(
            ("output",),
            f"'{output}' is true or false, which is no answer in text; write {output}: \"'Yes' if ... else 'No'\"",
        )
    if len({written(each) for each in found}) < len(found):
        problems.add(("output",), f"'{output}' is now a number and now the same as text; use str(x) or int(x)")
    return sorted(found, key=lambda each: (isinstance(each, str), each if not isinstance(each, str) else 0, str(each)))


def _shown(values: Sequence[Value] | None) -> str:
    return ", ".join(map(repr, values or ())) or "nothing"
