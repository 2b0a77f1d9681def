"""Writes the page of errors: what each kind of message means and what to do, with all messages that the package has.

    python scripts/error_page.py           # write the page
    python scripts/error_page.py --check   # write nothing; exit 1 where the page is not up to date

The kinds are those of ``docs/errors.yaml``. Messages and classes are read from the sources: what is raised in a file
belongs to the kind that names the file, or the longest beginning of its path.
"""

from __future__ import annotations

import ast
import builtins
import html
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from itrain.files import read_yaml, write_text
from itrain.results.markdown import markdown

HOME = Path(__file__).parents[1]
PACKAGE, TABLE, PAGE = HOME / "itrain", HOME / "docs" / "errors.yaml", HOME / "docs" / "errors.md"
COMMAND = "python scripts/error_page.py"
LONGEST = 160
"""Characters of a message that the page shows."""
QUIET = ("shown", "quoted", "printable", "repr", "str", "brief", "len", "list", "map", "sorted", "dict", "int", "tuple")
"""Functions of which a placeholder has the argument's name."""


@dataclass(frozen=True)
class Raised:
    """A place at which an error is made."""

    file: str
    line: int
    error: str
    message: str
    """As it begins, with <placeholders>; empty where it is another error's text."""


@dataclass(frozen=True)
class Kind:
    """A kind of message, as the table has it."""

    title: str
    files: Sequence[str]
    cause: str
    fix: str
    command: str | None = None
    python: str | None = None
    says: str | None = None
    written: Mapping[str, str] | None = None
    """Files that the example reads, by name."""

    @property
    def anchor(self) -> str:
        return "-".join("".join(each if each.isalnum() else " " for each in self.title.lower()).split())


@cache
def sources() -> Mapping[str, ast.Module]:
    """The syntax tree of each file of the package, by its path in it."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@cache
def classes() -> Mapping[str, tuple[str, str]]:
    """Base and first sentence of each error class that the package defines, by name."""
    found: dict[str, tuple[str, str]] = {}
    every = [node for tree in sources().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while True:
        new = {
            node.name: (base, (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " "))
            for node in every
            for base in map(ast.unparse, node.bases)
            if node.name not in found and (base in found or is_builtin(base))
        }
        if not new:
            return found
        found |= new


def is_builtin(name: str) -> bool:
    return isinstance(found := getattr(builtins, name, None), type) and issubclass(found, BaseException)


def raised() -> list[Raised]:
    """All places of the package at which an error is made, with its message."""
    return [each for file, tree in sources().items() for each in _of_file(file, tree)]


def _of_file(file: str, tree: ast.Module) -> Iterator[Raised]:
    known = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if _is_error(name):
                yield Raised(file, node.lineno, name, _message(node.args, known))
            elif name in _makers():
                yield Raised(file, node.lineno, _makers()[name], _message(node.args[-1:], known))
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and _is_error(node.exc.id):
            yield Raised(file, node.lineno, node.exc.id, "")


def _is_error(name: str) -> bool:
    return name in classes() or (is_builtin(name) and name != "Exception")


@cache
def _makers() -> Mapping[str, str]:
    """Functions that make an error of a text that they are given, and its class: ``self.refusal(node, text)``."""
    return {
        node.name: node.returns.id
        for tree in sources().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and isinstance(node.returns, ast.Name)
        if node.returns.id in classes() or is_builtin(node.returns.id)
        if node.args.args and node.args.args[-1].arg in ("reason", "why")
    }


def _message(arguments: Sequence[ast.expr], known: Mapping[str, str]) -> str:
    text = "".join(map(_shape, arguments[:1]))
    if arguments and isinstance(first := arguments[0], ast.Call) and isinstance(first.func, ast.Attribute):
        text = (
            known.get(ast.unparse(first.func.value), "").replace("{}", "<...>") if first.func.attr == "format" else ""
        )
    elif arguments and isinstance(arguments[0], ast.Name):
        text = known.get(arguments[0].id, "")
    text = " ".join(text.split())
    bare = text.startswith("<") and text.endswith(">") and text.count("<") == 1
    return "" if bare else text if len(text) <= LONGEST else text[: LONGEST - 4].rstrip() + " ..."


def _shape(node: ast.expr) -> str:
    """The text that an expression makes, with a placeholder for what differs."""
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        text = ""
        for part in node.values:
            text += "<nearest>" if text.endswith("mean '") and not isinstance(part, ast.Constant) else _shape(part)
        return text
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _shape(node.left) + _shape(node.right)
    if isinstance(node, ast.FormattedValue):
        return "" if ast.unparse(node.value).startswith("nearest(") else f"<{_placeholder(node.value)}>"
    return f"<{_placeholder(node)}>"


def _placeholder(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return "reason" if node.id in ("error", "reason", "why") else node.id.strip("_")
    if isinstance(node, ast.Attribute):
        if node.attr == "__name__" and isinstance(node.value, ast.Call) and node.value.args:
            return _placeholder(node.value.args[0])
        return node.attr.strip("_")
    if isinstance(node, ast.Subscript):
        return _placeholder(node.value)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        return _placeholder(node.args[0]) if name in QUIET and node.args else "..."
    return "..."


def kinds() -> list[Kind]:
    """The kinds of messages, in the order of the table."""
    return [_kind(each) for each in read_yaml(TABLE)["kinds"]]


def _kind(entry: Mapping[str, Any]) -> Kind:
    return Kind(**{**entry, "files": entry["files"].split()})


def kind_of(place: Raised, listed: Sequence[Kind]) -> tuple[str, Kind] | None:
    """The kind that an error belongs to, and the beginning of a path, or the class in it, by which that is known."""
    found = [(name, kind) for kind in listed for name in kind.files if _covers(name, place)]
    return max(found, key=lambda each: len(each[0]), default=None)


def _covers(name: str, place: Raised) -> bool:
    path, _, error = name.partition(":")
    return place.file.startswith(path) and error in ("", place.error)


def page() -> str:
    """The page's text."""
    listed = kinds()
    found: dict[str, list[Raised]] = defaultdict(list)
    for place in raised():
        if (known := kind_of(place, listed)) is None:
            raise SystemExit(f"{place.file}:{place.line} belongs to no kind of {TABLE.name}; add its file to one")
        found[known[1].title].append(place)
    parts = [HEAD.format(command=COMMAND), *(_section(each, found[each.title]) for each in listed)]
    return "\n".join([*parts, *_index(listed, found)]) + "\n"


