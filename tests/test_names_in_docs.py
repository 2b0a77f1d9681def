"""What the pages about the code name exists: files, folders, classes, functions and methods."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from scripts.draw_house import drawing

HOME = Path(__file__).parents[1]
DOCS = HOME / "docs"
PAGES = [*sorted((DOCS / "how_it_works").glob("*.md")), DOCS / "contributing.md"]
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?:itrain|tests|scripts|configs|recipes|docs)/[\w./-]*")
NAME = re.compile(r"[A-Z]\w+(?:\.\w+)?")
OTHERS = {"Trainer.fit"}
"""Names of other libraries."""
OF_YOUR_OWN = {"x"}
"""Recipes that the page itself shows."""


@cache
def defined() -> set[str]:
    """The classes of the package and their methods, also inherited ones of a parent by its own name."""
    found = set()
    for path in (HOME / "itrain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                methods = (each.name for each in node.body if isinstance(each, ast.FunctionDef))
                found |= {node.name, *(f"{node.name}.{name}" for name in methods)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_files_and_classes_that_a_page_names_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    codes = CODE.findall(text)
    files = [code for code in codes if FILE.fullmatch(code) and not re.search(r"/x\.|/test_x", code)]
    names = [code for code in codes if NAME.fullmatch(code) and code not in OTHERS]
    assert files and names
    assert not [file for file in files if not (HOME / file).exists()]
    assert not [name for name in names if name not in defined()]


def test_a_function_is_named_beside_the_file_that_defines_it() -> None:
    """Rows of the tables of a step, and phrases such as `difference` in `itrain/.../comparison.py`."""
    text = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    found = re.findall(r"`([\w.]+)`(?: \||\s+in)\s+`(itrain/[\w/]+\.py)`", text)
    assert len(found) > 10
    for name, file in found:
        last = name.rpartition(".")[2]
        code = (HOME / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(?:def|class) {last}\b", code, re.MULTILINE), f"{file} has no {name}"


def test_recipes_that_pages_name_in_a_sentence_or_a_table_exist() -> None:
    pages = [*sorted(DOCS.rglob("*.md")), HOME / "README.md"]
    codes = [code for page in pages for code in CODE.findall(page.read_text(encoding="utf-8"))]
    named = {name for code in codes for name in re.findall(r"\brecipe=(\w+)(?![\w/.])", code)}
    files = {path.stem for path in (HOME / "recipes").glob("*.yaml")}
    assert len(named) > 30 and not named - files - OF_YOUR_OWN


def test_the_picture_of_the_house_is_that_of_the_plan() -> None:
    """Run `python scripts/draw_house.py` after a room is added."""
    assert (DOCS / "assets" / "house.svg").read_text(encoding="utf-8") == drawing()
