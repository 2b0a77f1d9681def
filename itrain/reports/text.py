"""Text as it stands, medium by medium: names of folders, tasks, tokens and classes hold whatever their writers chose.

Pages need no helper: their template escapes all that it is given.
"""

from __future__ import annotations

from rich.text import Text

from itrain.trust import printable


def plain(text: str, style: str = "") -> Text:
    """Text for the screen: without markup, emoji codes, and characters that a terminal acts on."""
    return Text("\n".join(map(printable, text.split("\n"))), style=style)


def drawn(text: str) -> str:
    """Text for a picture: without formulas, which matplotlib sees between dollars, and with lines of its own alone."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")


def listed(text: str) -> str:
    """The same in the list of a picture's lines, which leaves out names that begin with an underscore."""
    return f" {drawn(text)}" if text.startswith("_") else drawn(text)
