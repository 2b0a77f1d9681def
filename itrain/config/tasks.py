"""Tasks that a YAML file describes: read with the lines of its keys, and checked before a run knows of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import OmegaConf

from itrain.files import one_a_line, read_yaml
from itrain.signatures import Call, ConfigError, misfits, nearest
from itrain.tasks.declaration import DeclarationError, Key, Problem, dotted
from itrain.trust import TrustError, find, read_text, shown

DECLARED = "itrain.tasks.declared.DeclaredTask"
CHOICE = "file/"
"""What the names of choices begin with that are files of tasks."""
MOST = 200_000
"""Values in a file, its aliases written out."""
DEPTH = 30
"""Levels of lists and mappings in a file."""
_ACTS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
"""Keys by which a configuration calls what they name."""


def is_task_file(text: str) -> bool:
    """Whether a word names a file as the task."""
    return text.startswith("task=") and text.rstrip("'\"").endswith((".yaml", ".yml"))


def register_task(path: Path, store: ConfigStore) -> str:
    """Make a task's file one of Hydra's choices, and return its name.

    Raises:
        ConfigError: the file describes no task; naming file, line, key and remedy.
    """
    read = read_task(path)
    if problems := read.problems:
        more = f" (and {len(problems) - 1} more: itrain task check {path} lists all)" if len(problems) > 1 else ""
        raise ConfigError(f"{read.placed(problems[0])}{more}")
    leaf = re.sub(r"\W+", "_", path.stem)
    made = ConfigNode(
        name=f"{leaf}.yaml", node=OmegaConf.create(read.node), group="task", package=None, provider=str(path)
    )
    store.repo["task"] = {CHOICE.rstrip("/"): {made.name: made}}
    return f"{CHOICE}{leaf}"


def registered(choice: str) -> dict[str, Any]:
    """What a file's choice says."""
    found: Any = OmegaConf.to_container(ConfigStore.instance().load(f"task/{choice}.yaml").node)
    return found


class _Bounded(yaml.SafeLoader):
    """Stops at too many values, before they fill the memory."""

    count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.count += 1
        if self.count > MOST:
            raise yaml.YAMLError(f"it has more than {MOST} values")
        return super().compose_node(parent, index)


class TaskFile(NamedTuple):
    """A file that describes a task, and all that is wrong with it."""

    path: Path
    node: dict[str, Any]
    """The task's configuration, its files of words written out."""
    problems: list[Problem]
    lines: Mapping[Key, int]
    """The line of each key."""

    def placed(self, problem: Problem) -> str:
        """A problem behind the file, the line of the nearest key that the file has, and the key."""
        key = tuple(str(each) if not isinstance(each, int) else each for each in problem.key)
        line = next((self.lines[key[:end]] for end in range(len(key), 0, -1) if key[:end] in self.lines), None)
        place = f"'{self.path}'" if line is None else f"'{self.path}' line {line}"
        return f"{place}: {dotted(key)}: {problem.message}" if key else f"{place}: {problem.message}"


def read_task(path: Path) -> TaskFile:
    """The task in a file, checked as far as it can be without a tokenizer.

    Raises:
        ConfigError: it is no YAML, or names a class that is no task of itrain.
    """
    lines = _lines(path)
    node = read_yaml(path)
    if node.get("_target_", DECLARED) != DECLARED:
        _require_tasks(node, path)
        return TaskFile(path, node, [], lines)
    node = {"_target_": DECLARED, **node}
    problems = list(_unreadable(node))
    try:
        node = with_words(node, path.parent)
    except ConfigError as error:
        problems.append(Problem(("inputs",), str(error)))
    return TaskFile(path, node, problems or _faults(node), lines)


def with_words(node: Any, folder: Path) -> Any:
    """A task's configuration in which ``file: <path>`` has become the words of that file, one a line.

    Raises:
        ConfigError: there is no such file.
    """
    if isinstance(node, list):
        return [with_words(each, folder) for each in node]
    if not isinstance(node, Mapping):
        return node
    found = {key: with_words(each, folder) for key, each in node.items()}
    if isinstance(file := found.get("file"), str) and set(found) <= {"file", "equals"}:
        del found["file"]
        try:
            found["values"] = one_a_line(_beside(folder, file))
        except (OSError, ValueError) as error:
            raise ConfigError(f"the file of words {shown(file)} cannot be read: {error}") from error
    return found


