"""Launchers: wherever the jobs of a sweep run, the results are those of one process, and a fault stops no other job."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pytest
from omegaconf import OmegaConf

from itrain import config
from itrain.cli import main
from itrain.config import ConfigError, check, compose
from itrain.results.summary import SweepSummary
from itrain.results.table import read_curves, read_results
from itrain.sweeps.launching import Failure, launch, repeating
from tests import commands
from tests.commands import only_run

ROOT = Path(__file__).parents[1]
SMALL = [*commands.SMALL, "sweep.positions=[name]"]
GRID = ["recipe=das_vs_probe_gender", "sweep.layers=[1,2,3,4]"]
BASIC = {"_target_": f"{__name__}.Basic"}
JOBLIB = {"_target_": "hydra_plugins.hydra_joblib_launcher.config.JobLibLauncherConf", "n_jobs": 2}
SUBMITIT = {"_target_": "hydra_plugins.hydra_submitit_launcher.config.LocalQueueConf"}
TIMES = ["seconds", "command"]


@dataclass(kw_only=True)
class Basic:
    """The settings of Hydra's own launcher, which every installation has and which starts no process."""

    _target_: str = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class Notes:
    """A logger of sweeps that notes what it is given."""

    def __init__(self, *, save_dir: str = ".") -> None:
        self.file = Path(save_dir) / "notes.txt"

    def log_fit(self, fit: Any) -> None:
        with self.file.open("a") as file:
            file.write(f"{fit.id} {fit.name}\n")

    def log_results(self, sweep: str, summary: SweepSummary, pictures: Mapping[str, Path]) -> None:
        with self.file.open("a") as file:
            file.write(f"results of {len(summary.frame)}\n")


NOTES = f"++logger={{_target_:{__name__}.Notes}}"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Results are compared to the last bit, which depends on the number of threads.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def by(launcher: Mapping[str, Any]) -> str:
    return "++launcher={" + ",".join(f"{key}:{value}" for key, value in launcher.items()) + "}"


def test_workers_share_the_cores_and_a_killed_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.delenv("OMP_NUM_THREADS")
    launcher = OmegaConf.create({**JOBLIB, "n_jobs": os.cpu_count()})
    threads = launch(
        os.getenv, [{"key": "OMP_NUM_THREADS"}, {"key": "it's"}], launcher=launcher, folder=tmp_path, name="test"
    )
    assert threads == ["1", None]
    (killed,) = launch(os._exit, [{"status": 1}], launcher=launcher, folder=tmp_path, name="test")
    assert isinstance(killed, Failure) and "TerminatedWorkerError" in killed.message


def end_process_once(mark: str) -> str:
    if mark and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return mark


