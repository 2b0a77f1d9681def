"""``itrain task check`` of a class: what is shown, and what is wrong with it, as of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from itrain.cli import main
from itrain.help import help_on

OWN = """
from itrain import Gender

class Mine(Gender):
    pass

class Lost(Gender):
    @property
    def outputs(self):
        return ["he", "xyzzy"]

class Other:
    pass

def made(*, simple: bool = False) -> Gender:
    return Gender(templates="simple" if simple else "discourse")
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_of_classes.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_class_is_shown_with_its_tokens_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task", "check", "own_of_classes.Mine"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("own_of_classes.Mine\n") and "gender of name" in told and "the label changes" in told
    assert "template (4 values)" in told and main(["task", "check", "own_of_classes.Mine", "model=null"]) == 0
    capsys.readouterr()
    assert main(["task", "check", "own_of_classes.made", "task.simple=true"]) == 0
    assert "template (4 values)" not in capsys.readouterr().out, "the key reaches the function"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["own_of_classes.Lost"], "own_of_classes.Lost: output: 'xyzzy' is not in the model's vocabulary"),
        (["own_of_classes.Other"], "task._target_: Other makes no Task"),
        (["own_of_classes.Gone"], "task._target_: cannot import 'own_of_classes.Gone': own_of_classes has no 'Gone'"),
        (["nowhere_of_classes.Gone"], "cannot import 'nowhere_of_classes.Gone'"),
        (["own_of_classes.Mine", "task.temlates=simple"], "Mine takes no 'temlates', did you mean 'task.templates'?"),
        (["nowhere.csv"], "there is no file 'nowhere.csv'"),
        (["nowhere.yaml"], "nowhere.yaml"),
        ([], "'task' needs what to do and with what"),
    ],
)
def test_what_is_wrong_with_a_class_is_told_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["task", "check", *words]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1


def test_the_help_shows_it() -> None:
    assert "itrain task check <module>.<Class>" in help_on(["task"])
