"""Draws the rooms of the package from the plan in tests/test_house.py, to docs/assets/house.svg."""

from __future__ import annotations

import ast
from pathlib import Path

HOME = Path(__file__).parents[1]
WIDTH, MARGIN, LINE, LETTER = 660, 14, 34, 7.4
STYLE = """
  .card { fill: #ffffff; stroke: #c8ccd2; }
  .storey { fill: #f4f6f9; stroke: #d5dae1; }
  .room { fill: #d9e6f5; stroke: #7a9cc6; }
  text { fill: #20242b; }
"""


def storeys() -> list[list[str]]:
    """The rooms of each storey, from the ground up, without the package's name."""
    plan = ast.parse((HOME / "tests" / "test_house.py").read_text(encoding="utf-8"))
    rooms = next(
        node.value
        for node in plan.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "ROOMS"
    )
    return [sorted(room.removeprefix("itrain.") for room in each) for each in ast.literal_eval(rooms)]


def lines(rooms: list[str]) -> list[list[tuple[float, float, str]]]:
    """Where each room of a storey stands: left edge, width and name, in as many lines as it takes."""
    found: list[list[tuple[float, float, str]]] = [[]]
    left = 2.0 * MARGIN
    for room in rooms:
        width = LETTER * len(room) + 18
        if left + width > WIDTH - 2 * MARGIN:
            found.append([])
            left = 2.0 * MARGIN
        found[-1].append((left, width, room))
        left += width + 8
    return found


def drawing() -> str:
    """The house as an SVG, the ground at the bottom."""
    parts, top = [], float(MARGIN)
    for rooms in reversed(storeys()):
        placed = lines(rooms)
        height = LINE * len(placed) + 6
        parts.append(
            f'<rect class="storey" x="{MARGIN}" y="{top:g}" width="{WIDTH - 2 * MARGIN}" height="{height}" rx="5"/>'
        )
        for number, line in enumerate(placed):
            y = top + 6 + LINE * number
            for left, width, room in line:
                parts.append(f'<rect class="room" x="{left:g}" y="{y:g}" width="{width:g}" height="28" rx="4"/>')
                parts.append(f'<text x="{left + width / 2:g}" y="{y + 19:g}" text-anchor="middle">{room}</text>')
        top += height + 5
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + MARGIN:g}" role="img" '
        'aria-labelledby="title" font-family="monospace" font-size="13">\n'
        f'<title id="title">The rooms of the package, from the ground up</title>\n<style>{STYLE}</style>\n'
        f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{top + MARGIN - 2:g}" rx="8"/>'
    )
    return "\n".join([head, *parts, "</svg>", ""])


if __name__ == "__main__":
    (HOME / "docs" / "assets" / "house.svg").write_text(drawing(), encoding="utf-8")
