"""What a summary of a run is made of: tables, bars, the kinds of runs that have them, and what kinds draw alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from itrain.results.columns import DATA, EXAMPLES, TEST, is_known, spoken
from itrain.results.curves import Plot
from itrain.results.intervals import Ends, of_run

if TYPE_CHECKING:
    import pandas

INTERVALS = "95% intervals"
"""The second line of an axis whose bars have them."""

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


def at_place(results: Results, place: str) -> dict[str, float]:
    """The figures of a place, by their names there, and those of the data."""
    return {
        key.removeprefix(f"{place}/"): value for key, value in results.items() if key.startswith((f"{place}/", DATA))
    }


def count(figures: Mapping[str, float]) -> str:
    """The number of examples, followed by a space, where it is known."""
    return f"{figures[EXAMPLES]:.0f} " if EXAMPLES in figures else ""


def decimals(value: float | None) -> str:
    """A share as a cell; an empty one where there is none."""
    return "" if value is None else f"{value:.3f}"


def plain_table(figures: Results, *, title: str, name: str = "results", note: str = "") -> Table:
    """A row for each figure."""
    rows = {
        spoken(key.removeprefix(f"{TEST}/")): [decimals(value) if is_known(key) else f"{value:.5g}"]
        for key, value in figures.items()
    }
    return Table(title=title, heads=[("", "value")], rows=rows, name=name, note=note)


def bars_of_places(figure: str, places: Mapping[str, str], axis: str) -> Callable[[Results], Bars]:
    """Draws one figure at several places, with what the axis says."""

    def bars(results: Results) -> Bars:
        found = {name: at_place(results, place) for name, place in places.items() if f"{place}/{figure}" in results}
        intervals = [of_run(figures, figure) for figures in found.values()]
        return Bars(
            axis=f"{axis}, {count(at_place(results, TEST))}held-out examples\n{INTERVALS}" if any(intervals) else axis,
            names=list(found),
            series={figure: [figures[figure] for figures in found.values()]},
            intervals={figure: intervals},
        )

    return bars
