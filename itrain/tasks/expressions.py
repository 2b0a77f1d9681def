"""Expressions: a small language for mechanisms, which a stranger's file may use: it runs no code, and ends soon.

The syntax is Python's, read by :mod:`ast`, and of it only what :data:`ALLOWED` lists. Values are text, numbers, true
and false; lists and tables may be looked into, and are no results.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from itrain.signatures import nearest
from itrain.tasks.operations import (
    ARITHMETIC,
    COMPARISONS,
    FUNCTIONS,
    ExpressionError,
    bounded,
    index,
    look_up,
    numbers,
    result,
    sequence,
)

LONGEST = 1000
"""Characters of an expression."""
DEEPEST = 30
"""Operations inside each other."""
SHOWN = 60
"""Characters of an expression that a message quotes."""
Step = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True, kw_only=True)
class Expression:
    """An expression that can be run, and the variables that it reads in the order of their first mention."""

    text: str
    variables: tuple[str, ...]
    tables: frozenset[str]
    operations: int
    run: Step


def parse(text: str, variables: Collection[str], tables: Mapping[str, Any]) -> Expression:
    """Read an expression over these variables and tables; nothing of it is run.

    Raises:
        ExpressionError: it is no expression of the language; the message names the column and the remedy.
    """
    if len(text) > LONGEST:
        raise ExpressionError(f"the expression has {len(text)} characters; write at most {LONGEST}, or use a table")
    line = " ".join(text.split("\n")).strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in texts
            tree = ast.parse(line, mode="eval")
    except SyntaxError as error:
        raise ExpressionError(f"{line[:SHOWN]!r} column {error.offset or 1}: {error.msg}") from error
    except (ValueError, MemoryError, RecursionError) as error:
        raise ExpressionError(f"{line[:SHOWN]!r} cannot be read: {str(error) or 'it is nested too deeply'}") from error
    compiler = _Compiler(line, variables, tables)
    run = compiler.step(tree.body, 0)
    return Expression(
        text=line,
        variables=tuple(compiler.read),
        tables=frozenset(compiler.looked_up),
        operations=compiler.operations,
        run=lambda values: result(run(values), line),
    )


class _Compiler:
    """Turns the nodes of a tree into functions of the variables' values."""

    def __init__(self, text: str, variables: Collection[str], tables: Mapping[str, Any]) -> None:
        self.text, self.variables, self.tables = text, variables, tables
        self.read: dict[str, None] = {}
        self.looked_up: set[str] = set()
        self.operations = 0

    def step(self, node: ast.AST, depth: int) -> Step:
        """The function of a node.

        Raises:
            ExpressionError: the language does not have it.
        """
        self.operations += 1
        if depth > DEEPEST:
            raise self.refusal(node, f"more than {DEEPEST} operations inside each other; use a variable in between")
        make = ALLOWED.get(type(node))
        if make is None:
            raise self.refusal(node, REMEDIES.get(type(node), "only arithmetic, comparisons, texts and look-ups here"))
        return make(self, node, depth + 1)

    def refusal(self, node: ast.AST, why: str) -> ExpressionError:
        column = len(self.text.encode()[: getattr(node, "col_offset", 0)].decode()) + 1
        start = max(0, column - 1 - SHOWN // 2) if len(self.text) > SHOWN else 0
        part = self.text[start : start + SHOWN]
        return ExpressionError(f"{part!r} column {column}: {why}")

    def guarded(self, node: ast.AST, act: Callable[..., Any], *parts: Step) -> Step:
        """A function that acts on the values of others; its errors quote the node, its results are bounded."""
        said = (ast.get_source_segment(self.text, node) or "")[:SHOWN]

        def run(values: Mapping[str, Any]) -> Any:
            given = [part(values) for part in parts]
            try:
                return bounded(act(*given))
            except (ExpressionError, ArithmeticError, IndexError, ValueError) as error:
                raise ExpressionError(f"{said!r}: {error}") from error

        return run

    def constant(self, node: ast.Constant, depth: int) -> Step:
        value = node.value
        if not isinstance(value, str | int | float):
            raise self.refusal(node, f"{value!r} is no value; give text, a number, true or false")
        try:
            bounded(value)
        except ExpressionError as error:
            raise self.refusal(node, str(error)) from error
        return lambda values: value

    def name(self, node: ast.Name, depth: int) -> Step:
        name = node.id
        if name in self.variables:
            self.read[name] = None
            return lambda values: values[name]
        if name in self.tables:
            table = self.tables[name]
            self.looked_up.add(name)
            return lambda values: table
        if name in ("true", "false"):
            return lambda values: name == "true"
        known = [*self.variables, *self.tables]
        raise self.refusal(node, f"'{name}' is no variable{nearest(name, known)}; text stands in quotes")

    def binary(self, node: ast.BinOp, depth: int) -> Step:
        act = ARITHMETIC.get(type(node.op))
        if act is None:
            raise self.refusal(node, "there are +, -, *, /, //, % and **")
        return self.guarded(node, act, self.step(node.left, depth), self.step(node.right, depth))

    def unary(self, node: ast.UnaryOp, depth: int) -> Step:
        part = self.step(node.operand, depth)
        if isinstance(node.op, ast.Not):
            return lambda values: not part(values)
        if isinstance(node.op, ast.Invert):
            raise self.refusal(node, "there is no ~; write not")
        sign = -1 if isinstance(node.op, ast.USub) else 1
        return self.guarded(node, lambda value: sign * numbers(value)[0], part)

    def boolean(self, node: ast.BoolOp, depth: int) -> Step:
        parts, wanted = [self.step(value, depth) for value in node.values], isinstance(node.op, ast.Or)

        def run(values: Mapping[str, Any]) -> bool:
            return wanted if any(bool(part(values)) is wanted for part in parts) else not wanted

        return run

    def comparison(self, node: ast.Compare, depth: int) -> Step:
        parts = [self.step(each, depth) for each in (node.left, *node.comparators)]
        if unknown := [op for op in node.ops if type(op) not in COMPARISONS]:
            sign = "is" if isinstance(unknown[0], ast.Is) else "is not"
            raise self.refusal(node, f"there are ==, !=, <, <=, >, >=, in and not in, and no '{sign}'")
        acts = [COMPARISONS[type(op)] for op in node.ops]

        def compare(*given: Any) -> bool:
            return all(act(one, other) for act, one, other in zip(acts, given, given[1:], strict=False))

        return self.guarded(node, compare, *parts)

    def conditional(self, node: ast.IfExp, depth: int) -> Step:
        test, then, other = (self.step(each, depth) for each in (node.test, node.body, node.orelse))
        return lambda values: then(values) if test(values) else other(values)

    def call(self, node: ast.Call, depth: int) -> Step:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in FUNCTIONS:
            hint = f"write {node.func.attr}(x)" if isinstance(node.func, ast.Attribute) else "no other can be called"
            raise self.refusal(node, f"the functions are {', '.join(FUNCTIONS)}; {hint}")
        if node.keywords:
            raise self.refusal(node, f"{name} takes its values by position")
        return self.guarded(node, FUNCTIONS[name], *(self.step(each, depth) for each in node.args))

    def listed(self, node: ast.List | ast.Tuple, depth: int) -> Step:
        parts = [self.step(each, depth) for each in node.elts]
        return lambda values: tuple(part(values) for part in parts)

    def subscript(self, node: ast.Subscript, depth: int) -> Step:
        whole, name = self.step(node.value, depth), ast.get_source_segment(self.text, node.value)
        if isinstance(node.slice, ast.Slice):
            if node.slice.step is not None:
                raise self.refusal(node, "a slice has no step")
            ends = [self.step(end or ast.Constant(value=True), depth) for end in (node.slice.lower, node.slice.upper)]
            lower, upper = node.slice.lower is not None, node.slice.upper is not None

            def cut(value: Any, start: Any, stop: Any) -> Any:
                return sequence(value)[index(start) if lower else None : index(stop) if upper else None]

            return self.guarded(node, cut, whole, *ends)
        keys = [
            self.step(each, depth) for each in (node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice])
        ]

        def item(value: Any, *at: Any) -> Any:
            if isinstance(value, Mapping):
                return look_up(value, at, f"table {name}")
            if len(at) != 1:
                raise ExpressionError("text and lists have one index")
            return sequence(value)[index(*at)]

        return self.guarded(node, item, whole, *keys)


