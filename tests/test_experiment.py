"""Whole runs through the command line: what they leave behind, how they end, and what they refuse."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import itrain
from itrain.cli import main
from itrain.models import load_embedded
from tests.commands import SMALL, heed_interrupts, only_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> int:
    verb, *rest = words
    return main([verb, *SMALL, *rest])


def command(*words: str) -> list[str]:
    verb, *rest = words
    return [sys.executable, "-m", "itrain", verb, *SMALL, *rest]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# --- a run and what it leaves behind


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert (
        main(["fit", "recipe=das_gender", f"output={folder}", *SMALL, "trainer.max_epochs=6", "data.train_pairs=256"])
        == 0
    )
    return only_run(folder)


def test_a_run_leaves_what_it_was_and_what_it_found(finished: Path) -> None:
    # Lightning 2.5 adds a file of hyperparameters, even where there are none.
    assert {path.name for path in finished.iterdir()} - {"hparams.yaml"} == {
        "config.yaml", "metrics.csv", "metrics.json", "figure.png", "figure.svg", "checkpoints", "export",
    }  # fmt: skip
    results = json.loads((finished / "metrics.json").read_text())
    assert results["model/accuracy"] > 0.95
    assert results["test/iia_pairwise"] > 0.9
    assert results["test/random_subspace/iia_changing_pairwise"] < 0.1
    rows = list(csv.DictReader((finished / "metrics.csv").read_text().splitlines()))
    assert sum(bool(row["train/loss"]) for row in rows) == 6 * 8
    assert sum(bool(row["validation/iia_pairwise"]) for row in rows) == 6


def test_a_checkpoint_holds_no_base_weights(finished: Path) -> None:
    saved = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(name.startswith("interchange.") or name == "fitted" for name in saved["state_dict"])
    assert (finished / "checkpoints" / "last.ckpt").stat().st_size < 50_000


def test_a_loaded_export_reproduces_the_reported_figures(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reported = json.loads((finished / "metrics.json").read_text())
    assert main(["test", f"export={finished / 'export'}", "output=again"]) == 0
    again = json.loads((only_run(Path("again")) / "metrics.json").read_text())
    assert again == reported
    search = itrain.load(finished / "export")
    assert itrain.load(finished / "export", load_embedded().model).sites == search.sites
    assert itrain.sharing.read_config(finished / "export")["metrics"] == reported


def test_a_checkpoint_reproduces_the_reported_figures(finished: Path) -> None:
    assert main(["test", f"ckpt={finished}", "output=again"]) == 0
    again = json.loads((only_run(Path("again")) / "metrics.json").read_text())
    assert again == json.loads((finished / "metrics.json").read_text())


def test_export_writes_the_weights_of_a_checkpoint(finished: Path) -> None:
    assert main(["export", f"ckpt={finished}", "output=again"]) == 0
    written = only_run(Path("again")) / "export" / "intervention.safetensors"
    assert written.read_bytes() == (finished / "export" / "intervention.safetensors").read_bytes()


def test_the_probe_reads_where_the_swap_changes_nothing() -> None:
    """The paper's point: a probe finds the variable at a token that the model does not use it from."""
    same = ["site.layer=4", "site.position=verb", "task.templates=simple"]
    more = ["trainer.max_epochs=10", "data.train_pairs=1024", "data.test_pairs=256"]
    for recipe in ("probe_gender", "das_gender"):
        assert main(["fit", f"recipe={recipe}", *SMALL, *more, *same, f"output={recipe}"]) == 0
    probe = json.loads((only_run(Path("probe_gender")) / "metrics.json").read_text())
    swap = json.loads((only_run(Path("das_gender")) / "metrics.json").read_text())
    assert probe["test/probe_accuracy"] >= 0.95
    assert swap["test/iia_changing_pairwise"] < 0.2


@pytest.mark.parametrize("intervention", ["full_rotation", "full_vector", "mean", "zero", "random_subspace"])
def test_other_interventions_run_on_the_same_recipe(intervention: str) -> None:
    assert run("fit", "recipe=das_gender", f"intervention={intervention}") == 0
    folder = only_run(Path("outputs"))
    assert (folder / "export" / "intervention.safetensors").is_file()
    assert (folder / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen2"])
def test_a_model_saved_in_a_folder_runs_the_same_recipe(model_type: str) -> None:
    torch.manual_seed(0)
    tokenizer = load_embedded().tokenizer
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4}
    config = AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    tokenizer.save_pretrained("model")
    assert run("fit", "recipe=das_gender", "model=hf", "model.name=model", "data.keep=all") == 0
    exported = json.loads((only_run(Path("outputs")) / "export" / "intervention_config.json").read_text())
    assert exported["base_model"]["type"] == model_type


def test_the_ways_to_run_the_model_find_the_same() -> None:
    """Replay, plain hooks, and replay from files beyond a budget that has no room for what is kept."""
    ways = {"replay": [], "hooks": ["network.replay=off"], "files": ["network.budget_gib=0.0001"]}
    found = {}
    for name, words in ways.items():
        assert run("fit", "recipe=das_gender", f"output={name}", *words) == 0
        folder = only_run(Path(name))
        assert not [path for path in folder.iterdir() if path.name.startswith("kept")]
        found[name] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name in ("hooks", "files"):
        for key, weight in found["replay"].items():
            torch.testing.assert_close(found[name][key], weight, atol=1e-4, rtol=1e-4)


