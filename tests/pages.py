"""The code on the pages of docs/ and in the README: what each block is, and how a test runs it.

No library of such tests is used: comparing numbers with a tolerance, composing commands, writing files and counting
what is left out would each be a parser or an evaluator of our own, and finding the fences is the least of it.
"""

from __future__ import annotations

import contextlib
import importlib
import linecache
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scripts.notebooks import run_code

HOME = Path(__file__).parents[1]
DOCS = HOME / "docs"
PAGES = {"README.md": HOME / "README.md"} | {
    path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))
}
FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<info>.*)$")
HOLDS_INDENTED = re.compile(r"[-*+] |\d+\. |!!!|\?\?\?|===|:::|\[\^|: ")
"""What is followed by indented words: lists, notes, tabs, documented objects, footnotes, definitions."""
REASON = re.compile(r"<!-- not run: (.+?) -->")
TITLE = re.compile(r'\btitle="([^"]+)"')
FILE_NAME = re.compile(r"# ([\w./-]+\.\w+)\n")
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
CLOSE = 5e-3
SHELL = ("sh", "bash")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block, what its fence says, and what stands right below it."""

    page: str
    line: int
    language: str
    library: str | None
    """The library whose code it is, if that is not itrain."""
    file: str | None
    """The name of the file that it shows."""
    reason: str | None
    """Why it is not run."""
    code: str
    shown: str | None = None
    """The text block that follows without an empty line: what it prints."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    ends: list[int] = []
    lines = PAGES[page].read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        if (fence := FENCE.match(lines[number])) is None:
            number += 1
            continue
        end = number + 1
        while lines[end].strip() != fence["fence"]:
            end += 1
        above = lines[number - 1] if number else ""
        found.append(_block(page, number + 1, fence, above, lines[number + 1 : end]))
        ends.append(end)
        number = end + 1
    below = {block.line: block.code for block in found if block.language == "text"}
    return [_with(block, below.get(end + 2)) for block, end in zip(found, ends, strict=True)]


def indented(page: str) -> list[int]:
    """The lines where blocks without a fence begin, which nothing can run."""
    found, above, empty, fenced = [], "", True, False
    for number, line in enumerate(PAGES[page].read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= FENCE.match(line) is not None
        if empty and line.startswith("    ") and not fenced and not HOLDS_INDENTED.match(above):
            found.append(number)
        empty = not line.strip()
        above = line if line[:1].strip() else above
    return found


def _block(page: str, line: int, fence: re.Match[str], above: str, body: list[str]) -> Block:
    language, *more = fence["info"].split() or [""]
    code = "".join(each.removeprefix(fence["indent"]) + "\n" for each in body)
    named = TITLE.search(fence["info"]) or (language not in SHELL and FILE_NAME.match(code))
    reason = REASON.search(above)
    return Block(
        page=page,
        line=line,
        language=language,
        library=more[0] if more and more[0].isidentifier() else None,
        file=named[1] if named else None,
        reason=reason[1] if reason else None,
        code=code,
    )


def _with(block: Block, shown: str | None) -> Block:
    return Block(**{**vars(block), "shown": shown})


def run(code: str, space: dict[str, Any]) -> str:
    """What a block prints, or its last expression as a notebook shows it if it has a value."""
    printed, value = run_code(code, f"<block {len(linecache.cache)}>", space)
    return printed if value is None else f"{value!r}\n"


def alike(shown: str, expected: str) -> bool:
    """Whether texts are the same: numbers but for rounding, columns but for their widths; a line `...` is any lines."""
    if re.search(r"^ *\.\.\.$", expected, re.MULTILINE):
        return _matches(shown, expected)
    texts = [re.sub(r"\s+", " ", NUMBER.sub("#", text)).strip() for text in (shown, expected)]
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (shown, expected)]
    return texts[0] == texts[1] and all(abs(a - b) < CLOSE for a, b in zip(*numbers, strict=True))


