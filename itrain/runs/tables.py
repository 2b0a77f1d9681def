"""Small tables that print well, as text and in Jupyter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from itrain.trust import printable


@dataclass(frozen=True)
class Table:
    """Lines of text above rows of cells.

    Args:
        lines: what stands above the rows.
        heads: the columns' names.
        rows: the cells; numbers are written with three digits.
    """

    lines: Sequence[str]
    heads: Sequence[str]
    rows: Sequence[Sequence[str | float]]

    def __repr__(self) -> str:
        rows = [list(self.heads), *([_cell(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        drawn = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*map(printable, self.lines), *(f"  {row.rstrip()}" for row in drawn)])

    def _repr_html_(self) -> str:
        lines = "".join(f"<div>{escape(printable(line).strip())}</div>" for line in self.lines)
        heads = "".join(f"<th style='text-align:left'>{escape(head)}</th>" for head in self.heads)
        rows = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{escape(_cell(cell))}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"{lines}<table><tr>{heads}</tr>{rows}</table>"


class Tables(list[Table]):
    """Tables one below the other."""

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self))

    def _repr_html_(self) -> str:
        return "<br>".join(each._repr_html_() for each in self)


def _cell(value: str | float) -> str:
    return printable(value) if isinstance(value, str) else f"{value:.3f}"
