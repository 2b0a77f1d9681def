"""What ships with itrain to choose from: recipes, choices for each part, and classes; and what a command line chooses.

Read as plain YAML, without Hydra, so that a shell's completion answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from itrain.sources import plain, source_of

ROWS = "reproduce"
"""The folder beside those of the groups that holds no choices, but the rows of ``itrain reproduce``."""
FAMILIES = {
    "objective": ("itrain.objectives", "Objective"),
    "featurizer": ("itrain.interventions", "Featurizer"),
    "gate": ("itrain.interventions", "Gate"),
    "probe": ("itrain.probes", "Probe"),
    "detector": ("itrain.detectors", "Detector"),
    "judge": ("itrain.training.judges", "Judge"),
    "metric": ("itrain.metrics", "Metric"),
}
"""Classes that no part chooses by name: the package that holds them, and the class that they derive from."""
COMPONENTS = "itrain.architectures.parts.Architecture"
"""The class whose description says what each component of a block is."""
_NAMES = re.compile(r"((?:``[a-z_.]+``(?:, )?)+): ")
_OVERRIDE = "override /"
_ABSOLUTE = "/recipe/"
_FASTEST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")


class _Loader(_FASTEST):
    """Takes 1e-3 for a number, as Hydra does."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


class Chosen(NamedTuple):
    """What is chosen for each part, and what is set besides: plain values by part and key, as files say."""

    choices: Mapping[str, str]
    settings: Mapping[str, Any]


def shipped(folder: str) -> Path:
    """``configs`` or ``recipes``: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / f"_{folder}"
    return inside if inside.is_dir() else package.parent / folder


def recipe_files() -> dict[str, Path]:
    """Recipes by name: those that ship with itrain and those in ./recipes, which take precedence."""
    folders = (shipped("recipes"), Path("recipes").resolve())
    return {_name(file, folder): file for folder in folders for file in sorted(folder.rglob("*.yaml"))}


def shipped_rows() -> list[Path]:
    """The files of the rows of ``itrain reproduce`` that ship with itrain."""
    return sorted((shipped("configs") / ROWS).glob("*.yaml"))


def group_files() -> dict[str, dict[str, Path]]:
    """The groups of the configuration, and in each its choices by name, without recipes."""
    folders = sorted(path for path in shipped("configs").iterdir() if path.is_dir() and path.name != ROWS)
    return {folder.name: {_name(file, folder): file for file in sorted(folder.rglob("*.yaml"))} for folder in folders}


def group_choices() -> dict[str, list[str]]:
    """The groups of the configuration and the choices in each, without recipes."""
    return {group: list(files) for group, files in group_files().items()}


def choice(group: str, name: str) -> dict[str, Any]:
    """What a choice says, with what it inherits; nothing where there is no such choice."""
    file = shipped("configs") / group / f"{name}.yaml"
    node = _plain(file) if file.is_file() else {}
    inherited = [choice(group, each) for each in node.pop("defaults", ()) if isinstance(each, str)]
    return {key: value for each in (*inherited, node) for key, value in each.items()}


def chosen(words: Iterable[str]) -> Chosen:
    """What the words choose: by themselves, by their recipes, and by default."""
    defaults = _plain(shipped("configs") / "config.yaml").get("defaults", ())
    found: dict[str, str] = {}
    settings: dict[str, Any] = {}
    for each in defaults:
        if isinstance(each, Mapping):
            found |= {group: str(name) for group, name in each.items() if name is not None}
    typed = [word.split("=", 1) for word in words if "=" in word]
    for key, value in typed:
        if key == "recipe":
            for name in value.strip("[]").split(","):
                of_recipe = recipe(name.strip())
                found |= of_recipe.choices
                settings = _merged(settings, of_recipe.settings)
    groups = group_files()
    found |= {key: value for key, value in typed if key in groups and value in groups[key]}
    return Chosen({group: name for group, name in found.items() if name}, settings)


def recipe(name: str, seen: Sequence[str] = ()) -> Chosen:
    """What a recipe, by its name or file, chooses and sets, with what it inherits; "" for a part that it leaves out."""
    files = recipe_files()
    file = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else files.get(name)
    if name in seen or file is None or not file.is_file():
        return Chosen({}, {})
    node = _plain(file)
    choices: dict[str, str] = {}
    settings: dict[str, Any] = {}
    listed = node.pop("defaults", None)
    for each in listed if isinstance(listed, list) else ():
        if isinstance(each, str):
            inherited = recipe(each.removeprefix(_ABSOLUTE), (*seen, name))
            choices |= inherited.choices
            settings = _merged(settings, inherited.settings)
        elif isinstance(each, Mapping):
            for key, value in each.items():
                if str(key).startswith(_OVERRIDE):
                    choices[str(key).removeprefix(_OVERRIDE)] = "" if value is None else str(value)
    return Chosen(choices, _merged(settings, node))


def comment(file: Path) -> str:
    """The comments of a choice, in one line: what it is."""
    return " ".join(_comments(file))


def title(recipe: Path) -> str:
    """The first line of a recipe that is a comment: what it does."""
    return next(iter(_comments(recipe)), "")


def components() -> dict[str, str]:
    """What each component of a block is, from the description of the table's rows."""
    source = source_of(COMPONENTS)
    assert source is not None, "the table's rows are a class"
    text, _, weights = source.doc.split("components:", 1)[1].partition("Rows with ")
    found: dict[str, str] = {}
    for item in re.split(r"\n\s*\* ", text)[1:]:
        _, *parts = _NAMES.split(" ".join(item.split()))
        for names, says in zip(parts[::2], parts[1::2], strict=True):
            found |= dict.fromkeys(re.findall(r"``([a-z_.]+)``", names), plain(says).strip(" ;."))
    return found | {
        "attention_weights": plain(" ".join(weights.partition("``, ")[2].split()) or " ".join(weights.split()))
    }


def _comments(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [f"(cannot be read: {error})"]
    return [line.lstrip("# ").rstrip() for line in lines if line.startswith("#")]


def unread(file: Path) -> str | None:
    """Why a file is no mapping of YAML, in one line; None: it is one, or empty."""
    read = _read(file)
    return read if isinstance(read, str) else None


def _plain(file: Path) -> dict[str, Any]:
    """A file's mapping; an empty one where it cannot be read, as files in ./recipes need not be itrain's."""
    read = _read(file)
    return {} if isinstance(read, str) else read


def _read(file: Path) -> dict[str, Any] | str:
    """A file's mapping, or why it is none."""
    try:
        node = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        return " ".join(str(error).split())
    if node is None or isinstance(node, dict):
        return node or {}
    return f"it holds a {type(node).__name__}, not keys and values"


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(below[key], above[key]) for key in below.keys() & above.keys() if _are_maps(below, above, key)}
    return {**below, **above, **both}


def _are_maps(below: Mapping[str, Any], above: Mapping[str, Any], key: str) -> bool:
    return isinstance(below[key], Mapping) and isinstance(above[key], Mapping)


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()
