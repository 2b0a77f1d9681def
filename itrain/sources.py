"""What the source of a class or a function says of it: its sentence and its arguments, read without importing it.

Importing would load torch; reading takes milliseconds, so that lists, help and a shell's completion answer at once.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from inspect import cleandoc
from pathlib import Path

_SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[A-Z])")
_ITEM = re.compile(r"^(?P<names>\*{0,2}[a-z_]\w*(?:, \*{0,2}[a-z_]\w*)*): (?P<text>.*)")
_MARKUP = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`|``([^`]*)``")
_DEPTH = 8
"""How many names in a row may stand for one another before a search is given up."""


@dataclass(frozen=True, kw_only=True)
class Argument:
    """An argument of a constructor or a function, as text.

    Args:
        name: its name.
        annotation: its type.
        default: its default; None: it has none.
        says: what the docstring says of it.
        positional: whether it may be given by its position.
    """

    name: str
    annotation: str
    default: str | None
    says: str
    positional: bool


@dataclass(frozen=True, kw_only=True)
class Source:
    """A class or a function as its source has it.

    Args:
        path: the module and the name where it is defined.
        doc: the docstring; "" where there is none.
        arguments: those of the constructor or the function.
        bases: the paths of the classes that a class derives from, nearest first.
        abstract: whether some method of the class's own is abstract, or it is derived from ABC.
        is_class: whether it is a class.
    """

    path: str
    doc: str
    arguments: tuple[Argument, ...]
    bases: tuple[str, ...]
    abstract: bool
    is_class: bool

    @property
    def sentence(self) -> str:
        """The first sentence of the docstring, as plain text."""
        return sentence_of(self.doc)


def sentence_of(doc: str) -> str:
    """The first sentence of a docstring, as plain text."""
    first = " ".join(doc.split("\n\n")[0].split())
    return plain(_SENTENCE.split(first)[0] if not first.endswith(":") else first)


def plain(text: str) -> str:
    """A docstring's text without its markup."""
    return _MARKUP.sub(lambda found: found[1] or found[2] or "", text)


@cache
def source_of(path: str) -> Source | None:
    """The class or function that a path names, also where a package only hands it on; None where it is not found."""
    found = _find(path, _DEPTH)
    if found is None:
        return None
    module, node = found
    own = node if isinstance(node, ast.ClassDef) else None
    bases = tuple(_bases(module, own)) if own else ()
    doc = cleandoc(ast.get_docstring(node) or "")
    return Source(
        path=f"{module}.{node.name}",
        doc=doc,
        arguments=tuple(_arguments(module, node)),
        bases=bases,
        abstract=own is not None and _is_abstract(own),
        is_class=own is not None,
    )


def classes_of(package: str, *, kind: str = "") -> list[Source]:
    """The public classes of a package or a module, in the order of their names; those that derive from ``kind``."""
    file = _file(package)
    if file is None:
        return []
    files = sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]
    found = []
    for each in files:
        module = package if each == file else f"{package}.{each.stem}"
        for node in _tree(each).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                source = source_of(f"{module}.{node.name}")
                if source is not None and (not kind or any(base.endswith(f".{kind}") for base in source.bases)):
                    found.append(source)
    return sorted(found, key=lambda source: source.path.rpartition(".")[2].lower())


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def _file(module: str) -> Path | None:
    """The source of a module, found beside its package without importing anything."""
    first, *rest = module.split(".")
    spec = PathFinder.find_spec(first)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        inside = Path(folder).joinpath(*rest)
        for file in (inside / "__init__.py", inside.with_suffix(".py")):
            if file.is_file():
                return file
    return None


def _find(path: str, depth: int) -> tuple[str, ast.ClassDef | ast.FunctionDef] | None:
    module, _, name = path.rpartition(".")
    file = _file(module) if module and depth else None
    if file is None:
        return None
    for node in _statements(_tree(file).body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    found = _find(f"{_absolute(module, file, node)}.{alias.name}", depth - 1)
                    if found is not None:
                        return found
    return None


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, also those under ``if TYPE_CHECKING`` and the like."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _absolute(module: str, file: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    up = node.level - (file.name == "__init__.py")
    return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])


