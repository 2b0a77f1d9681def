"""What a summary of a run is made of: tables, bars, and the kinds of runs that have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from itrain.results.curves import Plot
from itrain.results.intervals import Ends

if TYPE_CHECKING:
    import pandas

Results = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows by name, below heads of two lines, of which the upper may be empty."""

    title: str
    heads: Sequence[tuple[str, str]]
    rows: Mapping[str, Sequence[str]]
    name: str = "results"
    """The short name that it has in trackers, the same for all runs."""
    note: str = ""
    """How to read it."""
    corner: str = ""
    """The head of the rows' names on screen."""

    @property
    def columns(self) -> list[str]:
        """The heads in one line each, the rows' names first."""
        uppers = list(accumulate((upper for upper, _ in self.heads), lambda before, upper: upper or before))
        return ["", *(f"{upper} {lower}".strip() for upper, (_, lower) in zip(uppers, self.heads, strict=True))]

    @property
    def lines(self) -> list[list[str]]:
        """The rows, each with its name first."""
        return [[name, *cells] for name, cells in self.rows.items()]

    def frame(self) -> pandas.DataFrame:
        """The same as a data frame."""
        import pandas

        return pandas.DataFrame(self.lines, columns=pandas.Index(self.columns))


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Groups of bars, the first group at the bottom."""

    axis: str
    names: Sequence[str]
    series: Mapping[str, Sequence[float]]
    """A bar of each group, by what the bars show."""
    marks: Sequence[float] = ()
    """A value to compare with in each group."""
    mark: str = "most frequent class"
    """What that value is."""
    intervals: Mapping[str, Sequence[Ends | None]] = field(default_factory=dict)
    """The 95% interval of each bar over pairs or examples, by what the bars show."""
    note: str = ""
    """What the figure is."""
    shares: bool = True
    """Whether all values are shares, which lie between -1 and 1."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of run, known by the figures that it has."""

    fits: Callable[[Results], bool]
    known: frozenset[str]
    """The figures that its table has room for, or leaves out."""
    table: Callable[[Results], Table]
    bars: Callable[[Results], Bars]
    plots: Callable[[Results], Sequence[Plot]] = lambda results: ()
    """Lines that are drawn in place of the bars, where there are some."""

    def shows(self, key: str) -> bool:
        """Whether a figure is one of its own; the others are shown beside its table."""
        return not self.known.isdisjoint(key.split("/"))
