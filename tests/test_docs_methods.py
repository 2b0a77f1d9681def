"""The page of all methods: its tables have each method by its first sentence; sources, choices and recipes exist."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import itrain.interventions
import itrain.objectives
import itrain.saes
import itrain.training
from itrain import config
from itrain.interventions.base import Intervention
from itrain.interventions.featurizers import Featurizer
from itrain.interventions.masking import Gate
from itrain.objectives.base import Objective
from itrain.training.base import Training

HOME = Path(__file__).parents[1]
PAGE = (HOME / "docs" / "reference" / "methods.md").read_text(encoding="utf-8")
KINDS = {
    "Interventions": (Intervention, itrain.interventions),
    "Featurizers": (Featurizer, itrain.interventions, itrain.saes),
    "Gates": (Gate, itrain.interventions),
    "Objectives": (Objective, itrain.objectives),
    "Trainings": (Training, itrain.training),
}
NONE = "-"
ROW = re.compile(r"^\| `([\w.]+)` \| (.*) \| (.*) \| (.*) \|$", re.MULTILINE)


def defined(kind: type, *packages: ModuleType) -> dict[str, type]:
    """The classes of a kind that packages define, without abstract ones."""
    found = {}
    for package in packages:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(value) and value.__module__ == module.name and issubclass(value, kind):
                    found |= {} if inspect.isabstract(value) else {_path(value): value}
    return found


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}".removeprefix("itrain.")


def sentence(kind: type) -> str:
    """The first paragraph of a class's docstring, as a cell of a table."""
    first = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    return re.sub(r":\w+:`[~.\w]*?(\w+)`", r"`\1`", first).replace("``", "`").replace("|", "\\|")


@cache
def text(group: str, name: str) -> str:
    """A file of configs or recipes with all those on which it builds."""
    file = HOME / ("recipes" if group == "recipe" else f"configs/{group}") / f"{name}.yaml"
    own = re.sub(r"^\s*#.*\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    bases = re.findall(r"^  - (\w+)$", own, re.MULTILINE) + re.findall(r"^defaults: \[(\w+)\]", own, re.MULTILINE)
    parts = re.findall(r"^  - override /(intervention|training): (?!null$)(\w+)$", own, re.MULTILINE)
    return "\n".join(
        [own, *(text(group, base) for base in bases if base != "_self_"), *(text(*each) for each in parts)]
    )


def sections() -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    for part in PAGE.split("\n## ")[1:]:
        if ROW.search(part):
            yield part.splitlines()[0], ROW.findall(part)


def test_the_page_has_a_table_of_each_kind() -> None:
    assert [title for title, _ in sections()] == list(KINDS)


@pytest.mark.parametrize("title", KINDS)
def test_each_method_has_its_row_and_no_row_is_of_none(title: str) -> None:
    found, rows = defined(*KINDS[title]), dict(sections())[title]
    wanted = {name: f"| `{name}` | {sentence(each)} |" for name, each in found.items()}
    written = {name: f"| `{name}` | {said} |" for name, said, _, _ in rows}
    assert len(written) == len(rows)
    missing = [row for name, row in wanted.items() if written.get(name) != row]
    assert not missing, "add or correct in docs/reference/methods.md:\n" + "\n".join(missing)
    assert written.keys() == wanted.keys(), written.keys() - wanted.keys()


@pytest.mark.parametrize("title", KINDS)
def test_sources_are_those_of_the_code_and_recipes_name_the_method(title: str) -> None:
    found = defined(*KINDS[title])
    for name, _, source, where in dict(sections())[title]:
        file = re.sub(r"\s+", " ", Path(inspect.getfile(found[name])).read_text(encoding="utf-8"))
        assert all(each in file for each in source.split("; ") if each != NONE), f"{name}: {source}"
        for choice in filter(lambda each: each != NONE, where.split(", ")):
            group, _, chosen = choice.strip("`").partition("=")
            assert re.search(rf"\bitrain\.[\w.]+\.{name.split('.')[-1]}\b", text(group, chosen)), (
                f"{choice} does not name {name}"
            )


def test_the_names_of_papers_lead_to_choices_that_compose() -> None:
    (names,) = [part for part in PAGE.split("\n## ") if part.startswith("Names in papers")]
    rows = re.findall(r"^\| (.+?) \| `([^`|]+)` \|", names, re.MULTILINE)
    assert len(rows) > 20 and len(rows) == names.count("\n|") - 2
    for _, words in rows:
        itself, verb, *asked = shlex.split(words)
        assert itself == "itrain" and verb in ("fit", "sweep")
        if len(asked) == 1:  # Every recipe is composed elsewhere.
            assert text(*asked[0].split("="))
            continue
        config.request(asked, sweeps=verb == "sweep")
