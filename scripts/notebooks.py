"""Runs the tutorials of ``examples/`` and writes each as a notebook with its outputs.

python scripts/notebooks.py                           # all of them
python scripts/notebooks.py examples/01_gender.py     # one

A tutorial is a Python file in the percent format: ``# %%`` begins a cell of code, ``# %% [markdown]`` one of prose,
whose lines are comments. The file is what people edit and compare; the notebook beside it is what they read.

Cells run in this process, in an empty folder. What they print or end in is kept as Jupyter would show it; what
libraries write to stderr is not kept.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import linecache
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
CELL = re.compile(r"^# %%(?P<prose> \[markdown\])?(?: +tags=(?P<tags>\[.*\]))?\n", re.MULTILINE)
CLAIMS = "claims"
"""The tag of the cell that asserts what the notebook says."""
WIDEST, COLOURS = 1400, 96
"""Pixels and colours of a picture in a notebook."""
PROGRESS = re.compile(r"^.*━.*\n(?:[ \d:•]+\n)*", re.MULTILINE)
TIMES = re.compile(r"\d{4}-\d{2}-\d{2}[_T]\d{2}-\d{2}-\d{2}[^\s/<'\"]*")

Cell = dict[str, Any]
Notebook = dict[str, Any]


def read_source(path: Path) -> list[Cell]:
    """The cells of a percent file, as a notebook holds them, without outputs.

    Raises:
        ValueError: something stands before the first cell.
    """
    text = path.read_text(encoding="utf-8")
    marks = list(CELL.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise ValueError(f"'{path}': begin it with '# %% [markdown]'")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        _cell(number, mark, text[mark.end() : end]) for number, (mark, end) in enumerate(zip(marks, ends, strict=True))
    ]


def _cell(number: int, mark: re.Match[str], body: str) -> Cell:
    prose = mark["prose"] is not None
    lines = [re.sub(r"^# ?", "", line) for line in body.splitlines()] if prose else body.splitlines()
    metadata: dict[str, Any] = {"tags": json.loads(mark["tags"])} if mark["tags"] else {}
    if CLAIMS in metadata.get("tags", ()):
        metadata["jupyter"] = {"source_hidden": True}
    cell: Cell = {"id": f"cell-{number}", "metadata": metadata, "source": "\n".join(lines).strip()}
    return (
        {"cell_type": "markdown", **cell}
        if prose
        else {"cell_type": "code", **cell, "outputs": [], "execution_count": None}
    )


def run(cells: Sequence[Cell], name: str) -> list[Cell]:
    """The cells with their outputs, run in order in an empty folder that is removed afterwards."""
    space: dict[str, Any] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        here, done = os.getcwd(), []
        for cell in cells:
            if cell["cell_type"] == "code":
                count = 1 + sum(each["cell_type"] == "code" for each in done)
                outputs = _run_cell(cell["source"], f"<{name}, cell {count}>", space, count)
                cell = {**cell, "execution_count": count, "outputs": [_settled(each, here) for each in outputs]}
            done.append(cell)
    return done


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_code(code: str, name: str, space: dict[str, Any]) -> tuple[str, Any]:
    """What a cell prints, and the value that it ends in; None where there is none, or a semicolon hides it."""
    *body, last = ast.parse(code).body
    if not isinstance(last, ast.Expr) or code.rstrip().endswith(";"):
        body, last = [*body, last], None
    # Libraries that look at the source of their caller find it here.
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), name, "exec"), space)
        value = None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), space)
    return printed.getvalue(), value


def _run_cell(code: str, name: str, space: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What a cell prints, shows, draws and ends in."""
    shown: list[dict[str, Any]] = []
    space["display"] = lambda *values: shown.extend({"output_type": "display_data", **_bundle(each)} for each in values)
    printed, value = run_code(code, name, space)
    if printed:
        shown.insert(0, {"output_type": "stream", "name": "stdout", "text": printed})
    if value is not None:
        shown.append({"output_type": "execute_result", "execution_count": count, **_bundle(value)})
    return [*shown, *_drawn()]


def _bundle(value: Any) -> dict[str, Any]:
    """A value in the forms that a notebook shows, the richest of which is taken."""
    data, metadata = {"text/plain": repr(value)}, {}
    if (html := getattr(value, "_repr_html_", None)) is not None and (text := html()) is not None:
        data["text/html"] = text
    if (png := getattr(value, "_repr_png_", None)) is not None:
        data["image/png"] = _small(png())
    return {"data": data, "metadata": metadata}


def _small(png: bytes) -> str:
    """A picture for a notebook: at most as wide as a page, and of few colours."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _drawn() -> list[dict[str, Any]]:
    """The figures that pyplot holds, which a notebook shows below the cell that made them."""
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is None:
        return []
    found = []
    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, format="png", dpi=80, bbox_inches="tight")
        data = {"text/plain": "<Figure>", "image/png": _small(file.getvalue())}
        found.append({"output_type": "display_data", "data": data, "metadata": {}})
    pyplot.close("all")
    return found


def _settled(output: dict[str, Any], here: str) -> dict[str, Any]:
    """An output without progress bars, and without the folder and the time it was made in."""

    def settle(text: str) -> str:
        return TIMES.sub("<time>", PROGRESS.sub("", text.replace(f"{here}/", "").replace(here, ".")))

    if "text" in output:
        return {**output, "text": settle(output["text"])}
    data = {kind: value if kind == "image/png" else settle(value) for kind, value in output["data"].items()}
    return {**output, "data": data}


def as_notebook(cells: Sequence[Cell]) -> str:
    """The text of an ``.ipynb`` file."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": [_in_lines(cell) for cell in cells], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _in_lines(cell: Cell) -> Cell:
    """A cell with its texts as lists of lines, so that versions of a notebook can be compared."""
    written = {**cell, "source": cell["source"].splitlines(keepends=True)}
    if "outputs" in cell:
        written["outputs"] = [
            {**each, "text": each["text"].splitlines(keepends=True)}
            if "text" in each
            else {
                **each,
                "data": {k: v if k == "image/png" else v.splitlines(keepends=True) for k, v in each["data"].items()},
            }
            for each in cell["outputs"]
        ]
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, help="percent files; all of examples/ unless given")
    os.environ.setdefault("MPLBACKEND", "agg")
    for path in parser.parse_args().sources or sorted(EXAMPLES.glob("*.py")):
        start = time.process_time()
        text = as_notebook(run(read_source(path), path.stem))
        path.with_suffix(".ipynb").write_text(text, encoding="utf-8")
        print(f"{path.stem}: {time.process_time() - start:.0f} s of CPU, {len(text) / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
