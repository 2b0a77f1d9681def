"""The tutorials: each notebook is what its source gives, stays small and plain, and its claims hold in a new run."""

from __future__ import annotations

import ast
import base64
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import notebooks
from scripts.docs import tutorials
from tests.prose import sentences, words

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "examples").glob("*.py"))
QUICK = {"01_gender"}
"""Those that run in the suite; the others take 10 to 30 seconds each of an idle core."""
LARGEST, LINES, WORDS = 300_000, 10, 30
"""Bytes of a notebook, lines of a cell, words of a sentence."""
VARYING = re.compile(r"^(threads|[\w ]*seconds|\d+ fits; wall time).*$", re.MULTILINE)
each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def stored(source: Path) -> list[dict[str, Any]]:
    return tutorials.read_notebook(source.with_suffix(".ipynb"))


def prose(source: Path) -> Iterator[str]:
    for cell in notebooks.read_source(source):
        if cell["cell_type"] == "markdown":
            yield cell["source"]


def test_there_are_ten_tutorials_and_the_index_names_each():
    index = (ROOT / "docs" / "tutorials.md").read_text()
    assert [path.stem[:2] for path in SOURCES] == [f"{number:02d}" for number in range(1, 11)]
    assert [path.stem for path in SOURCES if f"(../examples/{path.stem}.ipynb)" not in index] == []


def test_the_site_shows_a_picture_of_each_notebook_in_the_index():
    rows = "".join(f"| {path.stem} | [A question](examples/{path.stem}.md) |\n" for path in SOURCES)
    shown = re.findall(r"\| (\w+) \| \[!\[\]\((\S+)\)\{ .thumbnail \} A question\]", tutorials.with_thumbnails(rows))
    assert [stem for stem, _ in shown] == [path.stem for path in SOURCES]
    pictures = tutorials.pictures()
    assert all(picture.startswith(f"examples/{stem}_") and picture in pictures for stem, picture in shown)


@each
def test_a_notebook_has_the_cells_of_its_source(source: Path):
    kept = ("cell_type", "source", "metadata", "id")
    cells = [
        [{key: cell[key] for key in kept} for cell in found]
        for found in (notebooks.read_source(source), stored(source))
    ]
    assert cells[0] == cells[1], f"run: python scripts/notebooks.py examples/{source.name}"
    counts = [cell["execution_count"] for cell in stored(source) if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)), "all cells were run, in order"


@each
def test_a_notebook_is_small_short_and_has_a_picture(source: Path):
    assert source.with_suffix(".ipynb").stat().st_size < LARGEST
    code = [cell for cell in stored(source) if cell["cell_type"] == "code"]
    for cell in code[:-1]:
        lines = [
            line for line in cell["source"].splitlines() if line.strip() and not line.startswith(("import ", "from "))
        ]
        assert len(lines) <= LINES, cell["source"]
    pictures = [output for cell in code for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert pictures and all(base64.b64decode(each["data"]["image/png"])[:4] == b"\x89PNG" for each in pictures)
    assert not re.search(r"/tmp/|/home/|/work/", source.with_suffix(".ipynb").read_text()), "a folder of one machine"


@each
def test_a_notebook_asserts_what_it_says(source: Path):
    *others, last = notebooks.read_source(source)
    assert last["metadata"]["tags"] == [notebooks.CLAIMS] and not any(cell["metadata"] for cell in others)
    assert sum(isinstance(node, ast.Assert) for node in ast.parse(last["source"]).body) >= 3
    text = "\n".join(prose(source))
    for part in ("## What this notebook shows", "**Next.**", "../docs/"):
        assert part in text, part


@each
def test_prose_is_in_short_sentences(source: Path):
    long = [each for cell in prose(source) for each in sentences(cell) if words(each) > WORDS]
    assert not long, "\n".join(long)


@each
def test_links_between_tutorials_lead_somewhere(source: Path):
    for target in re.findall(r"\]\(([^)#]+)", "\n".join(prose(source))):
        assert target.startswith("../docs/") or (source.parent / target).is_file(), target


def shape(cell: dict[str, Any]) -> list[Any]:
    """The outputs of a cell without numbers, pictures' contents, and what differs between machines."""
    return [
        (output["output_type"], sorted(output.get("data", ())), unnumbered(output.get("text", "")))
        for output in cell.get("outputs", ())
    ]


def unnumbered(text: str) -> str:
    return re.sub(r"[\d.\s±+e%-]+", "", VARYING.sub("", text))


@pytest.mark.parametrize(
    "source",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow) for path in SOURCES],
)
@pytest.mark.filterwarnings("default")  # which a notebook's reader sees too
def test_a_notebook_runs_and_shows_what_is_stored(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(sys, "argv", ["itrain"])
    again = notebooks.run(notebooks.read_source(source), source.stem)
    for cell, found in zip(stored(source), again, strict=True):
        assert shape(cell) == shape(found), cell["source"]


@pytest.mark.slow
def test_a_notebook_runs_in_a_kernel(tmp_path: Path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(SOURCES[0].with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    client.NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = [sorted(output.get("data", ())) for cell in notebook.cells for output in cell.get("outputs", ())]
    assert ["image/png", "text/plain"] in kinds


@each
def test_a_page_of_the_site_has_the_outputs_and_the_site_s_links(source: Path):
    text, pictures = tutorials.page(source.with_suffix(".ipynb"))
    assert "../docs/" not in text and ".ipynb" not in text and pictures
    assert all(f"]({name})" in text for name in pictures) and '??? note "' in text