HEAD = """---
search: {{boost: 4}}
---

# Errors

<!-- Written by {command} from docs/errors.yaml and the sources. -->

itrain tells a fault in one line: the thing, the place and a remedy.
Paste yours below to find the section that says what it means and what to do.
Each section lists all its messages.

<div class="finder" hidden>
<label for="message">Your message</label>
<textarea id="message" rows="2" placeholder="itrain: there is no verb 'fitt', did you mean 'fit'?"></textarea>
<ul id="found" aria-live="polite"></ul>
</div>

The command line ends with code 2 for a wrong command or configuration, and with 1 for a run that went wrong.
Add `--debug` to a command to see where in the code an error comes from.
In Python most errors about what you give are `ValueError`s; the [table of classes](#classes) has them all.
In the examples `tiny` is the embedded model, `tiny = itrain.load_embedded()`.
"""


def _section(kind: Kind, places: Sequence[Raised]) -> str:
    errors = ", ".join(f"`{name}`" for name in sorted({place.error for place in places}))
    lines = [f"## {kind.title}", "", f"{errors}", "", f"**Cause.** {kind.cause}", "", f"**Fix.** {kind.fix}"]
    if kind.says:
        given = f"`{kind.command or kind.python}`"
        said = f"itrain: {kind.says}" if kind.command else kind.says
        lines += ["", f"For example {given} says:", "", "```text", said, "```"]
    messages = list(dict.fromkeys(place.message for place in places if place.message))
    shown = "\n".join(f"<li><code>{html.escape(each, quote=False)}</code></li>" for each in messages)
    lines += ["", f"<details><summary>All messages ({len(messages)})</summary><ul>", shown, "</ul></details>", ""]
    return "\n".join(lines)


def _index(listed: Sequence[Kind], found: Mapping[str, Sequence[Raised]]) -> list[str]:
    """The table of error classes, with the sections that have them."""
    rows = []
    for name in sorted({place.error for places in found.values() for place in places} | classes().keys()):
        base, meaning = classes().get(name, ("built in", ""))
        at = [kind for kind in listed if any(place.error == name for place in found[kind.title])]
        links = ", ".join(f"[{kind.title}](#{kind.anchor})" for kind in at)
        rows.append([f"`{name}`", base if base == "built in" else f"`{base}`", meaning, links])
    return ["## Classes", "", markdown(["class", "is a", "what it says", "messages"], rows)]


def main() -> None:
    """Write the page, or compare it."""
    text = page()
    if "--check" in sys.argv[1:]:
        sys.exit(None if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text else f"out of date: {COMMAND}")
    write_text(PAGE, text)


if __name__ == "__main__":
    main()
