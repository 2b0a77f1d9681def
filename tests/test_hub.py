"""Exports on the hub: pushed, listed and pulled at a revision, and refused in one line where that cannot be."""

from __future__ import annotations

import json
import pickle
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import itrain
from itrain.interventions.das import DAS
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.sharing import CONFIG, WEIGHTS, ExportError, list_exports, load, push_to_hub
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from itrain.training.base import Training
from tests.hub import Hub, Repository
from tests.hub import hub as hub
from tests.models import tiny_model

ALICE = "hf_alice"
SITE = "layer0.block_output@last"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("llama")


def search(model: nn.Module, *, rank: int = 3) -> AlignmentSearch:
    return AlignmentSearch(network=HookedNetwork(model), sites=[Site.parse(SITE)], intervention=partial(DAS, rank=rank))


def pushed(model: nn.Module, repo_id: str = "alice/gender", *, rank: int = 3, **how: object) -> Training:
    trained = search(model, rank=rank)
    base = BaseModel(model=model, name="some/llama")
    trained.push_to_hub(repo_id, base_model=base, token=ALICE, **how)  # type: ignore[arg-type]
    return trained


def rows(training: Training) -> torch.Tensor:
    return dict(training.exported.named_modules())["layer0_block_output@last.subspace"].rows.detach()


def one_line(found: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(found.value)
    return str(found.value)


def test_what_is_pushed_is_pulled_again_with_its_card(hub: Hub, model: nn.Module) -> None:
    trained = pushed(model, metrics={"test/iia_changing_argmax": 0.75})
    files = hub.repositories["alice/gender"].commits[hub.repositories["alice/gender"].refs["main"]]
    assert set(files) == {".gitattributes", "README.md", CONFIG, WEIGHTS}
    restored = itrain.load("alice/gender", model)
    torch.testing.assert_close(rows(restored), rows(trained), atol=1e-6, rtol=0)
    card = files["README.md"].decode()
    for said in ("library_name: itrain", "base_model: some/llama", "0.750", SITE, 'itrain.load("alice/gender")'):
        assert said in card
    restored.push_to_hub("alice/again", token=ALICE)
    again = hub.repositories["alice/again"]
    assert json.loads(again.commits[again.refs["main"]][CONFIG]) == json.loads(files[CONFIG])


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, model: nn.Module) -> None:
    first = pushed(model)
    repository = hub.repositories["alice/gender"]
    commit = repository.refs["main"]
    repository.refs["v1"] = commit
    second, third = pushed(model), pushed(model, branch="tried")
    for revision, trained in {"v1": first, commit: first, "main": second, "tried": third}.items():
        torch.testing.assert_close(
            rows(load("alice/gender", model, revision=revision)), rows(trained), atol=1e-6, rtol=0
        )
    torch.testing.assert_close(rows(load("alice/gender@v1", model)), rows(first), atol=1e-6, rtol=0)


def test_one_repository_holds_several_exports(hub: Hub, model: nn.Module) -> None:
    trained = {name: pushed(model, rank=rank, subfolder=name) for rank, name in ((1, "gender"), (2, "tense"))}
    found = list_exports("alice/gender")
    assert list(found) == ["gender", "tense"]
    assert found["tense"]["intervention"]["arguments"] == {"rank": 2}
    for name, each in trained.items():
        for restored in (load("alice/gender", model, subfolder=name), load(f"alice/gender/{name}", model)):
            torch.testing.assert_close(rows(restored), rows(each), atol=1e-6, rtol=0)
    repository = hub.repositories["alice/gender"]
    card = repository.commits[repository.refs["main"]]["README.md"].decode()
    assert "## `gender`" in card and "## `tense`" in card and 'itrain.load("alice/gender/tense")' in card
    for source, asked in (("alice/gender", "at the top"), ("alice/gender/number", "at 'number'")):
        with pytest.raises(ExportError, match=f"has no export {asked}; it has gender, tense"):
            load(source, model)


