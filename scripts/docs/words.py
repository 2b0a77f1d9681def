"""What docstrings say, as Markdown: first sentences, arguments, and cells of tables."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

ROLE = re.compile(r":\w+:`(~?)([\w.]+)`")
"""A name in a docstring that leads to where it is described: :class:`~itrain.sites.Site`."""
_SECTION = re.compile(r"^(\w+):\n((?:    .*\n|\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^\s{0,3}(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?: ")


def first_paragraph(thing: Any) -> str:
    """What a docstring says before its first empty line, in one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def first_sentence(thing: Any) -> str:
    """The first sentence of a docstring."""
    return re.split(r"(?<=[.?!]) (?=[A-Z])", first_paragraph(thing), maxsplit=1)[0]


def arguments(thing: Any) -> dict[str, str]:
    """What the section Args of a docstring says of each argument; names that share an entry share its text."""
    sections = dict(_SECTION.findall(f"{inspect.getdoc(thing) or ''}\n"))
    return dict(_entries(inspect.cleandoc(f"\n{sections.get('Args', '')}")))


def _entries(section: str) -> Iterator[tuple[str, str]]:
    names: list[str] = []
    text: list[str] = []
    for line in section.splitlines():
        if line.startswith("    ") or not (entry := _ENTRY.match(line)):
            text.append(line.strip())
            continue
        yield from ((name, _joined(text)) for name in names)
        names, text = entry[1].replace("*", "").split(", "), [line[entry.end() :].strip()]
    yield from ((name, _joined(text)) for name in names)


def _joined(lines: Iterable[str]) -> str:
    """The first paragraph of an entry, in one line."""
    return " ".join(" ".join(lines).split("  ")[0].split())


def plain(text: str) -> str:
    """Text of a docstring as Markdown: names of code as code, and no tags."""
    text = ROLE.sub(lambda found: f"`{found[2].split('.')[-1]}`", text).replace("``", "`")
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


def annotation(parameter: inspect.Parameter) -> str:
    """The type of an argument as its source writes it, "" where it has none."""
    given = parameter.annotation
    if given is inspect.Parameter.empty:
        return ""
    return given if isinstance(given, str) else inspect.formatannotation(given).replace("typing.", "")


def default(parameter: inspect.Parameter) -> str:
    """The default of an argument as a configuration writes it, "" where there is none."""
    given = parameter.default
    if given is inspect.Parameter.empty:
        return ""
    words = {None: "null", True: "true", False: "false"}
    if given is None or isinstance(given, bool):
        return words[given]
    return getattr(given, "__name__", None) or str(given)


def parameters(thing: Callable[..., Any]) -> list[inspect.Parameter]:
    """The named arguments of a class or function."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each for each in inspect.signature(thing).parameters.values() if each.kind in named]
