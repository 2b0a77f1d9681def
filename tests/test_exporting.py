"""The verb export: to the hub and back, merged into the model, in other tools' forms, and its words are checked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import itrain
from itrain.cli import main
from itrain.interventions.das import DAS
from itrain.interventions.steering import SteeringVector
from itrain.networks.hooks import HookedNetwork
from itrain.sharing import CONFIG, WEIGHTS, list_exports
from itrain.training.alignment import AlignmentSearch
from itrain.training.finetuning import LoRAFinetuning, RepresentationFinetuning
from tests.commands import SMALL
from tests.hub import Hub, environment
from tests.hub import hub as hub
from tests.test_merging import logits

ALICE = "hf_alice"


@pytest.fixture(scope="module")
def base() -> itrain.BaseModel:
    return itrain.load_embedded()


@pytest.fixture(autouse=True)
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", ALICE)


@pytest.fixture
def steered(base: itrain.BaseModel, tmp_path: Path) -> Path:
    """An export of vectors, of which one acts at all tokens."""
    sites = ["layer1.block_output@all", "layer2.mlp_output@last"]
    trained = RepresentationFinetuning(network=HookedNetwork(base.model), sites=sites, intervention=SteeringVector)
    for weight in trained.exported.parameters():
        nn.init.normal_(weight)
    return itrain.export(trained, tmp_path / "steered", base_model=base, metrics={"test/exact_match": 0.5})


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command; gives its exit code and what it says, of an error the one line."""

    def run(*words: str) -> tuple[int, str]:
        code = main(["export", *words])
        out, err = capsys.readouterr()
        assert code == 0 or err.count("\n") == 1, err
        return code, err if code else out

    return run


def test_an_export_is_pushed_listed_and_fetched_by_address(
    hub: Hub, steered: Path, said: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = said(f"export={steered}", "to=hub", "repo=alice/steered/story", "private=true", "branch=first")
    assert code == 0 and out.startswith(f"{hub.endpoint}/alice/steered/commit/")
    assert hub.repositories["alice/steered"].private
    assert list(list_exports("alice/steered", revision="first")) == ["story"]
    assert main(["list", "alice/steered@first"]) == 0
    line = "story  RepresentationFinetuning at layer1.block_output@all, layer2.mlp_output@last on itrain/tiny-world: "
    assert capsys.readouterr().out.startswith(line)
    code, out = said("export=alice/steered/story@first", "merge=true", "acts=all")
    assert code == 0 and out.endswith("story-merged\n") and Path("story-merged/model.safetensors").is_file()


def test_a_merged_model_says_what_is_in_it_and_answers_so(
    hub: Hub, base: itrain.BaseModel, steered: Path, said: Callable
) -> None:
    code, out = said(f"export={steered}", "merge=true", "acts=all", "output=merged")
    folded, left, place = out.splitlines()
    assert code == 0 and place == "merged"
    assert folded == "folded layer1.block_output@all: gpt_neox.layers.1.mlp.dense_4h_to_h"
    assert left.startswith("left out layer2.mlp_output@last: it acts at last alone")
    trained = itrain.load(steered, base.model)
    merged = itrain.load_pretrained(name="merged")
    assert merged.tokenizer is not None
    torch.testing.assert_close(logits(merged.model), logits(base.model, trained.edits()[:1]), atol=1e-4, rtol=1e-5)
    code, out = said(f"export={steered}", "merge=true", "acts=all", "to=hub", "repo=alice/merged")
    assert code == 0 and not Path("steered-merged").exists()
    repository = hub.repositories["alice/merged"]
    files = repository.commits[repository.refs["main"]]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    card = files["README.md"].decode()
    for part in ("library_name: transformers", "- folded `layer1.block_output@all`", "- **not** folded", "0.500"):
        assert part in card


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ([], 2, "there is nothing to export"),
        (["to=hub"], 2, "to=hub and repo=<user/name> belong together; add repo="),
        (["repo=a/b"], 2, "add to=hub, or leave repo out"),
        (["to=hbu", "repo=a/b"], 2, "there is no form 'hbu', did you mean 'hub'?"),
        (["private=true"], 2, "private has no effect: it is for to=hub"),
        (["to=hub", "repo=a/b", "private=maybe"], 2, "private: expected true or false, not 'maybe'"),
        (["to=hub", "repo=a"], 2, "'a' is neither a folder nor a place on the hub"),
        (["to=hub", "repo=a/b@v1"], 2, "branch=v1, not @v1"),
        (["to=hub", "to=mib"], 2, "to is given twice"),
        (["acts=all"], 2, "acts has no effect: it is for merge=true"),
        (["merge=true", "acts=prompt"], 2, "takes acts=all, not 'prompt'"),
        (["merge=true", "to=mib"], 2, "merge has no effect: it is for to=folder or to=hub"),
        (["everywhere=true", "to=mib"], 2, "everywhere has no effect: it is for to=gguf or to=easysteer"),
        (["merge=true", "to=hub", "repo=a/b/c"], 2, "a merged model lies at the top"),
        (["export=steered"], 2, "an export is a folder already"),
        (["export=steered", "to=mib", "seed=1"], 2, "seed has no effect on an export"),
        (["export=steered", "to=hub", "repo=alice/x", "output=y"], 2, "output has no effect"),
        (["export=steered", "merge=true"], 1, "acts=all folds it so"),
        (["export=steered", "to=mib"], 1, "SteeringVector"),
        (["export=none", "merge=true"], 1, "'none' is not an export: it has no intervention_config.json"),
        (["export=alice/none", "merge=true"], 1, "there is no repository 'alice/none' on the hub"),
    ],
)
def test_a_wrong_request_is_one_line(
    words: list[str], code: int, line: str, hub: Hub, steered: Path, said: Callable
) -> None:
    found, text = said(*words)
    assert found == code and line in text, text


