"""What docstrings say, as Markdown: first sentences, arguments, and cells of tables."""

from __future__ import annotations

import html
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args, get_origin

ROLE = re.compile(r":\w+:`(~?)([\w.]+)`")
"""A name in a docstring that leads to where it is described: :class:`~itrain.sites.Site`."""
_SECTION = re.compile(r"^(\w+):\n((?:    .*\n|\n)+)", re.MULTILINE)
_REFERENCE = re.compile(r"[Aa]rguments are those of (.+?)\.")
_ENTRY = re.compile(r"^\s{0,3}(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?: ")


def first_paragraph(thing: Any) -> str:
    """What a docstring says before its first empty line, in one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def first_sentence(thing: Any) -> str:
    """The first sentence of a docstring."""
    return re.split(r"(?<=[.?!]) (?=[A-Z])", first_paragraph(thing), maxsplit=1)[0]


def arguments(thing: Any) -> dict[str, str]:
    """What docstrings say of each argument: a class's own, its bases', and those that they refer to."""
    found: dict[str, str] = {}
    for each in [*reversed(inspect.getmro(thing)), thing] if inspect.isclass(thing) else [thing]:
        constructor = each.__dict__.get("__init__") if inspect.isclass(each) else None
        for doc in filter(None, (inspect.getdoc(each), inspect.getdoc(constructor) if constructor else None)):
            found |= {name: text for name, text in _said_in(doc).items() if text}
        for other in _referred_to(each):
            found = {**arguments(other), **found}
    return found


def _said_in(doc: str) -> dict[str, str]:
    """The section Args of a docstring, by argument; names that share an entry share its text."""
    sections = dict(_SECTION.findall(f"{doc}\n"))
    return dict(_entries(inspect.cleandoc(f"\n{sections.get('Args', '')}")))


def _referred_to(thing: Any) -> Iterator[Any]:
    """The classes and functions of the same module's names whose arguments a docstring says are meant."""
    if found := _REFERENCE.search(inspect.getdoc(thing) or ""):
        names = vars(sys.modules[thing.__module__])
        yield from (names[name] for name in re.findall(r"\w+", ROLE.sub(r"\2", found[1])) if name in names)


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


def annotation(parameter: inspect.Parameter, owner: Any) -> str:
    """The type of an argument as its source writes it, "" where it has none; short names of choices are spelt out."""
    given = parameter.annotation
    if given is inspect.Parameter.empty:
        return ""
    if not isinstance(given, str):
        return re.sub(r"(?:\w+\.)+(\w+)", r"\1", inspect.formatannotation(given))
    names = vars(sys.modules[owner.__module__])
    words = (names.get(word) if word.isidentifier() else None for word in re.findall(r"\w+", given))
    for alias, word in zip(words, re.findall(r"\w+", given), strict=True):
        if get_origin(alias) is Literal:
            given = re.sub(rf"\b{word}\b", f"Literal[{', '.join(map(repr, get_args(alias)))}]", given)
    return given


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
