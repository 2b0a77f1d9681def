"""Loggers: what a fit and a sweep leave with each, read back from the files of the real clients, offline."""

from __future__ import annotations

import json
import os
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
from itrain.loggers.runs import figure_name, identify_run, shortened
from itrain.loggers.trackio import Trackio
from itrain.results.columns import TOKENS
from itrain.results.table import read_curves, read_results
from tests.commands import SMALL, only_run

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
ROOT = Path(__file__).parents[1]
METHODS = {"das": " r2", "probing": "", "full_vector": ""}
"""The end of the names of each method's runs."""


@cache
def wandb_runs(folder: Path) -> list[dict[str, Any]]:
    """What the run files of W&B say: who a run is, its config, summary and history, and the folder of its media."""
    return [read_run(file) for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"))]


def read_run(file: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    run: dict[str, Any] = {"config": {}, "summary": {}, "history": [], "artifacts": {}, "axes": {}, "described": {}}
    run["files"] = file.parent / "files"
    for record in map(json.loads, told.stdout.splitlines()):
        if record["type"] == "run":
            run = {**record["run"], **run, "config": record["run"]["config"]["update"]}
        elif record["type"] == "config":
            run["config"] |= record["config"]["update"]
        elif record["type"] == "summary":
            run["summary"] |= record["summary"]["update"]
        elif record["type"] == "history":
            run["history"].append(record["history"]["item"])
        elif record["type"] == "metric" and (axis := record["metric"].get("step_metric")):
            run["axes"][record["metric"].get("name") or record["metric"]["glob_name"]] = axis
        elif record["type"] == "artifact":
            found = record["artifact"]
            run["artifacts"][found["type"]] = {each["path"] for each in found["manifest"]["contents"]}
            run["described"][found["type"]] = found.get("description"), found.get("metadata")
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
    rows = read_results(swept).drop(columns=["flag", *TOKENS], errors="ignore").to_dict("records")
    settings = ["method", "component", "layer", "position", "rank", "seed", "window", "command", "features"]
    by_command = {run["config"]["command"]: run for run in runs}
    for row in rows:
        run = by_command[row["command"]]
        found = {name: run["config"][name] for name in settings if run["config"].get(name) is not None}
        assert found == {name: row[name] for name in settings if pandas.notna(row[name])}
        figures = {
            figure_name(name): value for name, value in row.items() if name not in settings and pandas.notna(value)
        }
        assert figures and {name: run["summary"][name] for name in figures} == pytest.approx(figures)


def test_every_run_has_the_whole_configuration(swept: Path) -> None:
    """That of a fit of a sweep is what its command would compose alone."""
    whole = OmegaConf.to_container(OmegaConf.load(swept / "config.yaml"), resolve=True)
    assert isinstance(whole, dict)
    for run in wandb_runs(swept):
        config = run["config"]
        shared = ("model", "network", "task", "data", "trainer", "name", "output")
        assert {name: config[name] for name in shared} == {name: whole[name] for name in shared}
        assert config["trainer"]["max_epochs"] == 2
        assert set(config["versions"]) >= {"python", "itrain", "torch", "lightning", "transformers"}
        if run["job_type"] == "results":
            assert config["sweep"]["ranks"] == [2] and config["training"] == whole["training"]
            continue
        assert config["sweep"] is None and config["site"]["position"] == config["position"]
        part = "training" if config["method"] == "probing" else "intervention"
        rank = {"rank": 2} if config["method"] == "das" else {}
        assert config[part] == whole["sweep"]["methods"][config["method"]] | rank
        assert config["training"]["optimizer"]["lr"] == 0.01


def test_names_and_tags_tell_runs_apart(swept: Path) -> None:
    runs = {run["display_name"]: run for run in wandb_runs(swept)}
    sites = ("name", "connective")
    fits = {f"{method} 2@{site}{rank} s0" for method, rank in METHODS.items() for site in sites}
    results = f"das_vs_probe_gender {swept.name} results"
    assert set(runs) == {*fits, results}
    assert runs["das 2@name r2 s0"]["tags"] == [
        "das", "layer2.block_output@name", "rank 2", "seed 0", "das_vs_probe_gender", "sweep",
    ]  # fmt: skip
    assert {"sweep", "results", "das", "probing"} <= set(runs[results]["tags"])


def test_what_was_trained_in_a_sweep_has_a_curve(swept: Path) -> None:
    curves = read_curves(swept)
    assert curves.groupby(["method", "position"]).epoch.agg(list).to_dict() == {
        ("das", "connective"): [0, 1],
        ("das", "name"): [0, 1],
    }
    runs = {run["display_name"]: run for run in wandb_runs(swept)}
    logged = runs["das 2@name r2 s0"]["history"]
    at_name = curves[curves.position == "name"]
    for figure in ("epoch", "validation/loss", "validation/iia_changing_pairwise"):
        assert [epoch[figure] for epoch in logged] == pytest.approx(at_name[figure].tolist()), figure
    assert at_name["validation/loss"].is_monotonic_decreasing
    assert runs["full_vector 2@name s0"]["history"] == []
    assert set(runs["das 2@name r2 s0"]["axes"].values()) == {"epoch"}


def test_a_sweep_s_results_are_tables_pictures_and_a_page(swept: Path) -> None:
    (run,) = [run for run in wandb_runs(swept) if run["job_type"] == "results"]
    table = json.loads((run["files"] / run["summary"]["results.path"]).read_text())
    frame = read_results(swept)
    assert table["columns"] == list(frame.columns) and len(table["data"]) == FITS
    shown = pandas.DataFrame(table["data"], columns=table["columns"])
    assert shown.command.tolist() == frame.command.tolist()
    for key in ("heat_maps", "iia_maps", "probe_maps", "difference_maps"):
        picture = run["files"] / run["summary"][f"{key}.path"]
        assert picture.read_bytes().startswith(b"\x89PNG"), key
    for key in ("heat_maps", "difference_maps"):
        assert (run["files"] / run["summary"][f"{key}.path"]).read_bytes() == (swept / f"{key}.png").read_bytes()
    assert "<h2>Probes beyond interventions</h2>" in (run["files"] / run["summary"]["report.path"]).read_text()
    best = json.loads((run["files"] / run["summary"]["best_sites.path"]).read_text())
    assert [row[0] for row in best["data"]] == ["das", "full vector", "probing"]
    assert run["summary"]["best/full vector"] == 1.0
    assert "above the IIA of the method" in run["summary"]["difference_maps.caption"]
    assert run["summary"]["iia_maps.caption"].startswith("IIA of learned interventions. A row is a layer")
    files = {"results.parquet", "curves.parquet", "config.yaml", "report.html", "heat_maps.svg", "difference_maps.png"}
    assert files <= run["artifacts"]["sweep"]


def test_a_sweep_that_goes_on_logs_nothing_twice(swept: Path, tmp_path: Path) -> None:
    folder = tmp_path / swept.parent.name / swept.name
    # With the links that W&B makes: to its newest run, and out of the folder to a log in its cache.
    shutil.copytree(swept, folder, symlinks=True, ignore=shutil.ignore_patterns("results.parquet"))
    links = {path.name: path.resolve() for path in (folder / "wandb").rglob("*") if path.is_symlink()}
    assert folder / "wandb" in links["latest-run"].parents and folder not in links["debug-core.log"].parents
    before = [run["run_id"] for run in wandb_runs(folder)]
    wandb_runs.cache_clear()
    lines = (folder / "logged.txt").read_text().splitlines()
    (folder / "logged.txt").write_text("\n".join(lines[1:]) + "\n")
    assert main(["sweep", f"resume={folder}"]) == 0
    assert sorted(run["run_id"] for run in wandb_runs(folder)) == sorted([*before, lines[0]])
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
    whole = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(whole, dict) and {name: run["config"][name] for name in whole} == whole
    place = {"layer": 2, "component": "block_output", "position": "name", "method": "das", "seed": 0}
    assert {name: run["config"][name] for name in place} == place and "torch" in run["config"]["versions"]
    assert (run["display_name"], run["run_group"], run["job_type"]) == ("das 2@name r1 s0", "das_gender", "fit")
    assert run["tags"] == ["das", "layer2.block_output@name", "rank 1", "seed 0", "das_gender"]
    assert (run["files"] / run["summary"]["figure.path"]).read_bytes() == (folder / "figure.png").read_bytes()
    table = json.loads((run["files"] / run["summary"]["results.path"]).read_text())
    assert [row[0] for row in table["data"]] == ["trained", "full vector", "random subspace"]
    exported = {str(file.relative_to(folder / "export")) for file in (folder / "export").rglob("*") if file.is_file()}
    assert exported and run["artifacts"]["intervention"] == exported
    description, about = run["described"]["intervention"]
    assert description == "das 2@name r1 s0, of das_gender" and '"layer":2' in str(about).replace(" ", "")
    assert run["summary"]["figure.caption"].startswith("A bar is a figure on held-out data")
    assert run["axes"]["validation/iia_argmax"] == "epoch" and "train/loss" not in run["axes"]
    assert run["summary"]["test/above_chance"] == run["summary"]["test/iia_changing_argmax"]
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
    fit = EventAccumulator(str(folder / "das 2@name r2 s0")).Reload()
    assert len(fit.Scalars("validation/loss")) == 2 and len(fit.Scalars("test/iia_changing_pairwise")) == 1
    assert b"trainer/max_epochs" in next((folder / "das 2@name r2 s0").glob("*.[0-9]")).read_bytes()
    results = EventAccumulator(str(folder / "results")).Reload()
    assert results.Images("heat_maps") and results.Images("difference_maps")
    (best,) = results.Tensors("best_sites/text_summary")
    assert b"| full vector | 2@name |" in best.tensor_proto.string_val[0]


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
    assert all(len(name) < 32 for name in configs), "names are labels of axes"
    das = configs["das 2@name r2 s0"]
    assert das["method"] == "das" and das["rank"] == 2 and das["_Group"] == group
    assert das["trainer"]["max_epochs"] == 2 and das["versions"]
    logged = base.execute("select metrics from metrics where run_name like 'das 2@%'").fetchall()
    assert len(logged) == 3 and "test/iia_changing_pairwise" in json.loads(logged[-1][0])
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


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("test/probe_accuracy/gender layer4.block_output@verb", "test/probe_accuracy/gender 4@verb"),
        ("test/probe_accuracy/gender layer4.mlp_output@verb", "test/probe_accuracy/gender 4.mlp_output@verb"),
        ("layer2.block_output.head1@x", "2.block_output.head1@x"),
        ("module:layer1.block_output.output", "module:layer1.block_output.output"),
        ("test/auroc/deceptive probe layer2.block_output", "test/auroc/deceptive probe layer2"),
        ("train/loss", "train/loss"),
    ],
)
def test_figures_of_sites_have_short_names(name: str, short: str) -> None:
    assert shortened(name) == short


