"""The words that users read: sentences that are short, and none of the wordings that once had to be read twice."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages import HOME, PAGES
from tests.prose import sentences, words

LONGEST = 30
README_LINES = 150
FIRST = ("README.md", "index.md", "start.md", "tutorials.md", "concepts/", "howto/")
"""The pages that everybody reads: the README, and Home, Start, Tutorials, Concepts and How-to of the documentation."""
OLD = {
    r"counts in that over": "say what it is the weight of",
    r"\bare kept, the budget is\b|\bthe budget is\b": "cache 6.5 MiB (limit 4.0 GiB)",
    r"\b(inputs?|of what is) drawn right\b": "base model accuracy on sampled test inputs: 1.000",
    r"\bwhat the [\w' ]+ is of\b": "name what it belongs to",
    r"\bthat is what an? \w+ (does|is)\b": "say what it does",
    r"\bthan these from each other\b": "than natural ones are from each other",
    r"\bwhich one of another \w+ is\b": "say which",
    r"\bis of no (job|run|use here)\b": "belongs to no",
    r"\bits training's figures were\b": "figures of its training",
    r"\bsimply\b|\bseamless(ly)?\b|\bpowerful\b|\bblazing": "leave it out",
}
"""What is not to be written, and what to write instead."""


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith(FIRST)])
def test_sentences_are_short(page: str) -> None:
    long = [each for each in sentences(PAGES[page].read_text(encoding="utf-8")) if words(each) > LONGEST]
    assert not long, f"{page} has sentences of more than {LONGEST} words:\n" + "\n".join(long)


def test_the_readme_is_a_page() -> None:
    lines = PAGES["README.md"].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES, f"README.md has {len(lines)} lines, more than {README_LINES}"


@pytest.mark.parametrize("page", PAGES)
def test_no_old_wording_is_on_a_page(page: str) -> None:
    found = _old(" ".join(sentences(PAGES[page].read_text(encoding="utf-8"))))
    assert not found, f"{page}: {found}"


def test_no_old_wording_is_in_what_the_program_says() -> None:
    files = sorted((HOME / "itrain").rglob("*.py"))
    said = [(path, line, text) for path in files for line, text in _strings(path)]
    assert len(said) > 2000
    found = [f"{path.relative_to(HOME)}:{line}: {old}" for path, line, text in said for old in _old(text)]
    assert not found, "\n".join(found)


def _old(text: str) -> list[str]:
    found = [(match[0], better) for old, better in OLD.items() for match in re.finditer(old, text)]
    return [f"'{old}'; better: {better}" for old, better in found]


def _strings(path: Path) -> Iterator[tuple[int, str]]:
    """What a file may print: its texts, without docstrings; of an f-string, its parts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.lineno, re.sub(r"\s+", " ", node.value)


TEXT = """\
---
title: A page
---
# A heading

One sentence, of `code with. several words` and of [a link. or two](https://x.y/z.html). Another, e.g. this one! Is it
the 3rd of 0.98 points? Geiger et al. say so.

| a | table. With words. |
|---|---|

```python
print("not. A sentence")
```
- an item of a list
- **another** one, which
  goes on. And a second sentence

<!-- not run: a reason. -->
![a picture. With words](a.png)
"""


def test_sentences_are_told_apart() -> None:
    assert list(sentences(TEXT)) == [
        "A heading",
        "One sentence, of Code and of a link. or two.",
        "Another, e.g. this one!",
        "Is it the 3rd of 0.98 points?",
        "Geiger et al. say so.",
        "an item of a list",
        "another one, which goes on.",
        "And a second sentence",
    ]
    assert words("One - two, 0.98 (three).") == 4
    assert _old("6.5 MiB are kept, the budget is 4.0 GiB") and not _old("cache 6.5 MiB (limit 4.0 GiB)")
