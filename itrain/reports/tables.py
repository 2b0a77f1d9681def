"""Tables on the screen, at any width: columns without room continue below, and no cell is cut."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from textwrap import wrap

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from itrain.reports.text import plain
from itrain.results.parts import Table
from itrain.trust import printable

BETWEEN, APART = 2, 3
"""Blanks between columns, and between columns under different heads."""


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A column as lines of text; ``cells`` has a list of lines for each row."""

    head: Sequence[str]
    cells: Sequence[Sequence[str]]
    is_left: bool

    @property
    def width(self) -> int:
        return max((cell_len(line) for lines in (self.head, *self.cells) for line in lines), default=0)

    def padded(self, line: str, width: int) -> str:
        blanks = " " * max(width - cell_len(line), 0)
        return line + blanks if self.is_left else blanks + line


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Columns under one head, which stay together."""

    head: str
    columns: Sequence[_Column]

    @property
    def widths(self) -> list[int]:
        first, *others = [column.width for column in self.columns]
        spare = cell_len(self.head) - (first + sum(others) + BETWEEN * len(others))
        return [first + max(spare, 0), *others]

    @property
    def width(self) -> int:
        return sum(self.widths) + BETWEEN * (len(self.columns) - 1)


def print_table(console: Console, table: Table, *, left: Collection[str] = ()) -> None:
    """Print a table, its title above and how to read it below.

    Args:
        console: of the screen; a table wider than it continues below, with the rows' names again.
        table: what is printed.
        left: the heads of columns of text, which begin at their left side. Numbers end at their right side.
    """
    names = _Group(head="", columns=[_column(table.corner, list(table.rows), is_left=True)])
    console.print(plain(table.title, "bold"), soft_wrap=True)
    for part in _parts(_groups(table, left), console.width - names.width):
        console.print()
        for line in _lines([names, *part]):
            console.print(line, soft_wrap=True)
    if table.note:
        console.print()
        print_note(console, table.note)
    console.print()


def print_note(console: Console, note: str) -> None:
    """Print how a table is to be read, where somebody may be reading it."""
    console.print(plain(f"How to read: {note}", "dim"))


def _column(head: str, cells: Sequence[str], *, is_left: bool) -> _Column:
    lines = [[printable(line) for line in cell.split("\n")] for cell in cells]
    room = max((cell_len(line) for each in lines for line in each), default=0)
    words = printable(head).split()
    longest = max([room, 1, *map(len, words)])
    return _Column(head=wrap(" ".join(words), longest), cells=lines, is_left=is_left)


def _groups(table: Table, left: Collection[str]) -> list[_Group]:
    found: list[tuple[str, list[_Column]]] = []
    for place, (upper, lower) in enumerate(table.heads):
        column = _column(lower, [cells[place] for cells in table.rows.values()], is_left=lower in left)
        if found and found[-1][0] and not upper:
            found[-1][1].append(column)
        else:
            found.append((printable(upper), [column]))
    return [_Group(head=head, columns=columns) for head, columns in found]


def _parts(groups: Sequence[_Group], room: int) -> list[list[_Group]]:
    """The groups that stand beside each other in ``room`` columns, at least one."""
    parts: list[list[_Group]] = []
    for piece in (piece for group in groups for piece in _pieces(group, room)):
        if parts and sum(each.width + APART for each in (*parts[-1], piece)) <= room:
            parts[-1].append(piece)
        else:
            parts.append([piece])
    return parts


def _pieces(group: _Group, room: int) -> list[_Group]:
    """A group that is wider than ``room`` as several, each below the head."""
    pieces: list[_Group] = []
    for column in group.columns:
        wider = _Group(head=group.head, columns=[*(pieces[-1].columns if pieces else ()), column])
        if pieces and wider.width + APART <= room:
            pieces[-1] = wider
        else:
            pieces.append(_Group(head=group.head, columns=[column]))
    return pieces


def _lines(groups: Sequence[_Group]) -> list[Text]:
    columns = [(column, width) for group in groups for column, width in zip(group.columns, group.widths, strict=True)]
    apart = APART if any(group.head for group in groups) else BETWEEN
    gaps = [*[blanks for group in groups for blanks in [apart] + [BETWEEN] * (len(group.columns) - 1)][1:], 0]

    def line(texts: Sequence[str], style: str = "") -> Text:
        cells = [column.padded(text, width) for (column, width), text in zip(columns, texts, strict=True)]
        return plain("".join(cell + " " * gap for cell, gap in zip(cells, gaps, strict=True)).rstrip(), style)

    high = max(len(column.head) for column, _ in columns)
    heads = [[""] * (high - len(column.head)) + list(column.head) for column, _ in columns]
    found = [line([head[number] for head in heads], "bold") for number in range(high)]
    if any(group.head for group in groups):
        found.insert(0, plain((" " * APART).join(group.head.center(group.width) for group in groups).rstrip(), "bold"))
    found.append(plain("─" * (sum(width for _, width in columns) + sum(gaps)), "dim"))
    for cells in zip(*(column.cells for column, _ in columns), strict=True):
        found += [line(texts) for texts in zip_longest(*cells, fillvalue="")]
    return found
