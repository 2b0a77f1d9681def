"""Printed words: all that a message or a help tells the user to type can be typed, found by walking the package."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import lightning
import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

import itrain
from itrain.config.checking import _BUILT, Configuration
from itrain.config.overrides import parse
from itrain.files import read_yaml
from itrain.help import VERBS, help_on
from itrain.shipped import group_choices, shipped
from itrain.signatures import Call, _fits

PACKAGE = Path(itrain.__file__).parent
GAP = "\0"
"""Stands for what a message fills in."""
KEY = r"[a-z_]\w*(?:\.[a-z_]\w*)*"
WORD = re.compile(rf"(?<![\w.<{{\"'(\[/\0-])({KEY})=((?:[^\s,;:`'\")(]|,(?=\w)|\([^)]*\))+)")
COMMAND = re.compile(r"(?<![\w/])itrain ((?:--)?[a-z]+)((?: [^\s`;,)]+)*)")
MARKED = {"use_reentrant", "attn_implementation", "ckpt_path", "datamodule", "argument"}
"""Keywords of others' functions, and the word for any of them."""
MOVED = {"data": ["itrain.tasks.table.table"], "sweep": ["itrain.sweeps.grid.Grid"]}
"""By part, what takes keys of it besides its choices."""

UNKNOWN = ("site", "launcher", "hydra")
"""Parts whose keys are no arguments of an installed class."""


class Said(NamedTuple):
    place: str
    text: str


def literals(node: ast.AST) -> Iterator[tuple[int, str]]:
    """The texts below a node, each whole, with gaps."""
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
        yield node.lineno, "".join(map(str, parts))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from literals(child)


@cache
def messages() -> list[Said]:
    """All texts of the package that are sentences and no docstrings; the completion is a program of a shell."""
    found = []
    for path in sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "completion.py"}):
        tree, place = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(PACKAGE)
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""  # a docstring
        found += [Said(f"{place}:{line}", text) for line, text in literals(tree) if " " in text.strip()]
    return found


@cache
def arguments() -> frozenset[str]:
    """The names of all arguments in the package, as a call in Python gives them."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arguments):
                found |= {each.arg for each in (*node.args, *node.kwonlyargs)}
    return frozenset({*found, *inspect.signature(lightning.Trainer).parameters})


@cache
def calls(part: str) -> list[Call]:
    """What the choices of a part call."""
    files = sorted((shipped("configs") / part).glob("*.yaml"))
    nodes = [read_yaml(file) for file in files]
    targets = {node["_target_"] for node in nodes if "_target_" in node} | set(MOVED.get(part, ()))
    return [Call(place=part, target=get_object(target), node={"_target_": target}) for target in sorted(targets)]


def is_open(value: str) -> bool:
    """Whether the user or the message is to fill the value in, or Python works it out."""
    return GAP in value or "<" in value or "..." in value or "(" in value or value.endswith(("[", "{"))


def fault(key: str, value: str) -> str | None:
    """Why a word cannot be typed; None where it can."""
    part, *inside = key.split(".")
    if not inside:
        if part in (groups := group_choices()) and not is_open(value) and value not in ("null", *groups[part]):
            return f"{part} has no choice {value}"
        known = {*Configuration.__dataclass_fields__, "recipe", *arguments(), *MARKED, *verb_keys()}
        echoes = value.startswith(GAP)  # what was given
        return None if part in known or echoes else "it is neither a key nor an argument"
    if part in UNKNOWN or key == "sweep.methods":  # whose names become classes
        return None
    if part not in _BUILT:
        return "it is of no part"
    takes = [call for call in calls(part) if inside[0] in call.accepts or call.takes_anything]
    if not takes:
        return f"no choice of {part} takes it"
    if is_open(value) or len(inside) > 1:
        return None
    if "{" in value:
        return "a shell needs quotes"
    given = OmegaConf.to_container(OmegaConf.create({"a": parse(f"a={value}").value()}))["a"]  # type: ignore[index,call-overload]
    fits = [call for call in takes if inside[0] not in call.accepts or _fits(given, call.annotation(inside[0]))]
    return None if fits else f"none of {', '.join(call.target.__name__ for call in takes)} takes this value"


@cache
def verb_keys() -> frozenset[str]:
    """The keys that the helps of the verbs name."""
    told = "\n".join(help_on([verb]) for verb in VERBS)
    return frozenset({*re.findall(r"(\w+)=", told), *re.findall(r"^  (\w+) ", told, re.MULTILINE)})


def test_every_word_in_a_message_can_be_typed() -> None:
    words = [(said, *match) for said in messages() for match in WORD.findall(said.text)]
    assert len(words) > 250, "words are found"
    faults = [f"{said.place}: {key}={value}: {why}" for said, key, value in words if (why := fault(key, value))]
    assert not faults, "\n".join(faults)


def test_every_command_in_a_message_has_a_verb_and_its_words() -> None:
    told = [Said(f"help {verb}", help_on([verb])) for verb in VERBS]
    found = [(said, *match) for said in [*messages(), *told] for match in COMMAND.findall(said.text)]
    commands = [(said, verb, rest) for said, verb, rest in found if verb in VERBS or "=" in rest]
    assert len(commands) > 60, "commands are found"
    for said, verb, rest in commands:
        assert verb in VERBS, f"{said.place}: there is no verb {verb}"
        for key, value in WORD.findall(rest):
            assert key in help_on([verb]) or fault(key, value) is None, f"{said.place}: {key}={value}"


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("training=alignmnt", "no choice"),
        ("training.lora_rnk=8", "no choice of training takes it"),
        ("data.num_workers=none", "takes this value"),
        ("data.shares={train:0.9,test:0.1}", "a shell needs quotes"),
        ("hidden.size=3", "of no part"),
        ("nosuchkey=3", "neither a key nor an argument"),
        ("training.lora_rank=8", None),
        ("model.name=<folder>", None),
    ],
)
def test_a_word_that_cannot_be_typed_is_found(word: str, why: str | None) -> None:
    ((key, value),) = WORD.findall(f"wrong; add {word}, or leave it out")
    told = fault(key, value)
    assert told is None if why is None else why in str(told)
