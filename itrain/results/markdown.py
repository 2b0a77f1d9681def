"""Tables as Markdown, for cards, trackers and pages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def markdown(columns: Sequence[object], lines: Iterable[Iterable[object]], *, numbers: bool = False) -> str:
    """A table whose cells are Markdown; what separates cells is escaped in them where it is not yet.

    Args:
        columns: the heads.
        lines: the rows, a cell for each column.
        numbers: whether all columns but the first hold numbers, which are set to the right.
    """
    rule = ["---", *["---:" if numbers else "---"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in (columns, rule, *lines))


def _cell(content: object) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", str(content))