def test_what_was_written_to_a_card_by_hand_stays(hub: Hub, model: nn.Module) -> None:
    repository = hub.repositories["alice/gender"] = Repository("alice", private=False)
    repository.commit("main", {"README.md": b"---\nlicense: mit\ntags: [mine]\n---\nWritten by hand.\n"})
    pushed(model)
    card = repository.commits[repository.refs["main"]]["README.md"].decode()
    repository.commit("main", {"README.md": card.encode() + b"\nBelow.\n"})
    pushed(model, subfolder="other")
    card = repository.commits[repository.refs["main"]]["README.md"].decode()
    assert "license: mit" in card and "- mine" in card and "- itrain" in card
    assert card.count("Written by hand.") == card.count("Below.") == card.count("## Citation") == 1


def test_a_private_repository_asks_for_a_token(hub: Hub, model: nn.Module) -> None:
    pushed(model, private=True)
    with pytest.raises(ExportError, match="no repository 'alice/gender' on the hub, or it is private: log in") as found:
        load("alice/gender", model)
    assert "token=<token>" in one_line(found)
    with pytest.raises(ExportError, match="or the token may not read it"):
        load("alice/gender", model, token="hf_bob")
    assert load("alice/gender", model, token=ALICE).sites


def test_what_is_to_be_private_is_never_pushed_into_the_open(hub: Hub, model: nn.Module) -> None:
    pushed(model)
    before = dict(hub.repositories["alice/gender"].refs)
    with pytest.raises(ExportError, match="exists and is public, so nothing was pushed; make it private"):
        pushed(model, private=True)
    assert hub.repositories["alice/gender"].refs == before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("alice/none", "there is no repository 'alice/none' on the hub, or it is private"),
        ("alice/gender@v9", "'alice/gender' has no revision 'v9'"),
        ("alice/empty", "'alice/empty' holds no export: it has no intervention_config.json"),
        ("alice/half", "'alice/half' is damaged: it has a intervention_config.json at the top and no intervention.s"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(source: str, said: str, hub: Hub, model: nn.Module) -> None:
    pushed(model)
    hub.repositories["alice/empty"] = Repository("alice", private=False)
    hub.repositories["alice/half"] = Repository("alice", private=False)
    hub.repositories["alice/half"].commit("main", {CONFIG: b"{}"})
    with pytest.raises(ExportError) as found:
        load(source, model)
    assert one_line(found).startswith(said)


def test_offline_the_cache_serves_and_its_lack_is_said(
    hub: Hub, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    pushed(model)
    load("alice/gender", model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for how in ({}, {"local_files_only": True}):
        assert load("alice/gender", model, **how).sites  # type: ignore[arg-type]
        with pytest.raises(ExportError, match="'alice/other' is not in the cache and the hub is out of reach") as found:
            load("alice/other", model, **how)  # type: ignore[arg-type]
        one_line(found)
    with pytest.raises(ExportError, match="out of reach"):
        pushed(model)


def test_a_hub_that_does_not_answer_is_said(hub: Hub, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's further attempts
    for act in (lambda: load("alice/gender", model), lambda: list_exports("alice/gender"), lambda: pushed(model)):
        with pytest.raises(ExportError, match=r"out of reach|cannot be used") as found:
            act()
        one_line(found)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"repo_id": "bob/gender"}, r"the hub refuses 'bob/gender' \(403\).*log in"),
        ({"repo_id": "gender"}, "'gender' is no place on the hub; use user/repo"),
        ({"subfolder": "../up"}, r"'alice/gender/../up' is no place"),
        ({"subfolder": "/tmp"}, "is no place"),
    ],
)
def test_a_push_that_cannot_be_is_one_line(how: dict, said: str, hub: Hub, model: nn.Module) -> None:
    with pytest.raises(ExportError, match=said) as found:
        pushed(model, **{"repo_id": "alice/gender"} | how)
    one_line(found)


def test_a_push_without_a_token_is_one_line(hub: Hub, model: nn.Module) -> None:
    with pytest.raises(ExportError, match="log in with `hf auth login`, or give token") as found:
        push_to_hub(search(model), "alice/gender", base_model=BaseModel(model=model))
    one_line(found)


