"""The plots of a page as SVG: where values lie in the drawing."""

from __future__ import annotations

from dataclasses import dataclass

from itrain.results.curves import Line, Plot

LEFT, RIGHT, TOP, BOTTOM = 40, 330, 10, 150
"""Where the axes lie."""


@dataclass(frozen=True)
class Drawing:
    """A plot in the coordinates of its drawing."""

    plot: Plot

    def across(self, x: float) -> float:
        """The place of a value, from the left."""
        first, last = self.plot.ends
        return round(LEFT + (RIGHT - LEFT) * (x - first) / (last - first), 1)

    def down(self, y: float) -> float:
        """The place of a value, from above."""
        return round(BOTTOM - (BOTTOM - TOP) * min(max(y / self.plot.top, 0), 1), 1)

    def path(self, line: Line) -> str:
        """The points of a line."""
        return " ".join(f"{self.across(point.x):g},{self.down(point.y):g}" for point in line.points)