@pytest.mark.parametrize(
    ("configuration", "name"),
    [
        ({"intervention": {"_target_": "a.b.BoundlessDAS"}, "site": ["layer1.block_output@a", "layer2.block_output@a"]},
         "boundless_das 1@a +1"),
        ({"intervention": {"_target_": "a.LoReFT", "rank": 4}, "seed": 3, "site": None}, "loreft r4 s3"),
        ({"training": {"_target_": "itrain.training.probing.ProbeTraining"}, "intervention": {"_target_": "a.DAS"},
          "site": "layer1.mlp_output@a"}, "probing 1.mlp_output@a"),
        ({"training": {"_target_": "mine.Own"}, "intervention": None}, "mine"),
        ({}, "run"),
    ],
)  # fmt: skip
def test_a_run_of_its_own_is_named_after_method_and_site(configuration: dict[str, Any], name: str) -> None:
    assert identify_run(configuration).name == name


def test_a_fit_leaves_all_that_wandb_needs_in_its_folder_and_wandb_has_no_complaint(tmp_path: Path) -> None:
    """In a process of its own, as wandb warns of what an earlier run has set."""
    words = ["fit", "recipe=das_gender", *SMALL, f"output={tmp_path}", "logger=wandb", "logger.offline=true"]
    home = tmp_path / "home"
    home.mkdir()
    given = {**os.environ, "HOME": str(home), "XDG_DATA_HOME": str(home / "data"), "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in given.items() if not name.startswith("WANDB_")}
    program = [sys.executable, "-m", "itrain", *words]
    told = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=240)
    assert told.returncode == 0, told.stderr
    assert "WARNING" not in told.stderr + told.stdout
    assert not list((home / "data").rglob("staging/*"))
    staged = [file.stat().st_size for file in only_run(tmp_path).glob("wandb/artifacts/staging/*")]
    assert (only_run(tmp_path) / "export" / "intervention.safetensors").stat().st_size in staged


@pytest.mark.parametrize("word", ["project=a/b", "id=a/b"])
def test_what_wandb_takes_no_run_under_is_told_in_a_line(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", *SMALL, f"output={tmp_path}", "logger=wandb", "logger.offline=true", f"logger.{word}"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith("itrain: logger: ") and said.count("\n") == 1
