"""The colours of pictures: of heat maps, of lines and of bars, apart for colour-blind readers and in grey print."""

from __future__ import annotations

from functools import cache

SCALE = "cividis"
"""The colour scale of heat maps."""
DIFFERENCES = "PuOr"
"""That of differences, with white at 0."""
BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#999999"
"""Of bars (Okabe and Ito)."""
SOFT = "#555555"
"""Of captions."""
LINES = (BLUE, "#d55e00", "#009e73", "#cc79a7")
DASHES = ("none", "6 3", "2 2", "8 3 2 3")
"""So that lines stay apart in grey print, as SVG writes them."""


def stroke_of(number: int) -> tuple[str, str]:
    """Colour and dash of a line: 16 pairs that are all different, again and again."""
    return LINES[number % 4], DASHES[(number + number // 4) % 4]


@cache
def colour_of(share: float, scale: str = SCALE) -> tuple[str, str]:
    """The colour at a share of a scale, and that of text on it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    rgb = colormaps[scale](share)[:3]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # From here on black stands out more than white (WCAG 2).
    return to_hex(rgb), "#000" if luminance > 0.179 else "#fff"
