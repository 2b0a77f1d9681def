"""What the source of a class or a function says of it: its sentence and its arguments, read without importing it.

Importing would load torch; reading takes milliseconds, so that lists, help and a shell's completion answer at once.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from inspect import cleandoc
from pathlib import Path

_SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[A-Z])")
_ITEM = re.compile(r"^(?P<names>\*{0,2}[a-z_]\w*(?:, \*{0,2}[a-z_]\w*)*): (?P<text>.*)")
_MARKUP = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`|``([^`]*)``")
_REFERENCE = re.compile(r"[Aa]rguments are those of (.+?)\.")
_DEPTH = 8
"""How many names in a row may stand for one another before a search is given up."""
_SPELT_OUT = ("Literal", "Union", "Optional")
"""Types whose aliases say less than they do."""


@dataclass(frozen=True, kw_only=True)
class Argument:
    """An argument of a constructor or a function, as text.

    Args:
        name: its name.
        annotation: its type; aliases of choices are spelt out.
        default: its default; None: it has none.
        says: what the docstring says of it, or that of the class or function whose arguments it says are meant.
    """

    name: str
    annotation: str
    default: str | None
    says: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A class or a function as its source has it.

    Args:
        path: the module and the name where it is defined.
        doc: the docstring; "" where there is none.
        arguments: those of the constructor or the function.
        bases: the paths of the classes that a class derives from, nearest first.
        abstract: whether some method of the class's own is abstract, or it is derived from ABC.
    """

    path: str
    doc: str
    arguments: tuple[Argument, ...]
    bases: tuple[str, ...]
    abstract: bool

    @property
    def paragraph(self) -> str:
        """What the docstring says before its first empty line, in one line."""
        return " ".join(self.doc.split("\n\n")[0].split())

    @property
    def sentence(self) -> str:
        """The first sentence of the docstring, as plain text."""
        first = self.paragraph
        return plain(first if first.endswith(":") else _SENTENCE.split(first)[0])


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
    """The module that defines a class or function, and its syntax tree."""
    found = _definition(path, depth)
    if found is None:
        return None
    module, node = found
    return (module, node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else None


def _definition(path: str, depth: int) -> tuple[str, ast.ClassDef | ast.FunctionDef | ast.expr] | None:
    """The module in which a name gets what it stands for: a class, a function, or the value that is assigned to it."""
    module, _, name = path.rpartition(".")
    file = _file(module) if module and depth else None
    if file is None:
        return None
    for node in _statements(_tree(file).body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(each, ast.Name) and each.id == name for each in targets):
                return module, node.value
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    found = _definition(f"{_absolute(module, file, node)}.{alias.name}", depth - 1)
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
    says = _described(module, node)
    if isinstance(node, ast.FunctionDef):
        yield from _parameters(module, node, says)
        return
    own = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
    if own is not None:
        inherited = {each.name: each.says for each in _inherited(module, node)}
        yield from _parameters(module, own, {**inherited, **says, **_described(module, own)}, bound=True)
        return
    fields = {each.name: each for each in _inherited(module, node)}
    if any("dataclass" in ast.unparse(each) for each in node.decorator_list) or _is_tuple(node):
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                fields[part.target.id] = _argument(module, part.target.id, part.annotation, part.value, says)
    yield from fields.values()


def _described(module: str, node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    """What a docstring says of each argument, itself or by naming another class or function."""
    doc = cleandoc(ast.get_docstring(node) or "")
    says: dict[str, str] = {}
    if found := _REFERENCE.search(doc):
        for name in re.findall(r"\w+", plain(found[1])):
            other = source_of(f"{module}.{name}")
            says = {**({each.name: each.says for each in other.arguments if each.says} if other else {}), **says}
    return says | dict(_said(doc))


def _inherited(module: str, node: ast.ClassDef) -> Iterator[Argument]:
    for base in _bases(module, node, 1):
        found = source_of(base)
        if found is not None and found.arguments:
            yield from found.arguments
            return


def _is_tuple(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base) == "NamedTuple" for base in node.bases)


def _parameters(
    module: str, node: ast.FunctionDef, says: Mapping[str, str], *, bound: bool = False
) -> Iterator[Argument]:
    given = node.args
    by_place = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(by_place) - len(given.defaults)) + list(given.defaults)
    listed = [*zip(by_place, defaults, strict=True)][1 if bound else 0 :]
    for each, default in [*listed, *zip(given.kwonlyargs, given.kw_defaults, strict=True)]:
        yield _argument(module, each.arg, each.annotation, default, says)


def _argument(
    module: str, name: str, annotation: ast.expr | None, default: ast.expr | None, says: Mapping[str, str]
) -> Argument:
    return Argument(
        name=name,
        annotation="" if annotation is None else ast.unparse(_spelt_out(module, annotation)).strip("'\""),
        default=None if default is None else ast.unparse(_constant(module, default)),
        says=says.get(name, ""),
    )


def _spelt_out(module: str, annotation: ast.expr) -> ast.expr:
    """A type with the choices in place of the names that stand for them."""

    class SpellOut(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            home, alias = _value(module, node) if _is_of_package(module, node.id) else (module, node)
            is_alias = isinstance(alias, ast.Subscript) and ast.unparse(alias.value).rpartition(".")[2] in _SPELT_OUT
            return _spelt_out(home, alias) if is_alias else node

    return SpellOut().visit(deepcopy(annotation))


def _value(module: str, name: ast.expr) -> tuple[str, ast.expr]:
    """What is assigned to a name, and the module that does it; the name itself where nothing is."""
    found = _definition(f"{module}.{name.id}", _DEPTH) if isinstance(name, ast.Name) else None
    home, value = found or (module, name)
    return (home, value) if isinstance(value, ast.expr) else (module, name)


def _is_of_package(module: str, name: str) -> bool:
    """Whether a module defines a name, or imports it from its own package: others' types are not looked into."""
    file = _file(module)
    for node in _statements(_tree(file).body) if file is not None else ():
        if isinstance(node, ast.ImportFrom) and any((each.asname or each.name) == name for each in node.names):
            return bool(node.level) or (node.module or "").split(".")[0] == module.split(".")[0]
    return True


def _constant(module: str, default: ast.expr) -> ast.expr:
    """The value of a constant that a default names, if it is written out or the choices of a type; else the default."""
    home, value = _value(module, default)
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "get_args":
        choices = _spelt_out(home, value.args[0])
        value = choices.slice if isinstance(choices, ast.Subscript) else value
    try:
        ast.literal_eval(value)
    except ValueError:
        return default
    return value


def _said(doc: str) -> Iterator[tuple[str, str]]:
    """What the part ``Args:`` of a docstring says of each argument, in one line."""
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
            yield from ((name, " ".join(texts)) for name in names)
            names, texts = [name.lstrip("*") for name in item["names"].split(", ")], [item["text"]]
        elif line.strip():
            texts.append(line.strip())
    yield from ((name, " ".join(texts)) for name in names)
