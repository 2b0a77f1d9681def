"""The sentences of a page, without its code, tables and addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator

LEFT_OUT = re.compile(
    r"\A---\n.*?^---\n|^[ \t]*(?P<fence>`{3,}|~{3,}).*?^[ \t]*(?P=fence)[ \t]*$|<!--.*?-->|<[^>\n]+>"
    r"|^[ \t]*(?::::|\|)[^\n]*$",
    re.MULTILINE | re.DOTALL,
)
"""Front matter, fenced code, comments, tags, documented objects and rows of tables."""
IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)(\{[^}]*\})?")
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\](?:\([^)]*\)|\[[^\]]*\])")
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
BEGINS = re.compile(r"^\s*(?:[-*+] |\d+[.)] |#+ |> |(?:!!!|\?\?\?\+?|===) .*$|\[\^\w+\]: |: )")
"""What begins a text of its own: an item, a heading, a quotation, a note, a tab, a footnote, a definition."""
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|et al|vs|cf|etc|Fig|Sec|Eq|approx|incl|resp|No|pp|Dr|St|[A-Z])\.$")
CONTINUES = re.compile(r"(?!itrain\b)[a-z]")
END = re.compile(r"[.!?]+[\"')\]*_]*(?=\s|$)")


def sentences(page: str) -> Iterator[str]:
    """The sentences of a page's prose; a piece of code and an address are one word each."""
    for text in _texts(LEFT_OUT.sub("", page)):
        start = 0
        for end in END.finditer(text):
            after = text[end.end() :].lstrip()
            if ABBREVIATION.search(text[: end.start() + 1]) or CONTINUES.match(after):
                continue
            yield text[start : end.end()].strip()
            start = end.end()
        if text[start:].strip():
            yield text[start:].strip()


def words(sentence: str) -> int:
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def _texts(page: str) -> Iterator[str]:
    """Paragraphs, items and headings, each on one line and without its marks."""
    page = LINK.sub(r"\1", IMAGE.sub("", CODE.sub("Code", page)))
    gathered: list[str] = []
    for line in [*page.splitlines(), ""]:
        begins = BEGINS.match(line)
        if (begins or not line.strip()) and gathered:
            yield re.sub(r"\s+", " ", re.sub(r"\*\*|__|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)", "", " ".join(gathered)))
            gathered = []
        rest = line[begins.end() :] if begins else line
        gathered += [rest] if rest.strip() else []