# --- how runs end


def fit_in_a_process(*words: str, until: str) -> subprocess.Popen[bytes]:
    """Start a fit and wait until its metrics say that it is at work."""
    with Path("log").open("w") as log:
        process = subprocess.Popen(
            command("fit", "recipe=das_gender", *words),
            env=environment(),
            stdout=log,
            stderr=log,
            preexec_fn=heed_interrupts,
        )
    for _ in range(600):
        if list(Path("outputs").rglob(until)):
            return process
        assert process.poll() is None, Path("log").read_text()
        time.sleep(0.1)
    process.kill()
    raise AssertionError("the fit did not start")


LONG = ["trainer.max_epochs=40", "data.train_pairs=128"]


def test_a_killed_run_resumes_to_the_same_weights() -> None:
    process = fit_in_a_process(*LONG, until="last.ckpt")
    time.sleep(0.7)  # somewhere within an epoch
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = only_run(Path("outputs"))
    assert not (killed / "metrics.json").exists()
    assert run("fit", f"ckpt={killed}", "output=resumed", *LONG) == 0
    assert run("fit", "recipe=das_gender", "output=whole", *LONG) == 0
    resumed, whole = (
        torch.load(only_run(Path(name)) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("resumed", "whole")
    )
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_ctrl_c_keeps_the_last_checkpoint_and_says_how_to_go_on() -> None:
    process = fit_in_a_process("trainer.max_epochs=4000", until="last.ckpt")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    output = Path("log").read_text()
    assert "to go on: itrain fit ckpt=" in " ".join(output.split())
    assert "Traceback" not in output
    torch.load(only_run(Path("outputs")) / "checkpoints" / "last.ckpt", weights_only=True)


# --- what runs refuse: one line, an exit code, nothing left behind

UNKNOWN_NAMES = "[John,James,Robert,Michael,Bartholomew]"
BAD = {
    "unknown recipe": (["recipe=das_gendr"], 2, "das_gender"),
    "mistyped key": (["recipe=das_gender", "trainer.max_epoch=3"], 2, "max_epochs"),
    "wrong type": (["recipe=das_gender", "intervention.rank=many"], 2, "intervention.rank"),
    "layer out of range": (["recipe=das_gender", "site.layer=12"], 1, "layers 0-5"),
    "unknown component": (["recipe=das_gender", "site.component=mlp_outptu"], 1, "mlp_output"),
    "position past the end": (["recipe=das_gender", "site.position=30"], 1, "position '30' does not exist in example"),
    "unknown name": (["recipe=das_gender", f"task.male_names={UNKNOWN_NAMES}"], 1, "'Bartholomew' is not in the"),
    "model folder without weights": (["recipe=das_gender", "model=hf", "model.name=empty"], 1, "'empty'"),
    "rank larger than hidden size": (["recipe=das_gender", "intervention.rank=500"], 1, "rank 500"),
    "empty pair set": (["recipe=das_gender", "data.train_pairs=0"], 1, "data.train_pairs"),
    "zero epochs": (["recipe=das_gender", "trainer.max_epochs=0"], 1, "trainer.max_epochs=0"),
    "unwritable output folder": (["recipe=das_gender", "output=file/outputs"], 2, "file/outputs"),
    "unknown verb": (None, 2, "fit"),
    "no label changes": (["recipe=das_gender", "task.changing=0.0"], 1, "label change"),
    "site that cannot reach the label": (["recipe=das_gender", "site.layer=5"], 1, "layer5.block_output@name"),
    "missing checkpoint": (["recipe=das_gender", "ckpt=gone.ckpt"], 2, "gone.ckpt"),
    "replay of what cannot be replayed": (
        ["recipe=das_gender", "network.replay=on", "site=module:gpt_neox.embed_in.output@name"],
        1,
        "lies outside the blocks",
    ),
    "no such folder": (["recipe=das_gender", "model=hf", "model.name=./gone"], 1, "./gone"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gives_one_clear_line_and_leaves_nothing(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, code, named = BAD[what]
    Path("empty").mkdir()
    Path("empty/config.json").write_text('{"model_type": "gpt2"}')
    Path("file").write_text("")
    arguments = ["fti", "recipe=das_gender"] if words is None else ["fit", *SMALL, *words]
    assert main(arguments) == code
    error = capsys.readouterr().err.strip()
    message = error.splitlines()[-1]
    assert message.startswith("itrain: ") and named in message, error
    assert "Traceback" not in error
    assert sorted(path.name for path in Path().iterdir()) == ["empty", "file"]


def test_a_hub_model_out_of_reach_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("fit", "recipe=das_gender_pythia") == 1
    assert "model 'EleutherAI/pythia-70m' is not in the cache" in capsys.readouterr().err.splitlines()[-1]
