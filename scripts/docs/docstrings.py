"""How mkdocstrings reads this project's docstrings: its references, shared entries of arguments, and shapes."""

from __future__ import annotations

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]

_ROLE = re.compile(r":\w+:`~?([\w.]+)`")
_SHARED = re.compile(r"^(    )(\w+(?:, \w+)+): ", re.MULTILINE)
_SHAPED = {"Float", "Int", "Bool", "Num", "Shaped", "Integer", "Inexact"}


class Docstrings(griffe.Extension):
    """Makes Markdown of what the docstrings of this project are written in."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring, and quote the shapes in annotations."""
        if obj.docstring is not None:
            text = _SHARED.sub(_each, obj.docstring.value)
            text = re.sub(r"(?<![`\w])<(?=[\w/])", "&lt;", text)
            obj.docstring.value = _ROLE.sub(lambda found: _reference(obj, found[1]), text)
        if isinstance(obj, griffe.Function):
            for parameter in obj.parameters:
                _quote_shapes(parameter.annotation)
            _quote_shapes(obj.returns)
        if isinstance(obj, griffe.Attribute):
            _quote_shapes(obj.annotation)


def _each(found: re.Match[str]) -> str:
    """Names that share an entry, each with one that leads on to the last."""
    *others, last = found[2].split(", ")
    return "".join(f"{found[1]}{name}: see ``{last}``.\n" for name in others) + f"{found[1]}{last}: "


def _reference(obj: griffe.Object, name: str) -> str:
    """A name as code, which links to where it is described if it is."""
    short = name.rpartition(".")[2]
    if not name.startswith("itrain."):
        try:
            name = obj.resolve(name)
        except griffe.NameResolutionError:
            return f"`{short}`"
    return f'<autoref identifier="{name}" optional><code>{short}</code></autoref>'


def _quote_shapes(annotation: Any) -> None:
    """Shapes of one word are taken for names of types: give them their quotes back."""
    if not isinstance(annotation, griffe.Expr):
        return
    for part in annotation.iterate(flat=False):
        if part is not annotation:
            _quote_shapes(part)
    if not isinstance(annotation, griffe.ExprSubscript) or not isinstance(annotation.slice, griffe.ExprTuple):
        return
    if str(annotation.left).split(".")[-1] in _SHAPED:
        elements = annotation.slice.elements
        if isinstance(elements[-1], griffe.ExprName):
            elements[-1] = repr(elements[-1].name)
