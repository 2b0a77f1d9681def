"""What the README shows does what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from itrain.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"^itrain (?:fit|show|list)[^#\n]*", README, re.MULTILINE)))


def test_the_example_finds_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EXAMPLE is not None
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(EXAMPLE[1], scope)
    results = scope["results"]
    assert isinstance(results, dict)
    assert results["test/iia_argmax"] > 0.95
    assert results["test/random_subspace/iia_changing_argmax"] < 0.9
    assert list(tmp_path.iterdir()) == []


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) > 5 and "`make demo`" in README and "`make test`" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_compose_and_fit_their_constructors(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, verb, *words = shlex.split(command)
    assert main(["list"] if verb == "list" else ["show", *words]) == 0


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
