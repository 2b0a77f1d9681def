"""What expressions do with values: checked operators and functions, whose results are bounded."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from itrain.signatures import nearest

LARGEST = 10**18
"""The largest number."""
LONGEST_TEXT = 2000
"""Characters of a text that an expression gives."""

Value = str | int | float | bool


class ExpressionError(ValueError):
    """An expression cannot be read, or has no value; the message quotes the part at fault."""


def written(value: Any) -> str:
    """A value as YAML writes it: ``true`` and ``false``, and all else as it is."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def look_up(table: Any, keys: Iterable[Any], name: str) -> Any:
    """What a table, whose keys are texts, has for the keys, one for each of its levels.

    Raises:
        ExpressionError: it has no such key, or fewer levels.
    """
    for key in keys:
        if not isinstance(table, Mapping):
            raise ExpressionError(f"{name} has no further level for {key!r}")
        if written(key) not in table:
            raise ExpressionError(f"{name} lacks {written(key)!r}{nearest(written(key), list(table)[:20])}")
        table = table[written(key)]
    return table


def result(value: Any, text: str) -> Value:
    if isinstance(value, Mapping):
        raise ExpressionError(
            f"{text!r} gives a whole row of a table; look up one value of it, as in facts[name]['key']"
        )
    if isinstance(value, tuple):
        raise ExpressionError(f"{text!r} gives a list; give text, a number, true or false")
    return value


def bounded(value: Any) -> Any:
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise ExpressionError(f"a text of {len(value)} characters; {LONGEST_TEXT} at most")
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise ExpressionError(f"a number beyond {LARGEST:.0e}")
    return value


def numbers(*values: Any) -> Sequence[Any]:
    for value in values:
        if not isinstance(value, int | float):
            raise ExpressionError(f"{_kind(value)} is no number")
    return values


def _kind(value: Any) -> str:
    return f"the text {value!r}" if isinstance(value, str) else "a table" if isinstance(value, Mapping) else repr(value)


def sequence(value: Any) -> Any:
    if not isinstance(value, str | tuple):
        raise ExpressionError(f"{_kind(value)} has no parts")
    return value


def index(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ExpressionError(f"{_kind(value)} is no whole number")
    return value


def _arithmetic(act: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda one, other: act(*numbers(one, other))


def _add(one: Any, other: Any) -> Any:
    if isinstance(one, str) and isinstance(other, str):
        return one + other
    if isinstance(one, str) or isinstance(other, str):
        raise ExpressionError("text and a number; write str(x) to join them, or int(x) to add them")
    return operator.add(*numbers(one, other))


def _power(one: Any, other: Any) -> Any:
    numbers(one, other)
    # Before it is worked out: a power of whole numbers takes memory without end.
    if abs(one) > 1 and other * math.log10(abs(one)) > 18:
        raise ExpressionError(f"a number beyond {LARGEST:.0e}")
    if one < 0 and not isinstance(other, int):
        raise ExpressionError("no power of a negative number")
    return one**other


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, str) != isinstance(other, str) or isinstance(one, Mapping) or isinstance(other, Mapping):
        raise ExpressionError(f"{_kind(one)} and {_kind(other)} are never equal; write str(x), int(x) or quotes")
    return bool(one == other)


def _ordered(act: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def compare(one: Any, other: Any) -> bool:
        return act(one, other) if isinstance(one, str) and isinstance(other, str) else act(*numbers(one, other))

    return compare


def _contained(one: Any, other: Any) -> bool:
    if isinstance(other, Mapping):
        return written(one) in other
    if isinstance(other, str) and not isinstance(one, str):
        raise ExpressionError(f"{_kind(one)} is never in a text")
    if isinstance(other, str):
        return one in other
    return any(_equal(one, each) for each in sequence(other))


def _least(choose: Callable[[Any], Any]) -> Callable[..., Any]:
    def run(*values: Any) -> Any:
        listed = values[0] if len(values) == 1 and isinstance(values[0], tuple) else values
        return choose(numbers(*listed))

    return run


def _one(*values: Any) -> Any:
    if len(values) != 1:
        raise ExpressionError(f"takes one value, not {len(values)}")
    return values[0]


def _text(*values: Any) -> str:
    if not isinstance(_one(*values), str):
        raise ExpressionError(f"{_kind(values[0])} is no text; write str(x)")
    return values[0]


def _whole(*values: Any) -> int:
    value = _one(*values)
    if isinstance(value, str) and not re.fullmatch(r"-?[0-9]{1,18}", value):
        raise ExpressionError(f"{_kind(value)} is no whole number")
    return int(value if isinstance(value, str) else numbers(value)[0])


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": _least(min),
    "max": _least(max),
    "abs": lambda *values: abs(numbers(_one(*values))[0]),
    "len": lambda *values: len(sequence(_one(*values))),
    "str": lambda *values: written(result(_one(*values), "str")),
    "int": _whole,
    "lower": lambda *values: _text(*values).lower(),
    "upper": lambda *values: _text(*values).upper(),
    "capitalize": lambda *values: _text(*values)[:1].upper() + _text(*values)[1:],
}
"""The functions of the language."""
ARITHMETIC: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: _add,
    ast.Sub: _arithmetic(operator.sub),
    ast.Mult: _arithmetic(operator.mul),
    ast.Div: _arithmetic(operator.truediv),
    ast.FloorDiv: _arithmetic(operator.floordiv),
    ast.Mod: _arithmetic(operator.mod),
    ast.Pow: _power,
}
COMPARISONS: Mapping[type, Callable[[Any, Any], bool]] = {
    ast.Eq: _equal,
    ast.NotEq: lambda one, other: not _equal(one, other),
    ast.Lt: _ordered(operator.lt),
    ast.LtE: _ordered(operator.le),
    ast.Gt: _ordered(operator.gt),
    ast.GtE: _ordered(operator.ge),
    ast.In: _contained,
    ast.NotIn: lambda one, other: not _contained(one, other),
}
