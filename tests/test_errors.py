"""The page of errors is what its writer makes, has every class and message, and its examples say what it shows."""

from __future__ import annotations

import ast
import builtins
import html
import re
import shlex
from pathlib import Path

import pytest
import torch

import itrain.adapters
import itrain.saes
import itrain.tasks.ravel
from itrain import cli
from scripts import error_page

PAGE = error_page.PAGE.read_text(encoding="utf-8")
KINDS = error_page.kinds()
RAISED = error_page.raised()
EXAMPLES = [kind for kind in KINDS if kind.command or kind.python]
NAMES = {"itrain": itrain, "torch": torch}


def names_raised() -> set[str]:
    """All classes of errors in ``raise X`` and ``raise X(...)``, and all that the package defines."""
    found = set()
    for path in error_page.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                named = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                found.add(ast.unparse(named).rpartition(".")[2])
            elif isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                found.add(node.name)
    return {name for name in found if name[0].isupper()}


def test_the_page_is_what_the_script_writes() -> None:
    assert error_page.page() == PAGE, f"run {error_page.COMMAND}"


def test_every_class_of_errors_is_on_the_page() -> None:
    told = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    others = {"LogitDifferenceError", "YAMLError"}  # a loss, and what is caught where it is raised
    assert names_raised() - others - told == set()
    for name in told:
        assert isinstance(getattr(builtins, name, None), type) or error_page.classes()[name][1], f"{name} says nothing"


def test_every_error_belongs_to_one_kind_and_every_kind_has_errors() -> None:
    found = {place: error_page.kind_of(place, KINDS) for place in RAISED}
    assert [f"{place.file}:{place.line}" for place, known in found.items() if known is None] == []
    used = {known[0] for known in found.values() if known}
    assert [name for kind in KINDS for name in kind.files if name not in used] == []
    assert len(RAISED) > 1300 and len({kind.title for kind in KINDS}) == len(KINDS)


def test_every_message_is_on_the_page() -> None:
    shown = {html.unescape(each) for each in re.findall(r"<li><code>(.*?)</code></li>", PAGE)}
    assert {place.message for place in RAISED if place.message} == shown


def test_messages_are_read_with_what_differs_in_brackets() -> None:
    code = "raise ValueError(f\"site '{site}': {len(found)} of {type(model).__name__}{nearest(a, b)}; \" f'no {x!r}')"
    (found,) = error_page._of_file("x.py", ast.parse(code))
    assert found.message == "site '<site>': <found> of <model>; no <x>" and found.error == "ValueError"


@pytest.fixture(scope="module")
def tiny() -> itrain.BaseModel:
    return itrain.load_embedded()


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.title)
def test_an_example_says_what_the_page_shows(
    kind: error_page.Kind,
    tiny: itrain.BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (kind.written or {}).items():
        Path(name).write_text(text, encoding="utf-8")
    if kind.command:
        assert cli.main(shlex.split(kind.command)[1:]) in (1, 2)
        said = capsys.readouterr().err
        assert said == f"itrain: {kind.says}\n"
    else:
        with pytest.raises(Exception) as error:  # noqa: PT011
            eval(kind.python or "", {**NAMES, "tiny": tiny})
        said = f"{error.type.__name__}: {error.value}"
        assert said == kind.says
    messages = [place.message for place in RAISED if place.message and error_page.kind_of(place, [kind])]
    assert any(re.search(_pattern(message), said, re.DOTALL) for message in messages), "another kind's message"


def _pattern(message: str) -> str:
    return ".*".join(re.escape(part) for part in re.split(r"<[^<>]*>", message.removesuffix(" ...")))
