"""Checkpoints that somebody has tampered with: they remove, serve, send and allocate nothing, and end in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
import torch

from itrain.checkpoints import forget_foreign_files
from itrain.cli import main
from itrain.config.saved import configuration_of_sweep, last_checkpoint
from itrain.files import finite
from itrain.results.table import RESULTS, read_results
from itrain.signatures import ConfigError
from itrain.trust import TrustError, find
from tests.commands import SMALL

LIGHTNING = "lightning.pytorch"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a short fit."""
    home = tmp_path_factory.mktemp("runs")
    assert main(["fit", "recipe=das_gender", "trainer.max_epochs=1", *SMALL[1:], f"output={home}"]) == 0
    (file,) = home.rglob("last.ckpt")
    return file


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tampered(finished: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    saved = torch.load(finished, weights_only=True)
    edit(saved)
    folder = Path("strange")
    folder.mkdir()
    torch.save(saved, folder / "last.ckpt")
    return folder / "last.ckpt"


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a key of the configuration."""

    def edit(saved: dict[str, Any]) -> None:
        node = saved["origin"]["configuration"]
        *groups, last = path.split(".")
        for group in groups:
            node = node[group]
        node[last] = value

    return edit


def call(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"{LIGHTNING}.{target}", **arguments}


def grow(reference: str) -> Callable[[dict[str, Any]], None]:
    """Texts that are each four times the one before."""

    def edit(saved: dict[str, Any]) -> None:
        task = saved["origin"]["configuration"]["task"]
        if "templates" in reference:
            task["templates"] = ["x" * 100, *(reference.format(number) * 4 for number in range(30))]
        else:
            task |= {"a0": "x" * 100, **{f"a{number + 1}": reference.format(number) * 4 for number in range(30)}}

    return edit


def _largest(saved: dict[str, Any]) -> list[str]:
    weights = saved["state_dict"]
    return [max(weights, key=lambda name: weights[name].numel())]


REFUSED: Mapping[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "references into a list": (grow("${{task.templates.{}}}"), "which is no plain value"),
    "references from beside": (grow("${{.a{}}}"), "which is no plain value"),
    "devices as text": (put("trainer.devices", "1000"), "no file may ask for more than 256"),
    "a logger that sends": (put("logger", call("loggers.MLFlowLogger", tracking_uri="http://x")), "add trust="),
    "a logger with settings": (put("logger", call("loggers.WandbLogger", settings={})), "'lightning' is not trusted"),
    "a callback that serves": (
        put("trainer.callbacks", [call("serve.servable_module_validator.ServableModuleValidator")]), "is not trusted",
    ),
    "a callback that writes": (
        put("trainer.callbacks", [call("callbacks.SpikeDetection", exclude_batches_path="x")]), "is not trusted",
    ),
    "a method as a trainer": (
        put("trainer._target_", f"{LIGHTNING}.cli.LightningCLI.instantiate_trainer"), "is not trusted",
    ),
    "an attribute that is no function": (put("task._target_", "itrain.inputs.batch.ModelInputs.keys"), "is no task"),
    "a wide field": (put("task.templates", ["{name:>90000000} ran"]), "as wide as it likes"),
    "a field as wide as another says": (put("task.templates", ["{name:>{verb}} ran"]), "as wide as it likes"),
    "a large network": (
        put("model", {"_target_": "itrain.tasks.hierarchical_equality.mlp", "hidden_size": 60_000}), "far larger",
    ),
    "a name of two lines": (put("name", "a\nb"), "control characters"),
    "a name of 5000 letters": (put("name", "a" * 5000), "too long"),
    "an early version": (lambda saved: saved.update({"pytorch-lightning_version": "0.0.1"}), "older than itrain"),
    "a version that is none": (lambda saved: saved.update({"pytorch-lightning_version": "x"}), "is damaged"),
    "callbacks that are a list": (lambda saved: saved.update(callbacks=[1]), "its callbacks are no mapping"),
    "a weight of 10^9": (
        lambda saved: saved["state_dict"].update(dict.fromkeys(_largest(saved), torch.zeros(1).expand(10**9))),
        "does not fit AlignmentSearch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_tampered_checkpoint_is_refused_in_one_line(
    what: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, said = REFUSED[what]
    file = tampered(finished, edit)
    assert main(["fit", f"ckpt={file}", "output=out"]) in (1, 2)
    told = capsys.readouterr().err
    assert told.startswith("itrain: ") and told.count("\n") == 1 and said in told, told
    assert not Path("out").exists()


def test_a_resumed_fit_removes_nothing_that_a_checkpoint_names(finished: Path, tmp_path: Path) -> None:
    """Lightning removes the checkpoint before the new one, a folder too, where the checkpoint says that it is."""
    kept = tmp_path / "kept" / "file"
    kept.parent.mkdir()
    kept.touch()

    def edit(saved: dict[str, Any]) -> None:
        put("trainer.max_epochs", 2)(saved)
        for name, state in saved["callbacks"].items():
            if name.startswith("ModelCheckpoint"):
                state["best_model_path"] = f"local://{kept.parent}"

    assert main(["fit", f"ckpt={tampered(finished, edit)}", "output=out"]) == 0
    assert kept.exists()


def test_only_plain_paths_are_kept_of_what_callbacks_keep() -> None:
    states = {"best_model_path": "/a/b.ckpt", "last_model_path": "x::y", "best_k_models": {"/a/../b": 1.0, "/a/c": 2.0}}
    checkpoint: dict[str, Any] = {"callbacks": {"a": states, "b": None}}
    forget_foreign_files(checkpoint)
    assert checkpoint["callbacks"]["a"] == {
        "best_model_path": "/a/b.ckpt",
        "last_model_path": "",
        "best_k_models": {"/a/c": 2.0},
    }


def test_the_rest_of_lightning_is_there_for_those_who_trust_it() -> None:
    import lightning
    from lightning.pytorch.callbacks import SpikeDetection

    kinds, path = (lightning.Callback,), f"{LIGHTNING}.callbacks.SpikeDetection"
    with pytest.raises(TrustError, match="'lightning' is not trusted"):
        find(path, kinds, role="callback", trust=[], place="'x'")
    assert find(path, kinds, role="callback", trust=["lightning"], place="'x'") is SpikeDetection


def test_a_link_to_nowhere_is_no_checkpoint(finished: Path) -> None:
    folder = Path("run")
    folder.mkdir()
    (folder / "x.ckpt").symlink_to("nowhere")
    assert last_checkpoint(folder) is None
    (folder / "last.ckpt").write_bytes(finished.read_bytes())
    assert last_checkpoint(folder) == folder / "last.ckpt"


def test_a_link_deep_in_a_sweep_is_refused() -> None:
    deep = Path("sweep", "jobs", "0")
    deep.mkdir(parents=True)
    (deep / "link").symlink_to("/tmp")
    Path("sweep", "config.yaml").touch()
    with pytest.raises(ConfigError, match="link' is a link"):
        configuration_of_sweep(Path("sweep"), [], [])


@pytest.mark.parametrize(
    "link",
    [
        "wandb",
        "wandb/latest-run",
        "wandb/run-1-a/logs/other.log",
        "wandb/run-1-a/debug-core.log",
        "jobs/logs/debug-core.log",
        "jobs/wandb/latest-run",
    ],
)
def test_only_links_that_wandb_makes_may_lie_in_a_sweep(link: str) -> None:
    place = Path("sweep", link)
    place.parent.mkdir(parents=True)
    place.symlink_to("/tmp")
    Path("sweep", "config.yaml").touch()
    with pytest.raises(ConfigError, match="is a link"):
        configuration_of_sweep(Path("sweep"), [], [])


@pytest.mark.parametrize("text", ["epoch,step\n0,x\n", "epoch\n0\n", "step\n" + "0" * 200_000 + "\n", "step\n0,1\n"])
def test_damaged_metrics_beside_a_checkpoint_are_named(
    text: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tampered(finished, put("trainer.max_epochs", 2))
    (file.parent / "metrics.csv").write_text(text)
    assert main(["fit", f"ckpt={file}", "output=out"]) == 1
    told = capsys.readouterr().err
    assert "metrics.csv' is damaged" in told and told.count("\n") == 1, told


def test_figures_that_are_not_finite_are_null_in_json() -> None:
    figures = finite({"a": 0.5, "b": float("nan"), "c": -float("inf")})
    assert json.loads(json.dumps(figures, allow_nan=False)) == {"a": 0.5, "b": None, "c": None}


def test_a_small_file_with_a_table_without_end_is_refused() -> None:
    column = pandas.DataFrame({"step": numpy.zeros(10_000_000, dtype=numpy.int8)})
    pandas.concat([column.rename(columns=lambda _, n=n: f"c{n}") for n in range(11)], axis=1).to_parquet(RESULTS)
    with pytest.raises(ValueError, match="10000000 rows, and is not one of itrain's"):
        read_results(Path())