def test_a_card_that_somebody_else_pushes_meanwhile_is_not_lost(
    hub: Hub, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from itrain.sharing import pushing

    pushed(model)
    make = pushing.card_of

    def card_of(*arguments: object, **settings: object) -> str:
        hub.repositories["alice/gender"].commit("main", {"README.md": b"---\nlicense: mit\n---\n"})
        return make(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(pushing, "card_of", card_of)
    with pytest.raises(ExportError, match=r"refuses 'alice/gender' \(412\)") as found:
        pushed(model)
    one_line(found)


def test_nothing_of_a_repository_is_fetched_but_the_export(hub: Hub, model: nn.Module) -> None:
    class Runs:
        def __reduce__(self) -> tuple:
            return (Path("ran").touch, ())

    pushed(model)
    hostile = {name: pickle.dumps(Runs()) for name in ("pytorch_model.bin", "intervention.bin", "x.pt", "rng.pkl")}
    code = dict.fromkeys(("modeling.py", "__init__.py", "itrain.py"), b"open('ran', 'w').close()\n")
    hub.repositories["alice/gender"].commit("main", hostile | code)
    hub.asked.clear()
    load("alice/gender", model)
    assert {Path(each).name for each in hub.asked if "/resolve/" in each} == {CONFIG, WEIGHTS}


@pytest.mark.parametrize("path", ["../up", "a/../../up", "/etc", "a\\b/../c", "a\nb"])
def test_a_path_that_leaves_the_repository_is_refused(path: str, hub: Hub, model: nn.Module, tmp_path: Path) -> None:
    pushed(model)
    hub.repositories["alice/gender"].commit("main", {f"{path}/{CONFIG}": b"{}"})
    with pytest.raises(ExportError, match="is no place on the hub") as found:
        list_exports("alice/gender")
    one_line(found)
    with pytest.raises(ExportError, match=r"is no place on the hub|holds no export"):
        load("alice/gender", model, subfolder=path)
    assert not (tmp_path / "up").exists()


def test_what_is_pushed_does_not_tell_of_its_author_s_machine(hub: Hub, model: nn.Module) -> None:
    configuration = {
        "seed": 0,
        "output": "/home/alice/outputs",
        "logger": {"_target_": "itrain.loggers.wandb.WandbLogger", "entity": "secret"},
        "ckpt": "/home/alice/run",
        "model": {"_target_": "itrain.models.load_pretrained", "name": "/home/alice/models/mine"},
        "task": {"_target_": "itrain.tasks.gender.Gender", "templates": ["~/table.jsonl", "discourse"]},
    }
    pushed(model, configuration=configuration)
    found = list_exports("alice/gender")[""]
    assert "alice" not in json.dumps(found) and "secret" not in json.dumps(found)
    assert found["configuration"]["model"]["name"] == "mine"
    assert found["configuration"]["task"]["templates"] == ["table.jsonl", "discourse"]


def test_a_folder_here_comes_before_a_repository(
    hub: Hub, model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = search(model)
    itrain.export(trained, "alice/gender", base_model=BaseModel(model=model))
    torch.testing.assert_close(rows(load("alice/gender", model)), rows(trained), atol=1e-6, rtol=0)
    with pytest.raises(ExportError, match="'alice/gendr/export' is not an export"):
        load("alice/gendr/export", model)
    assert not hub.asked
    with pytest.raises(ExportError, match="revision is for a repository of the hub; 'alice/gender' is none"):
        load("alice/gender", model, revision="main")


def test_the_weights_of_a_push_are_those_of_the_export(hub: Hub, model: nn.Module, tmp_path: Path) -> None:
    trained = pushed(model)
    itrain.export(trained, tmp_path / "export", base_model=BaseModel(model=model))
    (here,) = load_file(tmp_path / "export" / WEIGHTS).values()
    repository = hub.repositories["alice/gender"]
    (tmp_path / "pushed").write_bytes(repository.commits[repository.refs["main"]][WEIGHTS])
    (there,) = load_file(tmp_path / "pushed").values()
    assert torch.equal(here, there) and torch.equal(here, rows(trained))