def test_other_tools_files_are_written_beside_the_export(
    hub: Hub, base: itrain.BaseModel, tmp_path: Path, said: Callable
) -> None:
    search = AlignmentSearch(
        network=HookedNetwork(base.model), sites=["layer1.block_output@last"], intervention=partial(DAS, rank=2)
    )
    itrain.export(search, tmp_path / "das", base_model=base)
    code, out = said("export=das", "to=mib")
    assert code == 0 and out == "das-mib\n" and any(Path("das-mib").iterdir())
    code, out = said("export=das", "to=mib", "output=mine")
    assert code == 0 and out == "mine\n" and any(Path("mine").iterdir())


def test_all_kinds_of_training_are_pushed(hub: Hub) -> None:
    base = itrain.load_embedded()
    adapted = LoRAFinetuning(network=HookedNetwork(base.model, trainable=True), targets=["dense_h_to_4h"], rank=2)
    base = itrain.load_embedded()
    probes = itrain.ProbeTraining(
        network=HookedNetwork(base.model), sites=["layer1.block_output@last"], classes={"gender": 2}, control=False
    )
    own = itrain.load_embedded()
    trained = itrain.InterchangeInterventionTraining(
        network=HookedNetwork(own.model, trainable=True),
        sites=["layer1.block_output@last"],
        intervention=partial(itrain.FixedBlocks, blocks=2),
    )
    for name, training in {"lora": adapted, "probes": probes, "iit": trained}.items():
        weights = {key: value.clone() for key, value in training.exported.state_dict().items()}
        training.push_to_hub("alice/kinds", base_model=itrain.load_embedded(), subfolder=name)
        found = itrain.load("alice/kinds", subfolder=name)
        for key, value in found.exported.state_dict().items():
            torch.testing.assert_close(value, weights[key])
    assert list(list_exports("alice/kinds")) == ["iit", "lora", "probes"]


def test_a_run_is_pushed_with_its_figures_and_tested_from_the_hub(
    hub: Hub, said: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["fit", "recipe=das_gender", "output=runs", *SMALL]) == 0
    (run,) = Path("runs/das_gender").iterdir()
    capsys.readouterr()
    code, out = said(f"ckpt={run}", "to=hub", "repo=alice/das", "private=true", "output=again")
    assert code == 0 and out.splitlines()[-1].startswith(f"{hub.endpoint}/alice/das/commit/"), out
    repository = hub.repositories["alice/das"]
    files = repository.commits[repository.refs["main"]]
    assert set(files) == {".gitattributes", "README.md", CONFIG, WEIGHTS}
    metrics = json.loads((run / "metrics.json").read_text())
    figures = {name: value for name, value in metrics.items() if name.startswith("test/")}
    config = json.loads(files[CONFIG])
    assert {name: config["metrics"][name] for name in figures} == pytest.approx(figures)
    card = files["README.md"].decode()
    for part in ("random subspace", "full vector", "pairs whose label changes", "itrain test export=alice/das"):
        assert part in card
    monkeypatch.delenv("HF_TOKEN")
    assert main(["test", "export=alice/das", "output=tested"]) == 1
    refused = capsys.readouterr().err
    assert refused.startswith("itrain: export: there is no repository 'alice/das' on the hub, or it is private: log in")
    assert refused.count("\n") == 1
    monkeypatch.setenv("HF_TOKEN", ALICE)
    assert main(["test", "export=alice/das", "output=tested", "trainer.accelerator=cpu"]) == 0
    (tested,) = Path("tested").rglob("metrics.json")
    found = json.loads(tested.read_text())
    assert {name: found[name] for name in figures} == pytest.approx(figures)


@pytest.mark.slow
def test_a_process_finds_the_hub_by_its_environment(hub: Hub, steered: Path, tmp_path: Path) -> None:
    words = [f"export={steered}", "to=hub", "repo=alice/steered"]
    for token, said in ((None, "log in with `hf auth login`"), (ALICE, f"{hub.endpoint}/alice/steered/commit/")):
        done = subprocess.run(
            [sys.executable, "-m", "itrain", "export", *words],
            env=environment(hub, tmp_path / "home", token=token),
            capture_output=True,
            text=True,
        )
        assert said in (done.stdout if token else done.stderr), done.stderr
        assert (done.returncode == 0) == bool(token)
