"""The pages of tutorials: notebooks of examples/ with the outputs that they hold. Nothing is run here."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "examples"
_FENCE = "````"
_CODES = re.compile(r"\x1b\[[0-9;]*m")
"""The colours of a terminal."""


def pages() -> dict[str, str]:
    """All tutorials, by their path in docs."""
    return {f"examples/{file.stem}.md": _page(file) for file in sorted(FOLDER.glob("*.ipynb"))}


def pictures() -> dict[str, bytes]:
    """The pictures in their outputs, by their path in docs."""
    found = {}
    for file in sorted(FOLDER.glob("*.ipynb")):
        for number, data in enumerate(_pictures_of(_cells(file)), 1):
            found[_picture(file, number)] = data
    return found


def _cells(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8"))["cells"]


def _page(file: Path) -> str:
    lines: list[str] = []
    number = 0
    for cell in _cells(file):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # The page lies in the site's examples/, beside what docs/ holds.
            lines.append(source.replace("](../docs/", "](../") + "\n")
            continue
        if cell["cell_type"] != "code" or not source.strip():
            continue
        lines.append(f"{_FENCE}python\n{source}\n{_FENCE}\n")
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                number += 1
                lines.append(f"![What the cell above draws](../{_picture(file, number)}){{ .chart loading=lazy }}\n")
            else:
                lines += _shown(output)
    return "\n".join(lines)


def _picture(file: Path, number: int) -> str:
    return f"assets/examples/{file.stem}-{number}.png"


def _pictures_of(cells: list[dict[str, Any]]) -> Iterator[bytes]:
    for output in (each for cell in cells for each in cell.get("outputs", ())):
        if "image/png" in output.get("data", {}):
            yield base64.b64decode("".join(output["data"]["image/png"]))


def _shown(output: Mapping[str, Any]) -> Iterator[str]:
    """What an output shows, as HTML or as text; what a library says on the error stream is left out."""
    data = output.get("data", {})
    if "text/html" in data:
        yield f'<div class="output">\n{"".join(data["text/html"]).strip()}\n</div>\n'
    elif text := "".join(data.get("text/plain", output.get("text", ()))).strip("\n"):
        if output.get("name") != "stderr":
            yield f"{_FENCE}text\n{_CODES.sub('', text)}\n{_FENCE}\n"