def _matches(shown: str, expected: str) -> bool:
    """Whether the parts between the lines ... follow each other in what is shown, the last at its end."""
    parts = [part.splitlines() for part in re.split(r"^ *\.\.\.\n", expected, flags=re.MULTILINE)]
    lines, at = shown.splitlines(), 0
    for index, part in enumerate(parts):
        starts = range(at, len(lines) - len(part) + 1)
        wanted = starts[:1] if index == 0 else starts[-1:] if index == len(parts) - 1 else starts
        found = [start for start in wanted if alike("\n".join(lines[start : start + len(part)]), "\n".join(part))]
        if not found:
            return False
        at = found[0] + len(part)
    return True


@dataclass(kw_only=True)
class Ran:
    """A page whose blocks ran: the names they defined, and what became of each block."""

    folder: Path
    space: dict[str, Any] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)


class RunPage:
    """Runs pages, each once, in a folder of its own."""

    def __init__(self, folder: Path, commands: Callable[[str], str | None]) -> None:
        self.folder = folder
        self.commands = commands
        self.pages: dict[str, Ran] = {}

    def __call__(self, page: str) -> Ran:
        """Run, compose or write each block of a page, except what is marked or of a library that is not installed.

        Raises:
            AssertionError: nothing runs a block and no reason stands above it, or it prints something else.
        """
        if page not in self.pages:
            folder = self.folder / page.removesuffix(".md").replace("/", "_")
            folder.mkdir(exist_ok=True)  # A page that failed is run again by the next test that asks for it.
            ran = Ran(folder=folder)
            found = blocks(page)
            with _standing_in(folder), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                for block in reversed(found):  # A command may stand above the file that it reads.
                    _write(block, folder)
                for block in found:
                    ran.done[self._do(block, ran)] += 1
            self.pages[page] = ran
        return self.pages[page]

    def _do(self, block: Block, ran: Ran) -> str:
        """Do what a block asks for; what became of it."""
        kind = what_it_is(block)
        assert kind, f"{block}: nothing runs a block '{block.language}'; say why above it: <!-- not run: reason -->"
        if kind == "written":
            _write(block, ran.folder)
        elif kind == "library" and not _is_installed(block.library or ""):
            return f"{block.library} is not installed"
        elif kind in ("run", "library"):
            _compare(block, run(block.code, ran.space), ran)
            _twins(block, ran)
            ran.space.pop("ours", None)
        elif kind == "commands":
            said = [self.commands(line) for line in lines_of(block)]
            if None not in said:
                _compare(block, "".join(map(str, said)), ran)
        return kind


def what_it_is(block: Block) -> str | None:
    """What becomes of a block; None if that is nothing and it does not say why."""
    if block.reason:
        return "marked"
    if block.file:
        return "written"
    if block.language == "python":
        return "library" if block.library else "run"
    return {"text": "shown"}.get(block.language, "commands" if block.language in SHELL else None)


def lines_of(block: Block) -> list[str]:
    """The commands of a block without comments, a continued line as one."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def _write(block: Block, folder: Path) -> None:
    if what_it_is(block) == "written":
        path = folder / (block.file or "")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.code, encoding="utf-8")


def _compare(block: Block, printed: str, ran: Ran) -> None:
    if block.shown is not None:
        assert alike(printed, block.shown), f"{block}:\n{block.code}prints\n{printed}"
        ran.compared["shown"] += 1


def _twins(block: Block, ran: Ran) -> None:
    """Compare what another library gave as `theirs` with what itrain gave as `ours` right after it."""
    if {"ours", "theirs"} <= ran.space.keys():
        ours, theirs = ran.space.pop("ours"), ran.space.pop("theirs")
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda said: f"{block}: {said}")
        ran.compared["twins"] += 1


def _is_installed(library: str) -> bool:
    try:
        importlib.import_module(library)
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def _standing_in(folder: Path) -> Iterator[None]:
    """Run in a folder whose modules can be imported, and forget them afterwards."""
    before, known = os.getcwd(), set(sys.modules)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = [each for each in sys.path if each != str(folder)]
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
