"""The page of architectures says of each row what the code has, and its verification finds rows that are wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from itrain.architectures import ARCHITECTURES, Component
from itrain.sites import ATTENTION_WEIGHTS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "architectures.md"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")


def components_of(cell: str, groups: dict[str, list[str]]) -> set[str]:
    """What a reader of the page takes a cell for."""
    found: set[str] = set()
    for part in cell.split("; "):
        stack = match[1] + "." if (match := re.match(r"\*\*(\w+)\*\*: ", part)) else ""
        for said in re.sub(r"^\*\*\w+\*\*: ", "", part).split(", "):
            group, _, without = said.partition(" without ")
            names = [group.strip("`")] if group.startswith("`") else groups[group]
            found |= {stack + name for name in names if name not in without.replace("`", "").split(" and ")}
    return found


def test_the_page_has_every_row_with_the_components_of_the_code_and_no_other() -> None:
    page = PAGE.read_text()
    groups = {
        name: re.findall(r"`(\w+)`", rest) for name, rest in re.findall(r"^    - \*\*([\w-]+)\*\*: (.*)$", page, re.M)
    }
    table = dict(re.findall(r"^\| `([\w-]+)` \| (.*?) \|", page, re.M))
    assert sorted(table) == sorted(ARCHITECTURES)
    for model_type, row in ARCHITECTURES.items():
        expected = set(row.components)
        stacks = [f"{stack}." for stack in row.stacks] or [""]
        if row.weights:
            expected |= {f"{s}{ATTENTION_WEIGHTS}" for s in stacks if f"{s}attention_input" in row.components}
        assert components_of(table[model_type], groups) == expected, f"{model_type}: run scripts/architecture_table.py"


def test_models_that_are_named_first_have_rows() -> None:
    table = PAGE.read_text().split("| you know it as |")[1].split("\n\n")[0]
    named = re.findall(r"`(\w+)`", table.partition("\n")[2])
    assert len(named) > 40 and not set(named) - ARCHITECTURES.keys()


def test_the_rest_of_the_page_is_what_the_script_writes() -> None:
    script: Any = __import__("architecture_table")
    lines = script.written()
    assert script.differences(script.page_of(lines), PAGE.read_text()) == []
    glossary = "\n".join(script.glossary())
    plain = {name.rpartition(".")[2] for row in ARCHITECTURES.values() for name in row.components}
    lacking = [name for name in plain if f"`{name}`" not in glossary and not name.startswith("cross_")]
    assert not lacking, f"the docstring of Architecture explains {lacking} nowhere"


def test_the_check_tells_changes_from_other_releases() -> None:
    script: Any = __import__("architecture_table")
    page = PAGE.read_text()
    assert script.differences(page.replace(" 5.", " 6."), page) == []
    changed = page.replace("| `llama` | stream,", "| `llama` |")
    assert [line[:11] for line in script.differences(changed, page)] == ["+ | `llama`", "- | `llama`"]


def test_rows_that_are_tried_again_keep_earlier_releases_only_while_they_say_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script: Any = __import__("architecture_table")
    monkeypatch.setattr(script, "try_row", lambda model_type: None)
    monkeypatch.setattr(script, "replay_of", lambda model_type: "suffix")
    monkeypatch.setattr(script.transformers, "__version__", "5.24.0")
    before = script.Line("llama", "stream, attention, weights, mlp", "suffix", "5.7.0")
    assert script.tried("llama", before).releases == "5.7.0, 5.24.0"
    assert script.tried("llama", before._replace(replay="prefix: x")).releases == "5.24.0"
    monkeypatch.setattr(script, "try_row", lambda model_type: "this release has no such model")
    assert script.tried("llama", before) == before
    assert script.tried("llama", before._replace(components="stream"))[2:] == ("-", "-")


@pytest.mark.parametrize(
    ("name", "component", "message"),
    [
        ("mlp_output", Component("mlp.nothing", "output"), "no block has mlp_output"),
        ("block_output", Component("mlp", "output"), "layer0.block_output is no hidden state"),
        ("unused", Component("mlp.act_fn", "output"), "layer0.unused has another size than it says"),
    ],
)
def test_a_wrong_row_is_found(name: str, component: Component, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial: Any = __import__("row_trial")
    row = ARCHITECTURES["llama"]
    wrong = replace(row, components={**row.components, name: component})
    monkeypatch.setitem(ARCHITECTURES, "llama", wrong)  # type: ignore[arg-type]
    with pytest.raises(trial.RowError, match=message):
        trial.try_row("llama")


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_next", "t5"])
def test_what_the_page_says_of_a_row_holds(model_type: str) -> None:
    script: Any = __import__("architecture_table")
    before = script.written()[model_type]
    assert script.tried(model_type, before)[:3] == before[:3]


@pytest.mark.slow
def test_what_the_page_says_of_all_rows_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    script: Any = __import__("architecture_table")
    monkeypatch.setattr("sys.argv", ["architecture_table.py", "--check"])
    assert script.main() == 0
