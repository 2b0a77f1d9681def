"""The pages of examples: their blocks run in order, are short, and print what stands below them."""

from __future__ import annotations

import ast
import contextlib
import io
import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(
    r"^```python(?: (?P<library>\w+))?\n(?P<code>.*?)^```\n(?:```text\n(?P<shown>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
LINES = 4
"""What one thing may take, apart from an import."""


def blocks(page: str) -> Iterator[re.Match[str]]:
    return BLOCK.finditer((DOCS / page).read_text(encoding="utf-8"))


def run(code: str, space: dict[str, Any]) -> str:
    """What a block prints, and its last expression as a notebook shows it."""
    *body, last = ast.parse(code).body
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if not isinstance(last, ast.Expr):
            body, last = [*body, last], None
        # Libraries that look at the source of their caller find it here.
        name = f"<block {len(linecache.cache)}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        exec(compile(ast.Module(body, []), name, "exec"), space)
        value = None if last is None else eval(compile(ast.Expression(last.value), "block", "eval"), space)
    return printed.getvalue() if value is None else f"{value!r}\n"


def alike(shown: str, expected: str) -> bool:
    """Whether texts are the same, numbers but for rounding and columns but for their widths."""
    texts = [re.sub(r"\s+", " ", NUMBER.sub("#", text)).strip() for text in (shown, expected)]
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (shown, expected)]
    return texts[0] == texts[1] and all(abs(a - b) < 5e-3 for a, b in zip(*numbers, strict=True))


def require_short(code: str) -> None:
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("import ")]
    assert len(lines) <= LINES, code


def test_blocks_are_short_run_in_order_and_print_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    found = list(blocks("howto/notebook.md"))
    assert found
    for each in found:
        require_short(each["code"])
        shown = run(each["code"], space)
        if each["shown"] is not None:
            assert alike(shown, each["shown"]), f"{each['code']}\nprints\n{shown}"


@pytest.mark.filterwarnings("default")  # which the other library gives
@pytest.mark.parametrize("library", ["pyvene", "nnsight"])
def test_twins_of_another_library_give_the_same(library, request):
    found = request.getfixturevalue(library) if library == "nnsight" else pytest.importorskip(library)
    space: dict[str, Any] = {library: found}
    compared = 0
    for each in blocks("coming_from/index.md"):
        if each["library"] in (None, library):
            run(each["code"], space)
        if each["library"] is None:
            require_short(each["code"])
        if each["library"] is None and "theirs" in space:
            torch.testing.assert_close(space.pop("ours"), space.pop("theirs"), atol=1e-4, rtol=1e-4)
            compared += 1
    assert compared == {"pyvene": 9, "nnsight": 3}[library]


def test_trainings_of_the_model_itself_print_a_line_for_each_part():
    import itrain

    network = itrain.make_network(itrain.load_embedded().model, trainable=True)
    lora = itrain.LoRAFinetuning(network=network, rank=2, targets=["dense"])
    first, *parts = repr(lora).splitlines()
    assert first == "LoRAFinetuning" and len(parts) == 6 and all("LoRA, 320 parameters" in part for part in parts)


def test_every_edit_prints_in_jupyter():
    space: dict[str, Any] = {}
    run("import itrain\nmodel = itrain.load_embedded()", space)
    html = run("print(model.run('Mary walked because', 'layer2.block_output@1', itrain.Zero)._repr_html_())", space)
    assert "<table>" in html and "Mary walked because" in html and "Zero" in html
    texts = run("print(model.read('Mary walked because', 'layer2.block_output@\"Mary\"')._repr_html_())", space)
    assert "layer2.block_output@&quot;Mary&quot;" in texts


def test_the_page_of_monitoring_runs_and_prints_what_is_shown():
    space: dict[str, Any] = {}
    for each in blocks("howto/monitoring.md"):
        shown = run(each["code"], space)
        if each["shown"] is not None:
            assert alike(shown, each["shown"]), f"{each['code']}\nprints\n{shown}"
