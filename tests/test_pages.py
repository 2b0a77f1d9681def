"""Every block of code in docs/ and in the README runs, is composed or written, or says why not."""

from __future__ import annotations

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.pages import FENCE, PAGES, SHELL, RunPage, alike, blocks, indented, what_it_is

SLOW: dict[str, str] = {"howto/flat_fit.md": "each failure is a fit of its own"}
"""Pages that take longer than ten seconds, and why."""
SHORT = ("concepts/checks.md", "howto/notebook.md", "howto/objectives.md")
"""Pages that show how short a thing is."""
LINES = 4
"""What one thing may take there, apart from imports."""
WIDE = 100
"""Letters of a command that a page shows without scrolling."""
COMPARED = {
    "coming_from/pyvene.md": {"pyvene": 9},
    "coming_from/nnsight.md": {"nnsight": 3},
    "coming_from/pyreft.md": {"pyreft": 1},
    "coming_from/transformer_lens.md": {"transformer_lens": 5},
}
"""How often a page compares itrain with each other library."""
READ_ELSEWHERE = ("howto/data.md",)
"""Pages whose files tests/test_data_guide.py reads."""


@pytest.mark.filterwarnings("default")  # which other libraries give
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in PAGES]
)
def test_the_blocks_of_a_page_run(page: str, run_page: RunPage, request: pytest.FixtureRequest) -> None:
    if find_spec("nnsight") and any(block.library == "nnsight" for block in blocks(page)):
        request.getfixturevalue("nnsight")
    ran = run_page(page)
    fences = [line for line in PAGES[page].read_text(encoding="utf-8").splitlines() if FENCE.match(line)]
    assert 2 * sum(ran.done.values()) == len(fences)
    here = [count for library, count in COMPARED.get(page, {}).items() if find_spec(library)]
    assert ran.compared["twins"] == sum(here)


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_forgotten(page: str) -> None:
    forgotten = [f"{block}: '{block.language}'" for block in blocks(page) if what_it_is(block) is None]
    forgotten += [f"{page}:{line}: indented" for line in indented(page)]
    assert not forgotten, f"fence it, write a language, or why it is not run (<!-- not run: reason -->): {forgotten}"


def test_commands_are_no_wider_than_a_page() -> None:
    """A command that goes on ends with a backslash; outputs and the pages of results are as they are."""
    read = [page for page in PAGES if page.startswith(("start.", "gotchas.", "howto/", "coming_from/"))]
    shells = [block for page in read for block in blocks(page) if block.language in SHELL]
    found = {str(block): line for block in shells for line in block.code.splitlines() if len(line) > WIDE}
    assert len(read) > 20 and not found


@pytest.mark.parametrize("page", [page for page in PAGES if page not in READ_ELSEWHERE])
def test_a_file_that_a_page_shows_is_used_there(page: str) -> None:
    found = blocks(page)
    for shown in (block for block in found if what_it_is(block) == "written"):
        file = str(shown.file)
        names = (file.rpartition("/")[2].removesuffix(".py"), file.split("/")[0], f"recipe={Path(file).stem}")
        others = [block for block in found if block.file != file and what_it_is(block) != "shown"]
        assert any(name in block.code for block in others for name in names), f"{shown}: nothing there reads {file}"


@pytest.mark.parametrize("page", SHORT)
def test_what_is_shown_as_short_is_short(page: str) -> None:
    for block in blocks(page):
        if block.language == "python" and block.library is None:
            lines = [line for line in block.code.splitlines() if line.strip() and not re.match(r"(import|from) ", line)]
            assert len(lines) <= LINES, block


def test_what_is_not_run_is_listed() -> None:
    """The list stands in the captured output: pytest -rP -k listed."""
    found = [block for page in PAGES for block in blocks(page)]
    counts = Counter(what_it_is(block) for block in found)
    reasons = [(str(block), str(block.reason)) for block in found if block.reason]
    print(dict(counts), *(f"{where}: {reason}" for where, reason in reasons), sep="\n")
    assert counts["marked"] == len(reasons) and all(len(reason.split()) >= 2 for _, reason in reasons)
    assert counts["run"] + counts["commands"] > counts["marked"]


@pytest.mark.parametrize(
    ("shown", "expected", "same"),
    [
        ("a  0.1234\n", "a 0.1266\n", True),
        ("a 0.1234\n", "a 0.1296\n", False),
        ("a 0.1 0.2\n", "a 0.1\n", False),
        ("one\ntwo\nthree\nfour\n", "one\n...\nfour\n", True),
        ("one\ntwo\nthree\nfour\n", "...\nthree\n...\n", True),
        ("one\ntwo\nthree\nfour\n", "one\n...\nthree\n", False),
        ("one\ntwo\nthree\nfour\n", "two\n...\n", False),
    ],
)
def test_printed_texts_are_compared(shown: str, expected: str, same: bool) -> None:
    assert alike(shown, expected) is same
