"""Sweeps over devices: a process for each, the results of one process, and jobs that are done again where one dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas
import pytest
import torch
from omegaconf import OmegaConf

from itrain import config
from itrain.cli import main
from itrain.results.table import read_results
from itrain.sweeps import devices, worker
from itrain.sweeps.devices import Deal, Devices, Pool
from itrain.sweeps.launching import Failure
from tests import commands
from tests.commands import only_run
from tests.stopping import ROOT, _of_session

SWEEP = ["sweep", "recipe=das_vs_probe_gender", *commands.SMALL, "sweep.positions=[name]", "sweep.layers=[1,2,3,4]"]
IN_TWO = ["launcher=devices", "launcher.processes=2"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Results are compared to the last bit, which depends on the number of threads.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep in one process."""
    folder = tmp_path_factory.mktemp("sweep")
    assert main([*SWEEP, f"output={folder}"]) == 0
    return only_run(folder)


def assert_same(folder: Path, other: Path) -> None:
    frames = [read_results(each).drop(columns=["seconds", "command"]) for each in (folder, other)]
    pandas.testing.assert_frame_equal(*frames, check_exact=True)


def children() -> list[int]:
    """The processes that this one has started for a sweep."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                command = (folder / "cmdline").read_text()
            except OSError:
                continue
            if int(fields[1]) == os.getpid() and "itrain.sweeps.worker" in command:
                found.append(int(folder.name))
    return found


def do(what: str, mark: str) -> str:
    """A call: it ends its process, always or the first time, or fails, or says which process does it."""
    if what == "die" or (what == "die once" and not Path(mark).exists()):
        Path(mark).touch()
        Path(mark).with_name(f".{os.getpid()}-rows.part").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fail":
        print("a word of warning", flush=True)
        raise ValueError("no")
    return f"{what} {torch.get_num_threads()}"


def test_calls_whose_process_dies_are_done_again_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "TRIES", 2)
    calls = [{"what": what, "mark": str(tmp_path / what)} for what in ("die", "fail", "work", "fail", "die once")]
    pool = Pool([None, None], folder=tmp_path)
    try:
        found = pool.run(do, calls)
    finally:
        pool.close()
    assert found[1:] == [Failure("ValueError: no"), "work 1", Failure("ValueError: no"), "die once 1"]
    assert isinstance(found[0], Failure)
    assert found[0].message.startswith("its process was ended by SIGKILL in each of 2 tries")
    assert pool.redone == 2
    assert capsys.readouterr().err.count("a word of warning") == 1
    assert not children() and not list(tmp_path.glob(".*.part"))


def test_a_sweep_in_two_processes_of_which_one_is_killed_equals_that_in_one(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list(Path("two").rglob("jobs/*.json")):
            time.sleep(0.02)
        killed.append(max(children()))
        os.kill(killed[0], signal.SIGKILL)

    killed: list[int] = []
    thread = threading.Thread(target=kill)
    thread.start()
    assert main([*SWEEP, *IN_TWO, "output=two"]) == 0
    thread.join()
    folder = only_run("two")
    assert_same(folder, finished)
    assert killed and not children()
    (took,) = json.loads((folder / "wall_time.json").read_text())
    assert took["processes"] == 2 and took["seconds"] > 0
    assert f"wall time {took['seconds']:.0f} s in 2 processes" in capsys.readouterr().out
    assert {each.name for each in folder.iterdir()} == {each.name for each in finished.iterdir()}


def test_processes_that_end_before_they_do_anything_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    pool = Pool([None, None], folder=tmp_path)
    try:
        (found,) = pool.run(do, [{"what": "work", "mark": ""}])
    finally:
        pool.close()
    assert isinstance(found, Failure) and "no process is left" in found.message


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGKILL", -9)])
def test_no_process_outlives_a_sweep_that_is_stopped_and_another_goes_on(sent: str, code: int, finished: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "itrain", *SWEEP, *IN_TWO, "output=stopped"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=commands.heed_interrupts,
    )
    deadline = time.monotonic() + 240
    while not list(Path("stopped").rglob("jobs/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    if sent == "SIGINT":  # as a terminal sends it
        os.killpg(running.pid, signal.SIGINT)
    else:
        running.send_signal(signal.Signals[sent])
    told = running.communicate()[1]
    assert running.returncode == code
    assert "Traceback" not in told
    assert sent == "SIGKILL" or "to go on: itrain sweep resume=" in told
    deadline = time.monotonic() + 5
    while (left := _of_session(running.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    folder = only_run("stopped")
    kept = {file: file.stat().st_mtime_ns for file in folder.rglob("jobs/*.json")}
    assert 0 < len(kept) < 5
    assert main(["sweep", f"resume={folder}", *([] if sent == "SIGINT" else ["launcher=null"])]) == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert_same(folder, finished)


@pytest.mark.slow
def test_seeds_are_dealt_too_and_a_wrong_request_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    few = [*SWEEP, "sweep.layers=[2,3]", "sweep.seeds=[0,1]", "sweep.random_model=false"]
    assert main([*few, "output=one"]) == 0
    assert main([*few, *IN_TWO, "output=two"]) == 0
    assert_same(only_run("two"), only_run("one"))
    capsys.readouterr()
    assert main([*SWEEP, *IN_TWO, "sweep.layers=[9]", "output=none"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "there is no layer 9" in told[0]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp_cpu", "fsdp_cpu"])
def test_two_processes_that_share_each_job_leave_the_table_of_one(trainer: str, finished: Path) -> None:
    command = [sys.executable, "-m", "itrain", *SWEEP, f"trainer={trainer}", "output=shared"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = only_run("shared")
    mine, theirs = (read_results(each).drop(columns=["seconds", "command"]) for each in (folder, finished))
    pandas.testing.assert_frame_equal(mine, theirs, atol=1e-5)
    (took,) = json.loads((folder / "wall_time.json").read_text())
    assert took["processes"] == 2 and "wall time" in done.stdout
    assert done.stdout.count("best sites: accuracy") == 1


def test_each_worker_has_neighbours_and_takes_over_those_of_the_longest_share() -> None:
    deal = Deal(9, 3)
    assert [deal.take(worker, alone=False) for worker in (0, 1, 2, 0, 0)] == [0, 3, 6, 1, 2]
    assert [deal.take(worker, alone=False) for worker in (0, 0, 1, 2, 0)] == [5, 8, 4, 7, None]


def test_a_lost_call_comes_last_and_goes_to_another_worker() -> None:
    deal = Deal(2, 2)
    assert deal.take(0, alone=False) == 0
    deal.put_back(0, 0)
    assert deal.take(0, alone=False) == 1
    assert deal.take(0, alone=False) is None
    assert deal.take(1, alone=False) == 0
    deal.put_back(0, 1)
    assert deal.take(1, alone=True) == 0


@pytest.mark.parametrize(
    ("accelerator", "processes", "visible", "expected"),
    [
        ("auto", None, None, ["0", "1", "2"]),
        ("gpu", 4, "5,GPU-ab,7", ["5", "GPU-ab", "7", "5"]),
        ("cpu", 2, None, [None, None]),
        ("cpu", None, None, [None]),
    ],
)
def test_processes_see_a_gpu_each(
    accelerator: str,
    processes: int | None,
    visible: str | None,
    expected: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Devices(processes=processes).places(accelerator) == expected


def test_a_device_that_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    assert worker.device_answers()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert not worker.device_answers()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher=devices", "launcher.process=2"], "did you mean 'launcher.processes'?"),
        (["launcher=devices", "launcher.processes=two"], "launcher.processes: expected an integer"),
        (["launcher=devices", "launcher.processes=0"], "processes"),
    ],
)
def test_a_wrong_number_of_processes_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SWEEP, *words, "output=none"]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not Path("none").exists()


def test_a_sweep_goes_on_with_the_processes_that_it_has_asked_for(finished: Path, tmp_path: Path) -> None:
    saved = OmegaConf.load(finished / "config.yaml")
    saved.launcher = {"_target_": "itrain.sweeps.devices.Devices", "processes": 2}
    OmegaConf.save(saved, tmp_path / "config.yaml")
    assert config.of_folder(tmp_path).launcher.processes == 2
    saved.launcher = {"_target_": "itrain.sweeps.devices.Devices", "command": "rm"}
    OmegaConf.save(saved, tmp_path / "config.yaml")
    with pytest.raises(config.ConfigError, match="a launcher can run any command"):
        config.of_folder(tmp_path)
