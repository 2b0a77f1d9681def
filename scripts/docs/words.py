"""Text of docstrings and of code as Markdown, and tables of it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_ROLE = re.compile(r":\w+:`~?([\w.]+)`")
"""A name in a docstring that leads to where it is described: :class:`~itrain.sites.Site`."""


def plain(text: str) -> str:
    """Text of a docstring as Markdown: names of code as code, and no tags."""
    text = _ROLE.sub(lambda found: f"`{found[1].split('.')[-1]}`", text).replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*") for part in parts)


def code(text: str) -> str:
    """A word of code that may hold what separates cells."""
    escaped = re.sub(r"[|*_]", lambda found: f"&#{ord(found[0])};", html.escape(text, quote=False))
    return f"<code>{escaped}</code>"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown, whose cells are Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