def _beside(folder: Path, file: str) -> Path:
    """A file of words; a stranger's task reads nothing outside its own folder, nor what has no end.

    Raises:
        ValueError: it lies elsewhere, or is no ordinary file.
    """
    home = folder.resolve()
    path = (home / file).resolve()
    if not path.is_relative_to(home):
        raise ValueError("it is outside the folder of the file that names it; put it there, or write {words: a b c}")
    if path.exists() and not path.is_file():
        raise ValueError("it is no ordinary file")
    return path


def _require_tasks(node: Any, path: Path) -> None:
    """Refuse a file that calls anything but tasks of itrain: it may be a stranger's, and nothing says whom to trust.

    Raises:
        ConfigError: naming what it calls.
    """
    from itrain.tasks.base import Task  # which needs torch

    parts = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    if isinstance(node, Mapping) and "_target_" in node:
        try:
            find(node["_target_"], (Task,), role="task", trust=(), place=f"'{path}'")
        except TrustError as error:
            why = str(error).partition("; if you trust")[0]
            raise ConfigError(f"{why}; name classes of your own in a recipe: task: {{_target_: ...}}") from error
    for part in parts:
        _require_tasks(part, path)


def _unreadable(node: Any, key: Key = ()) -> list[Problem]:
    """The keys and texts that a configuration would act on, and those that are no text."""
    if isinstance(node, str):
        return [Problem(key, message) for message in _wrong_in(node)]
    if not isinstance(node, Mapping | list):
        return []
    found: list[Problem] = []
    for name, each in node.items() if isinstance(node, Mapping) else enumerate(node):
        inside = (*key, name)
        if name in _ACTS and inside != ("_target_",):
            found.append(Problem(inside, f"'{name}' calls what it names in a configuration; choose another word"))
        elif isinstance(name, str):
            found += [Problem(key, message) for message in _wrong_in(name)]
        found += _unreadable(each, inside)
    return found


def _wrong_in(text: str) -> list[str]:
    if "${" in text:
        return [f"{text!r} has '${{', which refers to other keys of a configuration; put a space after the '$'"]
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return [f"{text!r} has half of a character (a surrogate), which is no text; write the whole character"]
    return []


def _faults(node: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with a declared task: its keys, else their kinds, else what they say."""
    from itrain.tasks.declared import DeclaredTask  # which needs torch

    call = Call(place="", target=DeclaredTask, node=node)
    given = {key: value for key, value in node.items() if key != "_target_"}
    found = [Problem((key,), f"no such key{nearest(key, call.accepts)}") for key in given if key not in call.accepts]
    found += [Problem((key,), f"has no value; add {key}: ...") for key in call.required if key not in given]
    found += [Problem((key,), message) for key, message in misfits(call)]
    if found:
        return found
    try:
        DeclaredTask(**given)
    except DeclarationError as error:
        return list(error.problems)
    except ValueError as error:
        key = re.split(r"\W", str(error), maxsplit=1)[0]
        return [Problem((key,) if key in given else (), str(error))]
    return []


def _lines(path: Path) -> dict[Key, int]:
    """The line of each key.

    Raises:
        ConfigError: the file is no YAML, or has more or deeper values than anybody writes.
    """
    try:
        root = yaml.compose(read_text(path), Loader=_Bounded)
    except TrustError as error:
        raise ConfigError(f"task: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        raise ConfigError(f"'{path}'{line}: {error.problem}{hint}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"'{path}' cannot be read: {str(error).splitlines()[0]}") from error
    found: dict[Key, int] = {}
    waiting: list[tuple[Key, yaml.Node | None]] = [((), root)]
    for key, node in waiting:
        if len(waiting) > MOST or len(key) > DEPTH:
            raise ConfigError(f"'{path}' has more than {MOST} values, or more than {DEPTH} levels; leave aliases out")
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                found[inside := (*key, str(name.value))] = name.start_mark.line + 1
                waiting.append((inside, value))
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                found[inside := (*key, number)] = value.start_mark.line + 1
                waiting.append((inside, value))
    return found
