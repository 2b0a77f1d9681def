"""What the README shows does what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from itrain.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
USE, EXAMPLE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"^itrain (?:fit|show|list)[^#\n]*", README, re.MULTILINE)))


def test_the_example_finds_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(EXAMPLE, scope)
    results = scope["results"]
    assert isinstance(results, dict)
    assert results["test/iia_argmax"] > 0.95
    assert results["test/random_subspace/iia_changing_argmax"] < 0.9
    assert list(tmp_path.iterdir()) == []


def test_what_was_trained_acts_in_the_user_s_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(USE, scope)
    model, run, prompt = (scope[name] for name in ("model", "run", "prompt"))
    assert run.probability("he") > run.probability("she") and run.plain.probability("he") < 0.5
    assert model.tokenizer.decode(scope["tokens"][0]).endswith("Mary walked because he was happy")
    plain = model.model.generate(**prompt, max_new_tokens=3)
    assert model.tokenizer.decode(plain[0]).endswith("Mary walked because she was happy")


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
    for target in re.findall(r"\]\(([^)#h][^)#]*)(?:#[^)]*)?\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
