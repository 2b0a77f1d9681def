"""What the command line says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest

import itrain
from itrain import config
from itrain.cli import main
from itrain.help import HELP, VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_says_what_it_takes_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: itrain {verb}")
    assert said.count(f"itrain {verb}") > 1 and said != HELP


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"itrain {itrain.__version__}\n"


@pytest.mark.parametrize("group", [*(group for group in config.group_choices() if group != "launcher"), "recipe"])
def test_a_part_is_listed_with_a_line_for_each_choice(
    group: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["list", group]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == (sorted(config.recipe_files()) if group == "recipe" else config.group_choices()[group])
    assert len(set(lines.values())) == len(lines)
