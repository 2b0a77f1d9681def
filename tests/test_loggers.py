"""Loggers: what a fit and a sweep leave with each, read back from the files of the real clients, offline."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas
import pytest
import wandb
from hydra.utils import get_object
from omegaconf import OmegaConf

from itrain.cli import main
from itrain.loggers.trackio import Trackio
from itrain.results.table import read_curves, read_results
from tests.commands import SMALL

ROOT = Path(__file__).parents[1]
SWEEP = [
    "sweep",
    "recipe=das_vs_probe_gender",
    *SMALL,
    "sweep.methods=[das,probing,full_vector]",
    "sweep.layers=[2]",
    "sweep.positions=[name,connective]",
    "sweep.ranks=[2]",
]
FITS = 6


def only_run(folder: Path) -> Path:
    (found,) = [path.parent for path in folder.rglob("config.yaml")]
    return found


@cache
def wandb_runs(folder: Path) -> list[dict[str, Any]]:
    """What the run files of W&B say: who a run is, its config, summary and history, and the folder of its media."""
    return [read_run(file) for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"))]


def read_run(file: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    run: dict[str, Any] = {"config": {}, "summary": {}, "history": [], "files": file.parent / "files"}
    for record in map(json.loads, told.stdout.splitlines()):
        if record["type"] == "run":
            run = {**record["run"], **run, "config": record["run"]["config"]["update"]}
        elif record["type"] == "config":
            run["config"] |= record["config"]["update"]
        elif record["type"] == "summary":
            run["summary"] |= record["summary"]["update"]
        elif record["type"] == "history":
            run["history"].append(record["history"]["item"])
    del run["config"]["_wandb"]
    return run


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    assert main([*SWEEP, f"output={folder}", "logger=wandb", "logger.offline=true"]) == 0
    return only_run(folder)


def test_a_sweep_is_a_group_with_a_run_for_each_fit(swept: Path) -> None:
    runs = [run for run in wandb_runs(swept) if run["job_type"] == "fit"]
    assert {run["run_group"] for run in runs} == {f"das_vs_probe_gender {swept.name}"}
    assert len({run["run_id"] for run in runs}) == len(runs) == FITS
    rows = read_results(swept).drop(columns=["flag"]).to_dict("records")
    settings = [name for name in rows[0] if name in runs[0]["config"]]
    assert {"method", "layer", "component", "position", "rank", "seed", "command"} <= set(settings)
    by_command = {run["config"]["command"]: run for run in runs}
    for row in rows:
        run = by_command[row["command"]]
        assert {name: value for name, value in run["config"].items() if name in ("method", "layer", "position")} == {
            name: row[name] for name in ("method", "layer", "position")
        }
        figures = {name: value for name, value in row.items() if name not in settings and pandas.notna(value)}
        assert figures and {name: run["summary"][name] for name in figures} == pytest.approx(figures)


def test_what_was_trained_in_a_sweep_has_a_curve(swept: Path) -> None:
    curves = read_curves(swept)
    assert curves.groupby(["method", "position"]).epoch.agg(list).to_dict() == {
        ("das", "connective"): [0, 1],
        ("das", "name"): [0, 1],
    }
    runs = {run["display_name"]: run for run in wandb_runs(swept)}
    logged = runs["das layer2.block_output@name rank2 seed0"]["history"]
    at_name = curves[curves.position == "name"]
    for figure in ("epoch", "validation/loss", "validation/iia_changing_pairwise"):
        assert [epoch[figure] for epoch in logged] == pytest.approx(at_name[figure].tolist()), figure
    assert at_name["validation/loss"].is_monotonic_decreasing
    assert runs["full_vector layer2.block_output@name seed0"]["history"] == []


def test_a_sweep_s_results_are_a_table_and_pictures(swept: Path) -> None:
    (run,) = [run for run in wandb_runs(swept) if run["job_type"] == "results"]
    table = json.loads((run["files"] / run["summary"]["results.path"]).read_text())
    frame = read_results(swept)
    assert table["columns"] == list(frame.columns) and len(table["data"]) == FITS
    shown = pandas.DataFrame(table["data"], columns=table["columns"])
    assert shown.command.tolist() == frame.command.tolist()
    for key in ("heat_maps", "iia_maps", "probe_maps", "difference_maps"):
        picture = run["files"] / run["summary"][f"{key}.path"]
        assert picture.read_bytes().startswith(b"\x89PNG"), key
    assert (run["files"] / run["summary"]["heat_maps.path"]).read_bytes() == (swept / "heat_maps.png").read_bytes()


def test_a_sweep_that_goes_on_logs_nothing_twice(swept: Path, tmp_path: Path) -> None:
    folder = tmp_path / swept.parent.name / swept.name
    shutil.copytree(swept, folder, ignore=shutil.ignore_patterns("wandb", "results.parquet"))
    lines = (folder / "logged.txt").read_text().splitlines()
    (folder / "logged.txt").write_text("\n".join(lines[1:]) + "\n")
    assert main(["sweep", f"resume={folder}"]) == 0
    assert [run["run_id"] for run in wandb_runs(folder)] == lines[:1]
    assert sorted((folder / "logged.txt").read_text().split()) == sorted(lines)


def test_a_fit_leaves_its_configuration_and_figures_with_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning sets it, and so it is put back.
    monkeypatch.setenv("WANDB_MODE", "online")
    opened, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **settings: opened.append(init(**settings)) or opened[-1])
    words = ["fit", "recipe=das_gender", *SMALL, f"output={tmp_path}", "logger=wandb", "logger.offline=true"]
    assert main(words) == 0
    # The run of a fit is open until its process ends, or until here.
    opened.pop().finish()
    assert not opened
    folder = only_run(tmp_path)
    (run,) = wandb_runs(folder)
    assert run["config"] == OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    found = json.loads((folder / "metrics.json").read_text())
    for figure in ("test/iia_argmax", "test/random_subspace/iia_argmax"):
        assert run["summary"][figure] == pytest.approx(found[figure])
    assert {"train/loss", "validation/iia_argmax"} <= set().union(*run["history"])
    assert (folder / "metrics.csv").is_file()


def test_tensorboard_has_a_run_for_each_fit(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    assert main([*SWEEP, "sweep.positions=[name]", f"output={tmp_path}", "logger=tensorboard"]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = only_run(tmp_path) / "tensorboard"
    assert len(list(folder.iterdir())) == 4
    fit = EventAccumulator(str(folder / "das layer2.block_output@name rank2 seed0")).Reload()
    assert len(fit.Scalars("validation/loss")) == 2 and len(fit.Scalars("iia_changing_pairwise")) == 1
    assert EventAccumulator(str(folder / "results")).Reload().Images("heat_maps")


def test_trackio_has_a_run_for_each_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("trackio") is None:
        pytest.skip("the extra 'trackio' is not installed")
    words = [*SWEEP, "sweep.positions=[name]", f"output={tmp_path}", "logger=trackio"]
    # trackio reads it when it is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "t"))
    assert main(words) == 0
    base = sqlite3.connect(tmp_path / "t" / "itrain.db")
    configs = {name: json.loads(config) for name, config in base.execute("select run_name, config from configs")}
    group = f"das_vs_probe_gender {only_run(tmp_path).name}"
    das = configs[f"{group} das layer2.block_output@name rank2 seed0"]
    assert das["method"] == "das" and das["rank"] == 2 and das["_Group"] == group
    logged = base.execute("select metrics from metrics where run_name like '%das layer2%'").fetchall()
    assert len(logged) == 3 and "iia_changing_pairwise" in json.loads(logged[-1][0])
    assert list((tmp_path / "t").rglob("*.png"))
    logger = Trackio(project="itrain", name="alone")
    logger.log_hyperparams({"seed": 3})
    logger.log_metrics({"loss": 0.5}, step=7)
    logger.experiment.finish()
    alone = "select step, metrics from metrics where run_name = 'alone'"
    assert base.execute(alone).fetchall() == [(7, b'{"loss":0.5}')]
    assert json.loads(base.execute("select config from configs where run_name = 'alone'").fetchone()[0])["seed"] == 3
    base.close()


@pytest.mark.parametrize("package", ["tensorboard", "trackio"])
def test_a_missing_package_is_told_in_a_line(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("itrain.loggers.base.find_spec", lambda name: None)
    assert main([*SWEEP, f"output={tmp_path}", f"logger={package}"]) == 1
    told = capsys.readouterr().err
    assert told.endswith(f"pip install {package}\n") and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_an_account_wandb_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "login", refuse)
    assert main(["fit", "recipe=das_gender", *SMALL, f"output={tmp_path}", "logger=wandb"]) == 1
    assert "logger.offline=true" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["logger=wandb", "logger.offlin=true"], "did you mean 'logger.offline'?"),
        (["logger=wandb", "logger.tag=[a]"], "did you mean 'logger.tags'?"),
        (["logger=trackio", "logger.projekt=mine"], "did you mean 'logger.project'?"),
        (["logger=tensorbord"], "did you mean 'tensorboard'?"),
    ],
)
def test_a_wrong_key_of_a_logger_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "recipe=das_gender", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_logger_of_single_fits_is_refused_by_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["++logger._target_=lightning.pytorch.loggers.CSVLogger", f"++logger.save_dir={tmp_path}"]
    assert main([*SWEEP, f"output={tmp_path}", *words]) == 1
    assert "CSVLogger takes single fits only; a sweep takes wandb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("earlier", "home"),
    [
        ("itrain.reports.wandb.Wandb", "itrain.loggers.wandb"),
        ("itrain.reports.tensorboard.TensorBoard", "itrain.loggers.tensorboard"),
        ("itrain.reports.trackio.Trackio", "itrain.loggers.trackio"),
        ("itrain.sweeps.results.read_results", "itrain.results.table"),
        ("itrain.read_results", "itrain.results.table"),
    ],
)
def test_earlier_paths_lead_to_the_same(earlier: str, home: str) -> None:
    found = get_object(earlier)
    assert found.__module__ == home and get_object(f"{home}.{found.__name__}") is found


def test_a_configuration_may_name_a_logger_by_its_earlier_path(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    words = ["logger=tensorboard", "logger._target_=itrain.reports.tensorboard.TensorBoard"]
    assert main(["fit", "recipe=das_gender", *SMALL, f"output={tmp_path}", *words]) == 0
    assert list((only_run(tmp_path) / "tensorboard").glob("events.out.tfevents*"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces")
def test_the_dashboard_of_a_sweep_is_valid(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra 'dashboards' is not installed")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from wandb_workspace import workspace
    from wandb_workspaces.reports.v2 import LinePlot

    # What is sent to the server, by the package's own model of it.
    spec = json.loads(workspace("a b", entity="anyone", project="itrain")._to_model().model_dump_json(by_alias=True))
    panels = [panel for each in spec["spec"]["section"]["panelBankConfig"]["sections"] for panel in each["panels"]]
    media = {key for panel in panels for key in panel["config"].get("mediaKeys") or []}
    plotted = {key for panel in panels for key in panel["config"].get("metrics") or []}
    logged = {key.removesuffix(".path") for run in wandb_runs(swept) for key in run["summary"]}
    assert {"iia_maps", "probe_maps", "difference_maps"} <= media <= logged
    assert {"validation/loss", "iia_changing_pairwise"} <= plotted <= logged
    with pytest.raises(ValueError, match="titel"):
        LinePlot(titel="a typo")  # type: ignore[call-arg]
