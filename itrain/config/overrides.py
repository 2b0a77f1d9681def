"""Overrides: the words of a command line, in Hydra's syntax, and what each of them sets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException

from itrain.shipped import recipe_files
from itrain.signatures import SPECIAL, Call, ConfigError, nearest

_PATHS = ("ckpt", "export", "output")
_CALL = re.compile(r"every\(.*\)")
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
"""The path of a class or function."""
_MANY = 30
"""So many choices still fit a message of one line."""
_TEXT = r'"[^"]*"(?:\[-?\d+\])?'
_AT_TEXT = re.compile(rf"""(?<!['"\w.:])[a-z][\w.:]*@(?:{_TEXT}|[^\s,\]}}"'])*{_TEXT}(?:{_TEXT}|[^\s,\]}}"'])*""")
"""A site whose position is a text of the prompt."""


def parse(text: str) -> Override:
    """The override that a word asks for.

    Raises:
        ConfigError: the word is malformed, gives several values, or sets Hydra itself.
    """
    key, equals, value = text.partition("=")
    if not key.strip("+~ "):
        raise ConfigError(f"'{text}' cannot be read; {_instead(text)}")
    is_file = key in _PATHS or (key == "task" and value.endswith((".yaml", ".yml")))
    is_quoted = is_file or not (value.isascii() or value.startswith(("[", "{")))
    if (is_quoted or _CALL.fullmatch(value)) and equals and value[:1] not in ("'", '"') and value != "null":
        # Hydra's grammar takes names such as epoch=3.ckpt, Übung and every(2) in quotes only, which a shell removes.
        text = f"{key}={quoted(value)}"
    elif equals:
        text = f"{key}={_AT_TEXT.sub(lambda site: quoted(site[0]), value)}"
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        raise ConfigError(f"'{text}' cannot be read; {_instead(text)}") from None
    if override.is_sweep_override():
        if key == "seed":
            raise ConfigError(
                f"'{text}' gives several values; several seeds are sweep.seeds=[{value}] of 'itrain sweep'"
            )
        raise ConfigError(f"'{text}' gives several values; a list is written in brackets: {key}=[{value}]")
    if override.key_or_group.split(".")[0].split("/")[0] == "hydra":
        raise ConfigError(f"'{text}': Hydra's own settings have no effect here; the folder of runs is output=<folder>")
    return override


def quoted(value: str) -> str:
    """A text that the grammar takes whole."""
    return QuotedString(text=value, quote=Quote.single).with_quotes()


def names_class(text: str) -> bool:
    """Whether a text has the form of a class's or function's path."""
    return _PATH.fullmatch(text) is not None


def launches(text: str) -> bool:
    """Whether a word sets the launcher."""
    return parse(text).key_or_group.split(".")[0] == "launcher"


def chooses(override: Override, groups: Mapping[str, object]) -> bool:
    """Whether it makes a choice in a group."""
    return (
        override.key_or_group in groups
        and override.type in (OverrideType.CHANGE, OverrideType.ADD)
        and override.value() is not None
    )


def choices_in(parsed: Sequence[Override], groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The names that words choose, by group.

    Raises:
        ConfigError: a group has no such name, or recipes are chosen by two words, of which the last would win.
    """
    if len([each for each in parsed if each.key_or_group == "recipe"]) > 1:
        raise ConfigError("recipe is given twice; several that add to each other are recipe=[<name>,<name>]")
    return {each.key_or_group: _choices(each, groups) for each in parsed if chooses(each, groups)}


def _choices(override: Override, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The names that it chooses in its group.

    Raises:
        ConfigError: the group has no such name.
    """
    value, group = override.value(), override.key_or_group
    if isinstance(value, dict):
        if group == "recipe":
            raise ConfigError("recipe=<name> makes a choice; its keys are written alone: <key>=<value>")
        words = " ".join(_one_by_one(group, value)) or f"{group}._target_=<path of a class>"
        raise ConfigError(f"{group}=<name> makes a choice; set its keys one by one: {words}")
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    for name in names:
        if name not in groups[group]:
            if group != "recipe" and names_class(name):
                raise ConfigError(
                    f"there is no {group} '{name}'; a class or function is named by its path: {group}._target_={name}"
                )
            meant = _folder(name) if group == "model" else ""
            raise ConfigError(f"there is no {group} '{name}'{meant or _choice(name, group, groups[group])}")
    return names


def _instead(word: str) -> str:
    """What to write in place of a word that is no setting."""
    if word in recipe_files():
        return f"did you mean recipe={word}?"
    return "write key=value, for example trainer.max_epochs=3"


def _choice(name: str, group: str, known: Sequence[str]) -> str:
    """The nearest choice of a part, or where its choices are listed, if they are too many for a line."""
    said = nearest(name, known)
    return said if len(known) <= _MANY or "did you mean" in said else f"; 'itrain list {group}s' shows all {len(known)}"


def _one_by_one(key: str, value: Any) -> Iterator[str]:
    """The words, as a shell takes them, that set a mapping's keys one by one."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _one_by_one(f"{key}.{name}", each)
    else:
        yield shlex.quote(f"{key}={Override._get_value_element_as_str(value)}")


def refuse_left_over(call: Call, overrides: Sequence[str]) -> None:
    """Refuse settings of a recipe or a choice that a class does not take which a word has put in place of theirs.

    Raises:
        ConfigError: with the words that leave them out.
    """
    typed = [parse(text).key_or_group for text in overrides]
    if call.at("_target_") not in typed:
        return
    lost = [call.at(key) for key in call.node if key not in call.accepts and key not in SPECIAL]
    if left := [key for key in lost if not any(f"{word}.".startswith(f"{key}.") for word in typed)]:
        name, words = left[0].rpartition(".")[2], " ".join(shlex.quote(f"~{key}") for key in left)
        raise ConfigError(
            f"{call.at('_target_')}: {call.target.__name__} takes no '{name}', which the recipe or the choice sets "
            f"for another class; add {words}"
        )


def _folder(name: str) -> str:
    """The end of a message about a model that is a folder here, or a name on the hub."""
    meant = "/" in name or Path(name).expanduser().is_dir()
    return f" among the choices; a folder or a name on the hub is model=hf model.name={name}" if meant else ""


def for_hydra(override: Override, groups: Mapping[str, object], *, replaces: bool) -> str:
    """The override as Hydra takes it: with ``+`` or ``++``, without which it refuses a key that no file lists."""
    text = override.input_line
    assert text is not None
    if override.type is not OverrideType.CHANGE:
        return text
    if override.key_or_group not in groups:
        return f"++{text}"
    if override.value() is None:
        return f"~{override.key_or_group}"
    return text if replaces or not chooses(override, groups) else f"+{text}"
