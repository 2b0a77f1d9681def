"""Text of docstrings and of code as Markdown."""

from __future__ import annotations

import html
import re

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
