"""The pages of tutorials: the notebooks of examples/ with the outputs that they hold. Nothing is run here."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"

_LINKED = re.compile(r"(?<=\| )\[([^]]+)\]\(examples/(\w+)\.md\)")
"""A link to a tutorial that begins a cell of a table."""


def pages() -> dict[str, str]:
    """All tutorials, by their path in docs."""
    return {f"examples/{file.stem}.md": page(file)[0] for file in sorted(EXAMPLES.glob("*.ipynb"))}


def pictures() -> dict[str, bytes]:
    """The pictures in their outputs, by their path in docs."""
    found = (page(file)[1] for file in sorted(EXAMPLES.glob("*.ipynb")))
    return {f"examples/{name}": data for each in found for name, data in each.items()}


def read_notebook(path: Path) -> list[dict[str, Any]]:
    """The cells of an ``.ipynb`` file, with texts in one piece."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        cell["source"] = "".join(cell["source"])
        for output in cell.get("outputs", ()):
            if "text" in output:
                output["text"] = "".join(output["text"])
            output["data"] = {kind: "".join(value) for kind, value in output.get("data", {}).items()}
            if not output["data"]:
                del output["data"]
    return cells


def page(path: Path) -> tuple[str, Mapping[str, bytes]]:
    """A notebook as a Markdown page of the site, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in read_notebook(path):
        if cell["cell_type"] == "markdown":
            parts.append(_links_of_site(cell["source"]))
            continue
        code = f"```python\n{cell['source']}\n```"
        if cell["metadata"].get("jupyter", {}).get("source_hidden"):
            indented = "\n".join(f"    {line}".rstrip() for line in code.splitlines())
            code = f'??? note "The asserts that hold this page to its word"\n\n{indented}'
        parts.append(code)
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![{cell['metadata'].get('alt', 'What the code above draws')}]({name})")
            elif "text/html" in data:
                parts.append(f'<div class="output" markdown="0">{data["text/html"]}</div>')
            else:
                parts.append(f"```text\n{output.get('text', data.get('text/plain', '')).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def with_thumbnails(index: str) -> str:
    """The index of tutorials, with the largest picture of each notebook in its row, a part of the link to it."""
    return _LINKED.sub(_thumbnail, index)


def _thumbnail(link: re.Match[str]) -> str:
    question, stem = link.groups()
    pictures = page(EXAMPLES / f"{stem}.ipynb")[1]
    largest = max(pictures, key=lambda name: len(pictures[name]))
    return f"[![](examples/{largest}){{ .thumbnail }} {question}](examples/{stem}.md)"


def _links_of_site(text: str) -> str:
    """Links to documentation and to other tutorials, from where the site has them."""
    return re.sub(r"\]\((\w+)\.ipynb", r"](\1.md", text.replace("](../docs/", "](../"))
