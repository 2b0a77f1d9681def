"""Checkpoints and folders of runs: bound to a base model and a configuration, and data whoever wrote them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import itrain.models
from itrain.checkpoints import ORIGIN, read_checkpoint
from itrain.cli import main
from itrain.config import check, compose
from itrain.models import BaseModel, load_embedded
from itrain.networks.choose import make_network
from itrain.training.alignment import AlignmentSearch
from tests.canary import CANARY
from tests.canary import watched as watched
from tests.commands import SMALL
from tests.foreign import Runs

SUBMITIT = "hydra_plugins.hydra_submitit_launcher.config"
EVIL = {"_target_": "os.system", "command": "touch ran"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short fit's folder."""
    home = tmp_path_factory.mktemp("runs")
    words = ["recipe=das_gender", "intervention.rank=2", "trainer.max_epochs=1", *SMALL[1:], f"output={home}"]
    assert main(["fit", *words]) == 0
    (folder,) = [path.parent for path in home.rglob("metrics.json")]
    return folder


def refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with one line and leaves nothing."""
    before = sorted(Path().rglob("*"))
    assert main(words) in (1, 2)
    printed = capsys.readouterr()
    assert printed.err.startswith("itrain: ") and printed.err.count("\n") == 1, printed.err
    assert said in printed.err, printed.err
    assert [path for path in sorted(Path().rglob("*")) if path.name != "__pycache__"] == before


def call(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, "_partial_": True, **arguments}


# --- bound


def test_a_moved_checkpoint_is_tested_under_its_own_configuration(finished: Path) -> None:
    shutil.copy(finished / "checkpoints" / "last.ckpt", "moved.ckpt")
    assert main(["test", "ckpt=moved.ckpt", "output=again", "trainer.accelerator=cpu"]) == 0
    (again,) = Path("again").rglob("metrics.json")
    assert json.loads(again.read_text()) == json.loads((finished / "metrics.json").read_text())


def test_a_checkpoint_that_says_nothing_needs_a_recipe(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = read_checkpoint(finished / "checkpoints" / "last.ckpt")
    torch.save({key: value for key, value in saved.items() if key != ORIGIN}, "moved.ckpt")
    refused(["test", "ckpt=moved.ckpt"], "does not say how it was trained; add recipe=", capsys)
    assert "rank" not in compose(["ckpt=moved.ckpt", "recipe=das_gender"]).intervention


@pytest.mark.parametrize("verb", ["test", "export", "fit"])
def test_a_checkpoint_is_refused_on_other_weights(
    verb: str, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @wraps(load_embedded)
    def changed(**settings: Any) -> BaseModel:
        made = load_embedded(**settings)
        torch.nn.init.normal_(next(made.model.parameters()))
        return BaseModel(model=made.model, tokenizer=made.tokenizer, name=made.name)

    monkeypatch.setattr(itrain.models, "load_embedded", changed)
    refused([verb, f"ckpt={finished}", "output=out"], "was trained on a base model with the fingerprint", capsys)


def test_a_module_is_loaded_onto_its_base_model_alone(finished: Path) -> None:
    model = load_embedded().model
    found = AlignmentSearch.load_from_checkpoint(finished / "checkpoints" / "last.ckpt", network=make_network(model))
    assert found.arguments["sites"]
    torch.nn.init.normal_(next(model.parameters()))
    with pytest.raises(ValueError, match="this model has the fingerprint"):
        AlignmentSearch.load_from_checkpoint(finished / "checkpoints" / "last.ckpt", network=make_network(model))


def test_a_choice_of_trainer_says_where_a_run_goes_on_and_nothing_else(finished: Path) -> None:
    composed = compose([f"ckpt={finished}", "trainer=ddp_cpu", "intervention=das", "data=counterfactual"])
    check(composed)
    assert (composed.trainer.max_epochs, composed.trainer.strategy, composed.trainer.devices) == (1, "ddp", 2)
    assert composed.intervention.rank == 2
    assert composed.data.train_pairs == 64
    assert "rank" not in compose([f"ckpt={finished}", "intervention=mask"]).intervention


def test_a_run_goes_on_beside_the_one_it_continues_and_nowhere_else(finished: Path) -> None:
    assert Path(compose([f"ckpt={finished}"]).output) == finished.parents[1]
    shutil.copytree(finished, "copied")
    assert compose(["ckpt=copied"]).output == "outputs"


# --- what is in the file

PICKLES: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "a pickle in a zip": (lambda file: torch.save({"state_dict": {}, "x": Runs()}, file), "asks for code to be run"),
    "a pickle": (lambda file: file.write_bytes(pickle.dumps(Runs())), "cannot be read as a checkpoint"),
    "the older format": (
        lambda file: torch.save({"state_dict": {}, "x": Runs()}, file, _use_new_zipfile_serialization=False),
        "cannot be read as a checkpoint",
    ),
    "an empty file": (lambda file: file.touch(), "cannot be read as a checkpoint"),
    "a file cut off": (
        lambda file: (torch.save({"state_dict": {"a": torch.ones(999)}}, file), os.truncate(file, 999)),
        "cannot be read as a checkpoint",
    ),
    "a zip of something else": (lambda file: zipfile.ZipFile(file, "w").writestr("x", "y"), "cannot be read"),
    "a packed zip": (
        lambda file: zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED).writestr("a/data.pkl", bytes(10**6)), "is packed",
    ),
    "no weights": (lambda file: torch.save({"x": 1}, file), "has no weights under 'state_dict'"),
    "weights that are none": (lambda file: torch.save({"state_dict": {"a": 1}}, file), "has no weights under"),
    "a function that loads it": (
        lambda file: torch.save({"state_dict": {}, "hyper_parameters": {"_instantiator": f"{CANARY}.x"}}, file),
        "names a function that is to load it",
    ),
    "an origin that is none": (lambda file: torch.save({"state_dict": {}, ORIGIN: 3}, file), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("what", PICKLES)
def test_a_damaged_or_hostile_checkpoint_is_one_line(
    what: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, said = PICKLES[what]
    make(Path("last.ckpt"))
    for verb in ("test", "fit"):
        refused([verb, "ckpt=last.ckpt"], said, capsys)
    with pytest.raises(ValueError, match=said):
        AlignmentSearch.load_from_checkpoint("last.ckpt", network=None)


def test_sizes_are_bounded_by_the_weights_of_a_checkpoint(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configuration: Any = OmegaConf.load(finished / "config.yaml")
    configuration.training = {"_target_": "itrain.training.probing.ProbeTraining", "_partial_": True}
    configuration.training.probe = call("itrain.probes.MLPProbe", width=9_000_000)
    saved = read_checkpoint(finished / "checkpoints" / "last.ckpt")
    saved[ORIGIN]["configuration"] = OmegaConf.to_container(configuration)
    torch.save(saved, "last.ckpt")
    refused(["test", "ckpt=last.ckpt"], "far larger than its weights", capsys)


RUNS: Mapping[str, tuple[str, Any, str]] = {
    "a task": ("task", EVIL, "which no file may name"),
    "a module with a side effect": ("task", call(f"{CANARY}.Task"), f"'{CANARY}' is not trusted"),
    "a logger": ("logger", EVIL, "which no file may name"),
    "a logger that is none": ("logger", call("lightning.pytorch.callbacks.Timer"), "which is no logger"),
    "a logger elsewhere": ("logger", call("itrain.loggers.wandb.Wandb", save_dir="/x"), "logger.save_dir=<path>"),
    "a callback": ("trainer.callbacks", [EVIL], "which no file may name"),
    "a callback of a function": (
        "trainer.callbacks", [call("lightning.pytorch.callbacks.LambdaCallback", setup=EVIL)], "which no file may name",
    ),
    "a callback elsewhere": (
        "trainer.callbacks", [call("lightning.pytorch.callbacks.ModelCheckpoint", dirpath=".git")], "dirpath=<path>",
    ),
    "a profiler": ("trainer.profiler", call("lightning.pytorch.profilers.SimpleProfiler"), "is not trusted"),
    "a root": ("trainer.default_root_dir", "/x", "trainer.default_root_dir=<path>"),
    "a cache elsewhere": ("network.folder", "x", "network.folder=<path>"),
    "10^5 processes": ("trainer.devices", 100_000, "no file may ask for more than 256"),
    "10^5 workers": ("data.num_workers", 100_000, "no file may ask for more than 256"),
}  # fmt: skip


@pytest.mark.parametrize("where", ["in the checkpoint", "in the folder"])
@pytest.mark.parametrize("what", RUNS)
def test_a_fit_that_goes_on_names_and_writes_nothing_that_its_file_asks_for(
    what: str, where: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, value, said = RUNS[what]
    configuration = OmegaConf.load(finished / "config.yaml")
    OmegaConf.update(configuration, path, value, force_add=True)
    plain = OmegaConf.to_container(configuration)
    Path("run").mkdir()
    torch.save({"state_dict": {}, **({ORIGIN: {"configuration": plain}} if "check" in where else {})}, "run/last.ckpt")
    Path("run/config.yaml").write_text(OmegaConf.to_yaml(configuration))
    refused(["fit", "ckpt=run"], said, capsys)


YAML: Mapping[str, tuple[str, str]] = {
    "an object": ("task: !!python/object/apply:os.system ['touch ran']\n", "has the tag"),
    "aliases": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "has aliases"),
    "a tower": ("a: " + "[" * 5000, "too deep"),
    "half a line": ("a: [1,", "is damaged"),
    "no text": ("\xff\x00", "is damaged"),
    "a resolver": ("task: {_target_: x, a: '${oc.env:HOME}'}\n", "which no file may ask for"),
}


@pytest.mark.parametrize("what", YAML)
def test_the_yaml_of_a_folder_is_data(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, said = YAML[what]
    Path("run").mkdir()
    torch.save({"state_dict": {}}, "run/last.ckpt")
    Path("run/config.yaml").write_bytes(text.encode("latin-1"))
    refused(["fit", "ckpt=run"], said, capsys)


# --- sweeps


def sweep_in(folder: Path, **changes: Any) -> None:
    """The folder of a sweep, with groups changed."""
    (folder / "jobs").mkdir(parents=True)
    configuration: Any = compose(["recipe=das_vs_probe_gender"], sweeps=True)
    for key, value in changes.items():
        OmegaConf.update(configuration, key, value, force_add=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(configuration))


SWEEPS: Mapping[str, tuple[dict[str, Any], str]] = {
    "a launcher": ({"launcher": EVIL}, "a launcher can run any command"),
    "a launcher's commands": (
        {"launcher": {"_target_": f"{SUBMITIT}.LocalQueueConf", "setup": ["touch ran"]}},
        "a launcher can run any command",
    ),
    "a grid": ({"sweep._target_": "os.system"}, "which no file may name"),
    "a method": ({"sweep.methods.das": call(f"{CANARY}.X")}, f"'{CANARY}' is not trusted"),
    "a method that is none": ({"sweep.methods.das": call("itrain.sharing.load")}, "which is no part of the sweep"),
    "a method's name": ({"sweep.methods": {"../../x": call("itrain.interventions.das.DAS")}}, "no name of a method"),
    "a method that is built at once": (
        {"sweep.methods.das": {"_target_": "itrain.interventions.das.DAS", "_partial_": False}}, "no _partial_ call",
    ),
    "a launcher that is a list": ({"launcher": [EVIL]}, "a launcher can run any command"),
    "10^9 layers": ({"sweep.layers": [10**9]}, "no file may ask for more"),
    "a logger": ({"logger": {"_target_": "shutil.rmtree", "path": "."}}, "which no file may name"),
    "a reference to itself": ({"task": "${task}"}, "task"),
}  # fmt: skip


@pytest.mark.parametrize("what", SWEEPS)
def test_a_sweep_that_goes_on_runs_nothing_that_its_file_names(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes, said = SWEEPS[what]
    sweep_in(Path("swept"), **changes)
    refused(["sweep", "resume=swept"], said, capsys)


def test_a_sweep_writes_into_its_own_folder_only(capsys: pytest.CaptureFixture[str]) -> None:
    sweep_in(Path("swept"))
    Path("precious").write_text("kept")
    Path("swept/report.html").symlink_to("../precious")
    refused(["sweep", "resume=swept"], "is a link", capsys)
    assert Path("precious").read_text() == "kept"


def test_a_fit_is_not_resumed_as_a_sweep(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["sweep", f"resume={finished}"], "is the folder of a fit; to go on: itrain fit ckpt=", capsys)


def test_a_sweep_of_one_s_own_task_goes_on_when_it_is_trusted() -> None:
    from itrain.config import of_folder

    sweep_in(Path("swept"), task={"_target_": "tests.planted.Bits"})
    with pytest.raises(itrain.config.ConfigError, match="'tests' is not trusted"):
        of_folder(Path("swept"))
    found = of_folder(Path("swept"), ["trust=[tests]", "launcher=joblib", "launcher.n_jobs=2"])
    assert found.task._target_ == "tests.planted.Bits" and found.launcher.n_jobs == 2
