"""docs/howto/objectives.md: its commands build the objectives that it says, and its table names what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra.utils import instantiate

from itrain import config
from itrain.objectives.base import Objectives, Outcome
from itrain.objectives.cross_entropy import CrossEntropy
from tests.pages import DOCS, RunPage

PAGE = (DOCS / "howto" / "objectives.md").read_text(encoding="utf-8")
((NAME, RECIPE),) = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SHELL = "".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = SHELL.replace("\\\n", " ").splitlines()


def test_the_blocks_of_the_page_leave_no_file_behind(run_page: RunPage) -> None:
    ran = run_page("howto/objectives.md")
    assert ran.compared["shown"] == 2 and [path.name for path in ran.folder.iterdir()] == [NAME]


def test_there_are_commands_for_fits_and_sweeps() -> None:
    assert {shlex.split(command)[1] for command in COMMANDS} == {"fit", "sweep"}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_page_builds_its_objectives(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NAME).write_text(RECIPE)
    _, verb, *words = shlex.split(command)
    composed = config.request(words, sweeps=verb == "sweep")
    given = instantiate(composed.training.objectives, _convert_="all")
    built = Objectives(given, default=CrossEntropy)
    assert built.named and built.parts.keys() == composed.training.objectives.keys()
    if NAME in words:
        assert built.parts["js"].weight == (2 if "training.objectives.js.weight=2" in words else 0.5)


def test_what_the_page_names_of_an_outcome_exists() -> None:
    (rows,) = re.findall(r"^\| of `Outcome` .*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    named = re.findall(r"`(\w+)(?:\(\))?`(?=[^|\n]*\|[^|\n]*\|$)", rows, re.MULTILINE)
    assert {"logits", "base_logits", "edited"} <= set(named)
    assert all(name in Outcome.__dataclass_fields__ or hasattr(Outcome, name) for name in named)
