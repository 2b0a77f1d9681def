"""Repositories of the hub that somebody has tampered with, and what a push tells of its author."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from itrain.cli import main
from itrain.exporting import list_repository
from itrain.sharing import CONFIG, WEIGHTS, ExportError, load
from itrain.sharing.hub import Address, is_address
from itrain.sharing.pushing import public
from itrain.telling import RunFailed
from tests.canary import CANARY
from tests.canary import watched as watched
from tests.hub import Hub, Repository
from tests.hub import hub as hub
from tests.models import tiny_model
from tests.test_hub import pushed


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("llama")


def repository(hub: Hub, **files: bytes) -> str:
    hub.repositories["eve/x"] = Repository("eve", private=False)
    hub.repositories["eve/x"].commit("main", files)
    return "eve/x"


@pytest.mark.parametrize("folder", ["../../x", "/etc", "a\x1b[2J\n", "a\\..\\b", ".git"])
def test_a_path_that_leaves_its_repository_is_refused(folder: str, hub: Hub, model: nn.Module) -> None:
    repo_id = repository(hub, **{f"{folder}/{CONFIG}": b"{}", f"{folder}/{WEIGHTS}": b""})
    with pytest.raises(RunFailed, match="is no place on the hub"):
        list_repository(repo_id)
    with pytest.raises(ExportError, match="is no place on the hub") as found:
        load(repo_id, model)
    assert str(found.value).isprintable() and not list(Path().rglob(WEIGHTS))


@pytest.mark.parametrize("revision", ["..", "../../../x", "refs/../../x", "a b"])
def test_a_revision_stays_in_its_repository(revision: str, hub: Hub, model: nn.Module) -> None:
    with pytest.raises(ExportError, match="is no place on the hub"):
        load("alice/gender", model, revision=revision)
    assert not is_address(f"alice/gender@{revision}") and not hub.asked
    assert str(Address.parse("alice/gender@refs/pr/1")) == "alice/gender@refs/pr/1"


def test_an_address_may_be_too_long_for_a_file(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", f"export={'x' * 300}/y"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_list_shows_a_strangers_text_on_a_short_line(hub: Hub) -> None:
    said = {
        "training": "x.\x1b[2J" * 1000,
        "sites": ["\u202e\n"] * 5000,
        "base_model": {"name": "<b>"},
        "metrics": {"test/\x1b": 1.0},
    }
    (line,) = list_repository(repository(hub, **{CONFIG: json.dumps(said).encode(), WEIGHTS: b""}))
    assert line.isprintable() and len(line) < 1000


HEADS = {
    "broken": "a: [",
    "a list": "- a",
    "a tag of Python's": f"a: !!python/object/apply:importlib.import_module [{CANARY}]",
    "tags that are none": "tags: 3",
    "results that are none": "model-index: 3",
    "no date": "a: 2020-13-45",
}


@pytest.mark.parametrize("what", HEADS)
def test_a_card_whose_head_cannot_be_read_stays(what: str, hub: Hub, model: nn.Module) -> None:
    hub.repositories["alice/gender"] = Repository("alice", private=False)
    before = hub.repositories["alice/gender"].commit(
        "main", {"README.md": f"---\n{HEADS[what]}\n---\nby hand".encode()}
    )
    with pytest.raises(ExportError, match=r"'alice/gender': the head of its README\.md cannot be read") as found:
        pushed(model)
    assert str(found.value).isprintable() and hub.repositories["alice/gender"].refs["main"] == before


def cleaned(value: Any) -> Any:
    return public({"configuration": {"task": value}})["configuration"]["task"]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("/home/eve/data/x.jsonl", "x.jsonl"),
        ("~/x.jsonl", "x.jsonl"),
        ("../eve/x.jsonl", "x.jsonl"),
        ("file:///home/eve/x.jsonl", "x.jsonl"),
        ("cached at /home/eve/x", "cached at ~/x"),
        ({"/home/eve/x": 1}, {"x": 1}),
        ("/", "/"),
        ("~", "~"),
        ("/think {word}", "/think {word}"),
        ("~ {word} / {other} ..", "~ {word} / {other} .."),
        ("hf://datasets/a/b", "hf://datasets/a/b"),
        ("data/x.jsonl", "data/x.jsonl"),
    ],
)
def test_a_push_tells_no_folder_and_changes_no_template(value: Any, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/eve")
    assert cleaned(value) == told


@pytest.mark.parametrize("secret", ["hf_" + "a" * 34, "Bearer sk-" + "a" * 40, "from-the-environment"])
def test_a_push_tells_no_secret(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "from-the-environment")
    with pytest.raises(ExportError, match=r"configuration\.task\.loader holds what looks like a secret") as found:
        cleaned({"loader": ["x", secret]})
    assert secret not in str(found.value)
    assert cleaned({"loader": "hf_dataset"}) == {"loader": "hf_dataset"}
