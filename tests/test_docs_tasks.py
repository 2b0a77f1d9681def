"""docs/howto/tasks.md: its files are tasks, its commands are understood, and its tables name all there is."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

from itrain import cli, config
from itrain.tasks.declared import DeclaredTask
from itrain.tasks.operations import FUNCTIONS

PAGE = (Path(__file__).parents[1] / "docs" / "howto" / "tasks.md").read_text(encoding="utf-8")
YAML = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()
]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in YAML:
        (tmp_path / name).write_text(text)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_page_is_understood(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *words = shlex.split(command)
    assert name == "itrain"
    if words[0] == "task":
        assert cli.main(words) == 0, capsys.readouterr().err
    elif words[0] in ("fit", "sweep"):
        config.request(words[1:], sweeps=words[0] == "sweep")
    else:
        assert words[0] == "export", "a verb that this test does not know"


def test_the_page_has_each_key_and_function() -> None:
    keys = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(keys) == sorted(inspect.signature(DeclaredTask).parameters)
    assert all(f"`{name}`" in PAGE or f"`{name}(" in PAGE for name in FUNCTIONS)