ALLOWED: Mapping[type, Callable[[_Compiler, Any, int], Step]] = {
    ast.Constant: _Compiler.constant,
    ast.Name: _Compiler.name,
    ast.BinOp: _Compiler.binary,
    ast.UnaryOp: _Compiler.unary,
    ast.BoolOp: _Compiler.boolean,
    ast.Compare: _Compiler.comparison,
    ast.IfExp: _Compiler.conditional,
    ast.Call: _Compiler.call,
    ast.List: _Compiler.listed,
    ast.Tuple: _Compiler.listed,
    ast.Subscript: _Compiler.subscript,
}
"""All that an expression may be made of."""
REMEDIES: Mapping[type, str] = {
    ast.Attribute: "there are no attributes; functions stand before their value, as in upper(name)",
    ast.JoinedStr: "there are no f-strings; join texts with +",
    ast.Lambda: "there are no functions of one's own",
    ast.ListComp: "there are no loops; use a table",
    ast.GeneratorExp: "there are no loops; use a table",
    ast.SetComp: "there are no loops; use a table",
    ast.DictComp: "there are no loops; use a table",
    ast.Dict: "a table stands under tables: or in a mechanism of its own",
    ast.Set: "write a list in brackets",
    ast.Starred: "there is no *",
    ast.NamedExpr: "there is no :=; use a variable of its own",
}