def test_calls_of_a_killed_worker_of_joblib_are_made_again(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    calls = [{"mark": ""}, {"mark": str(tmp_path / "mark")}]
    found = launch(end_process_once, calls, launcher=OmegaConf.create(JOBLIB), folder=tmp_path, name="test")
    assert found == ["", str(tmp_path / "mark")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep in one process."""
    folder = tmp_path_factory.mktemp("sweep")
    assert main(["sweep", *SMALL, *GRID, NOTES, f"output={folder}"]) == 0
    return only_run(folder)


def assert_same(folder: Path, other: Path) -> None:
    frames = [read_results(each).drop(columns=TIMES) for each in (folder, other)]
    pandas.testing.assert_frame_equal(*frames, check_exact=True)
    curves = [read_curves(each).drop(columns="command") for each in (folder, other)]
    pandas.testing.assert_frame_equal(*curves, check_exact=True)


def test_a_launched_sweep_leaves_what_one_process_does(finished: Path) -> None:
    assert main(["sweep", *SMALL, *GRID, NOTES, by(BASIC), "output=launched"]) == 0
    folder = only_run("launched")
    assert_same(folder, finished)
    assert {each.name for each in folder.iterdir()} == {each.name for each in finished.iterdir()}
    commands = [read_results(each).command.str.replace(r" output=\S+", "", regex=True) for each in (folder, finished)]
    pandas.testing.assert_series_equal(*commands)
    notes = [(each / "notes.txt").read_text().splitlines() for each in (folder, finished)]
    names = [[line.split(maxsplit=1)[1] for line in lines] for lines in notes]
    assert len(names[0]) == len(read_results(folder)) + 1
    assert names[0] == names[1]


def test_a_sweep_stopped_in_its_processes_goes_on_in_others(finished: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "itrain", "sweep", *SMALL, *GRID, "launcher=joblib", "launcher.n_jobs=2"]
    running = subprocess.Popen(
        [*command, "output=stopped"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=commands.heed_interrupts,
    )
    deadline = time.monotonic() + 240
    while not list(Path("stopped").rglob("jobs/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert "to go on: itrain sweep resume=" in running.communicate()[1]
    assert running.returncode == 130
    folder = only_run("stopped")
    kept = {file: file.stat().st_mtime_ns for file in folder.rglob("jobs/*.json")}
    assert 0 < len(kept) < 5
    assert main(["sweep", f"resume={folder}", "launcher=null"]) == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert_same(folder, finished)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(JOBLIB, id="joblib"),
        pytest.param(SUBMITIT, id="submitit", marks=pytest.mark.slow),
    ],
)
def test_what_is_missing_is_run_by_another_launcher(launcher: Mapping[str, Any], finished: Path) -> None:
    pytest.importorskip(launcher["_target_"].rpartition(".")[0])
    shutil.copytree(finished, "copy")
    for file in ("seed0 layer2.json", "seed0 probing.json"):
        Path("copy/jobs", file).unlink()
    Path("copy/results.parquet").unlink()
    assert main(["sweep", "resume=copy", by(launcher), NOTES]) == 0
    assert_same(Path("copy"), finished)


def test_a_job_that_fails_is_told_and_stops_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    # Probes without an optimizer fail when they are fitted, and only then.
    wrong = (
        "++sweep.methods={probing:{_target_:itrain.training.probing.ProbeTraining,_partial_:true},"
        "full_vector:{_target_:itrain.interventions.controls.FullVector,_partial_:true}}"
    )
    assert main(["sweep", *SMALL, "recipe=das_gender", "sweep.layers=[2,3]", wrong, by(BASIC), "output=failed"]) == 1
    told = capsys.readouterr().err
    assert "1 of the jobs failed" in told and "seed0 probing: " in told
    folder = only_run("failed")
    assert len(read_results(folder)) == 2
    (folder / "jobs" / "seed0 layer2.json").unlink()
    (folder / "jobs" / "seed0 layer3.json").unlink()
    assert main(["sweep", f"resume={folder}", by(BASIC)]) == 1
    assert len(read_results(folder)) == 2


def test_a_sweep_of_which_every_job_fails_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "++sweep.methods={probing:{_target_:itrain.training.probing.ProbeTraining,_partial_:true}}"
    assert main(["sweep", *SMALL, "recipe=das_gender", "sweep.layers=[2]", wrong]) == 1
    assert "1 of the jobs failed" in capsys.readouterr().err


def test_what_cannot_be_opened_is_told_before_any_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *SMALL, "recipe=das_gender", "sweep.layers=[9]", by(BASIC), "output=none"]) == 1
    assert "there is no layer 9" in capsys.readouterr().err
    assert not Path("none").exists()


def test_an_error_of_what_is_repeated_is_raised() -> None:
    calls: list[float] = []

    def fail() -> None:
        calls.append(time.monotonic())
        raise OSError("full")

    def work() -> None:
        with repeating(fail):
            while not calls:
                time.sleep(0.01)

    with pytest.raises(OSError, match="full"):
        work()


@pytest.mark.parametrize("choice", config.group_choices()["launcher"])
def test_every_choice_fits_its_plugin(choice: str) -> None:
    composed = compose(["recipe=das_gender", f"launcher={choice}"], sweeps=True)
    pytest.importorskip(composed.launcher._target_.rpartition(".")[0])
    check(composed)
    assert list(composed.sweep.words) == ["recipe=das_gender"]


@pytest.mark.parametrize("choice", [each for each in config.group_choices()["launcher"] if each != "devices"])
def test_a_plugin_that_is_missing_is_named_with_its_extra(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = compose([f"launcher={choice}"], sweeps=True)
    monkeypatch.setitem(sys.modules, composed.launcher._target_.rpartition(".")[0], None)
    with pytest.raises(ConfigError) as caught:
        check(composed)
    assert f"pip install 'itrain[{choice}]'" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher=jobib"], "there is no launcher 'jobib', did you mean 'joblib'?"),
        (["launcher=joblib", "launcher.njobs=2"], "did you mean 'launcher.n_jobs'?"),
        (["launcher=joblib", "launcher.n_jobs=two"], "launcher.n_jobs: expected an integer"),
        (["launcher.n_jobs=2"], "launcher: needs _target_"),
    ],
)
def test_a_wrong_launcher_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    assert main(["sweep", *SMALL, "recipe=das_gender", *words, "output=none"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("none").exists()


def test_a_single_fit_takes_no_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "recipe=das_gender", "launcher=joblib"]) == 2
    assert "'launcher=joblib' is for 'itrain sweep'" in capsys.readouterr().err


def test_a_sweep_that_goes_on_takes_a_launcher_and_nothing_else(finished: Path) -> None:
    begun = config.of_folder(finished, [NOTES])
    assert begun.launcher is None
    assert config.of_folder(finished, ["launcher=joblib", "launcher.n_jobs=3", NOTES]).launcher.n_jobs == 3
    with pytest.raises(ConfigError, match=r"leave out 'seed=1'"):
        config.of_folder(finished, ["launcher=joblib", "seed=1"])
