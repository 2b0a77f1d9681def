"""The language of mechanisms: what it says, and that a hostile text is refused before any of it is run."""

from __future__ import annotations

import time
from typing import Any

import pytest

from itrain.tasks.expressions import parse
from itrain.tasks.operations import ExpressionError

VALUES = {"a": 7, "b": 5, "name": "Mary", "flag": True, "ratio": 0.5}
TABLES = {"gender": {"Mary": "female", "John": "male"}, "facts": {"fig": {"color": "red"}}, "digits": {"7": "seven"}}


def value(text: str) -> Any:
    return parse(text, VALUES, TABLES).run(VALUES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a + b", 12),
        ("a - b * 2", -3),
        ("a / 2", 3.5),
        ("a // 2 + a % 2", 4),
        ("2 ** 10", 1024),
        ("-a", -7),
        ("a + b > 9", True),
        ("3 < b < a", True),
        ("3 < b < 4", False),
        ("a == 7 and not b == 7", True),
        ("a == 0 or name", True),
        ("'Yes' if flag else 'No'", "Yes"),
        ("a + flag", 8),
        ("name + ' ' + str(a)", "Mary 7"),
        ("name[0] + name[-1]", "My"),
        ("name[1:3] + name[:1]", "arM"),
        ("upper(name[0]) + lower(name)[1:] + capitalize('x')", "MaryX"),
        ("len(name) + len([1, 2])", 6),
        ("min(a, b) + max([a, b]) + abs(0 - 1)", 13),
        ("int('12') + int(3.9)", 15),
        ("str(flag)", "true"),
        ("a in [1, 7]", True),
        ("'ar' in name and 'z' not in name", True),
        ("name in gender", True),
        ("gender[name]", "female"),
        ("facts['fig']['color'] + facts['fig', 'color']", "redred"),
        ("digits[a]", "seven"),
        ("['zero', 'one'][a // 7]", "one"),
        ("flag == true", True),
        ("a > b\n  and flag", True),
    ],
)
def test_an_expression_has_the_value_that_python_gives_it(text: str, expected: Any) -> None:
    found = value(text)
    assert found == expected and type(found) is type(expected)


def test_an_expression_names_its_variables_in_order() -> None:
    read = parse("b + len(gender[name]) + b + a", VALUES, TABLES)
    assert read.variables == ("b", "name", "a") and read.tables == {"gender"}


HOSTILE = {
    "__import__('os').system('true')": "the functions are",
    "eval('1')": "the functions are",
    "exec('a=1')": "the functions are",
    "open('/etc/passwd')": "the functions are",
    "getattr(name, 'upper')": "the functions are",
    "name.upper()": r"write upper\(x\)",
    "name.__class__": "there are no attributes",
    "().__class__.__bases__[0].__subclasses__()": "the functions are",
    "''.join(['a', 'b'])": "the functions are",
    "'{0.__class__}'.format(name)": "the functions are",
    "f'{name}'": "there are no f-strings",
    "lambda: a": "there are no functions",
    "[x for x in name]": "there are no loops",
    "(x for x in name)": "there are no loops",
    "{x: x for x in name}": "there are no loops",
    "{'a': 1}": "a table stands under",
    "{1, 2}": "write a list",
    "(a := 1)": "there is no :=",
    "[*name]": r"there is no \*",
    "min(*[1, 2])": r"there is no \*",
    "str(object=a)": "by position",
    "len(globals)": "'globals' is no variable",
    "__builtins__": "'__builtins__' is no variable",
    "a; b": "invalid syntax",
    "import os": "invalid syntax",
    "a = 1": "invalid syntax",
    "yield a": "invalid syntax|only arithmetic",
    "await a": "only arithmetic|invalid syntax",
    "a if": "expected|invalid",
    "a @ b": "there are",
    "a << 60": "there are",
    "~a": "write not",
    "a is b": "no 'is'",
    "name[::-1]": "a slice has no step",
    "b'x'": "is no value",
    "None": "is no value",
    "...": "is no value",
    "1j": "is no value",
    "9" * 30: "beyond",
    "1e400": "beyond",
    "1" * 2000: "2000 characters",
    "(" * 300 + "1" + ")" * 300: "too many nested|nested too deeply",
    "-" * 900 + "1": "inside each other|nested too deeply",
    "1+" * 400 + "1": "inside each other",
    "(1<" * 200 + "1" + ")" * 200: "inside each other|nested|too",
    "\0": "null|cannot be read|source",
    "nobody + 1": "'nobody' is no variable",
    "": "invalid syntax",
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:30])
def test_a_hostile_expression_is_refused_when_it_is_read(text: str) -> None:
    start = time.monotonic()
    with pytest.raises(ExpressionError, match=HOSTILE[text]) as refused:
        parse(text, VALUES, TABLES)
    assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)
    assert time.monotonic() - start < 1


UNBOUNDED = {
    "9 ** 9 ** 9": "beyond",
    "a ** (10 ** 17)": "beyond",
    "10 ** 18 * 10": "beyond",
    "0.5 ** (0 - 10 ** 17)": "'0.5 \\*\\* ",
    "name * 10 ** 9": "is no number",
    "[1] * 3": "is no number",
    "a // 0": "division|modulo",
    "a % 0": "modulo|division",
    "name + a": "write str",
    "name == a": "are never equal",
    "a in ['x']": "are never equal",
    "a < name": "is no number",
    "a in name": "is never in a text",
    "name[9]": "out of range",
    "name['x']": "is no whole number",
    "a[0]": "has no parts",
    "gender['Bob']": "table gender lacks 'Bob'",
    "facts['fig']": "a whole row of a table",
    "facts['fig', 'color', 'x']": "no further level",
    "gender": "a whole row",
    "[a, b]": "gives a list",
    "int('twelve')": "is no whole number",
    "upper(a)": "is no text",
    "abs(1, 2)": "takes one value",
    "(0 - 8) ** 0.5": "no power of a negative",
}


@pytest.mark.parametrize("text", UNBOUNDED)
def test_what_grows_without_end_or_has_no_value_is_refused_when_it_is_run(text: str) -> None:
    read, start = parse(text, VALUES, TABLES), time.monotonic()
    with pytest.raises(ExpressionError, match=UNBOUNDED[text]):
        read.run(VALUES)
    assert time.monotonic() - start < 1


def test_a_text_stays_short() -> None:
    text = "name"
    for _ in range(9):
        text = f"({text}) + ({text})" if len(text) < 400 else text
    long = parse(text, {"name": ""}, {})
    with pytest.raises(ExpressionError, match=r"a text of .* characters; 2000 at most"):
        long.run({"name": "x" * 500})


def test_comparisons_inside_each_other_take_no_time() -> None:
    """Each value of a chain is worked out once, or thirty of them would take a billion steps."""
    text = "1"
    for _ in range(28):
        text = f"(0 < {text} < 2)"
    start = time.monotonic()
    assert parse(text, {}, {}).run({}) is True
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("text", "column"), [("a + naem", 5), ("'é' + naem", 7), ("a + (b", 5), ("x" + " + a" * 30 + " + naem", 1)]
)
def test_an_error_names_the_column(text: str, column: int) -> None:
    with pytest.raises(ExpressionError, match=f"column {column}: "):
        parse(text, VALUES, TABLES)