def _bases(module: str, node: ast.ClassDef, depth: int = _DEPTH) -> Iterator[str]:
    for base in node.bases:
        name = ast.unparse(base).split("[")[0]
        found = _find(f"{module}.{name}", depth) if depth else None
        if found is None:
            yield f"{module}.{name}"
        else:
            where, parent = found
            yield f"{where}.{parent.name}"
            if isinstance(parent, ast.ClassDef):
                yield from _bases(where, parent, depth - 1)


def _is_abstract(node: ast.ClassDef) -> bool:
    decorators = (each for part in node.body if isinstance(part, ast.FunctionDef) for each in part.decorator_list)
    of_abc = any(ast.unparse(base).endswith("ABC") for base in node.bases)
    return of_abc or any(ast.unparse(each).endswith("abstractmethod") for each in decorators)


def _arguments(module: str, node: ast.ClassDef | ast.FunctionDef) -> Iterator[Argument]:
    """The arguments of a function, of a class's own constructor, or of the one that it inherits."""
    says = dict(_said(cleandoc(ast.get_docstring(node) or "")))
    if isinstance(node, ast.FunctionDef):
        yield from _parameters(node, says)
        return
    own = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
    if own is not None:
        says |= dict(_said(cleandoc(ast.get_docstring(own) or "")))
        inherited = {each.name: each.says for each in _inherited(module, node)}
        yield from _parameters(own, {**inherited, **says}, bound=True)
        return
    fields = {each.name: each for each in _inherited(module, node)}
    if any("dataclass" in ast.unparse(each) for each in node.decorator_list) or _is_tuple(node):
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                default = None if part.value is None else ast.unparse(part.value)
                name = part.target.id
                fields[name] = Argument(
                    name=name,
                    annotation=ast.unparse(part.annotation),
                    default=default,
                    says=says.get(name, ""),
                    positional=False,
                )
    yield from fields.values()


def _inherited(module: str, node: ast.ClassDef) -> Iterator[Argument]:
    for base in _bases(module, node, 1):
        found = source_of(base)
        if found is not None and found.arguments:
            yield from found.arguments
            return


def _is_tuple(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base) == "NamedTuple" for base in node.bases)


def _parameters(node: ast.FunctionDef, says: dict[str, str], *, bound: bool = False) -> Iterator[Argument]:
    given = node.args
    by_place = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(by_place) - len(given.defaults)) + list(given.defaults)
    listed = [(each, default, True) for each, default in zip(by_place, defaults, strict=True)][1 if bound else 0 :]
    listed += [(each, default, False) for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    for each, default, positional in listed:
        yield Argument(
            name=each.arg,
            annotation="" if each.annotation is None else ast.unparse(each.annotation).strip("'\""),
            default=None if default is None else ast.unparse(default),
            says=says.get(each.arg, ""),
            positional=positional,
        )


def _said(doc: str) -> Iterator[tuple[str, str]]:
    """What the part ``Args:`` of a docstring says of each argument, as plain text."""
    _, found, rest = f"\n{doc}\n".partition("\nArgs:\n")
    names: list[str] = []
    texts: list[str] = []
    depth = 0
    for line in rest.splitlines() if found else ():
        indent = len(line) - len(line.lstrip())
        if line.strip() and not indent:
            break
        depth = depth or indent
        item = _ITEM.match(line.strip()) if indent == depth else None
        if item:
            yield from ((name, plain(" ".join(texts))) for name in names)
            names, texts = [name.lstrip("*") for name in item["names"].split(", ")], [item["text"]]
        elif line.strip():
            texts.append(line.strip())
    yield from ((name, plain(" ".join(texts))) for name in names)
