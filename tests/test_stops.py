"""Stops: whatever ends a run, it ends soon, says how to go on, leaves no process, and goes on to the same weights."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
import torch

from itrain import cli, stops
from itrain.cli import main
from itrain.results.table import read_results
from tests.commands import heed_interrupts, only_run
from tests.disturbed import FIT as MOMENTS
from tests.disturbed import SWEEP as MOMENTS_OF_SWEEP
from tests.stopping import (
    CODES,
    DRAWN,
    FIT,
    ROOT,
    SWEEP,
    Ended,
    advised,
    finish,
    in_a_fork,
    in_two_processes,
    weights,
)

SECONDS = 60
QUICK_FITS = {("step", "SIGTERM"), ("checkpoint", "SIGHUP"), ("first step", "SIGINT twice")}
QUICK_SWEEPS = {("step", "SIGTERM")}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole_fit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    assert main(["fit", *FIT, "trainer.accelerator=cpu", f"output={folder}"]) == 0
    return only_run(folder)


@pytest.fixture(scope="module")
def whole_drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    assert main(["fit", *DRAWN, "trainer.accelerator=cpu", f"output={folder}"]) == 0
    return only_run(folder)


@pytest.fixture(scope="module")
def whole_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    assert main(["sweep", *SWEEP, f"output={folder}"]) == 0
    return only_run(folder)


@pytest.fixture(scope="module")
def whole_fit_in_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    finish([*FIT, "trainer=ddp_cpu", f"output={folder}"])
    return only_run(folder)


def every(moments: object, actions: list[str], quick: set[tuple[str, str]]) -> pytest.MarkDecorator:
    """Each moment with each action; slow but for the quick ones."""
    cases = [
        pytest.param(moment, action, marks=[] if (moment, action) in quick else [pytest.mark.slow])
        for moment in moments  # type: ignore[attr-defined]
        for action in actions
    ]
    return pytest.mark.parametrize(("moment", "action"), cases)


def assert_ended_by(action: str, ended: Ended) -> None:
    name = action.split()[0]
    assert ended.code == CODES[name], ended.told
    assert ended.told.count(f"itrain: stopped by {name}") == 1
    assert "Traceback" not in ended.told
    assert_over(ended)


def assert_over(ended: Ended) -> None:
    assert ended.seconds < SECONDS
    assert not ended.left


def assert_goes_on(ended: Ended, whole: Path) -> None:
    """To the weights of a run that nothing happened to, if anything was kept, which the last line says."""
    kept = sorted(Path("run").rglob("*.ckpt"))
    again = advised(ended.told)
    assert (again is None) == (not kept), ended.told
    if again is None:
        return
    assert main([*again, "output=again"]) == 0
    found = weights(only_run("again"))
    assert found.keys() == weights(whole).keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights(whole).items())


@every(MOMENTS, ["SIGTERM", "SIGINT", "SIGINT twice", "SIGHUP"], QUICK_FITS)
def test_a_fit_that_a_signal_stops_goes_on(moment: str, action: str, whole_fit: Path) -> None:
    ended = in_a_fork("fit", [*FIT, "trainer.accelerator=cpu", "output=run"], moment, action)
    assert_ended_by(action, ended)
    assert_goes_on(ended, whole_fit)


@every(MOMENTS, ["SIGTERM", "SIGINT", "SIGINT twice", "SIGHUP"], {("step", "SIGTERM")})
def test_a_fit_that_draws_its_gates_goes_on(moment: str, action: str, whole_drawn: Path) -> None:
    ended = in_a_fork("fit", [*DRAWN, "trainer.accelerator=cpu", "output=run"], moment, action)
    assert_ended_by(action, ended)
    assert_goes_on(ended, whole_drawn)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_fit_that_is_killed_goes_on_from_what_is_there(moment: str, whole_fit: Path) -> None:
    ended = in_a_fork("fit", [*FIT, "trainer.accelerator=cpu", "output=run"], moment, "SIGKILL")
    assert ended.code == -signal.SIGKILL
    assert_over(ended)
    if kept := sorted(Path("run").rglob("*.ckpt")):
        assert_goes_on(ended._replace(told=f"to go on: itrain fit ckpt={kept[0]}"), whole_fit)


@every(MOMENTS_OF_SWEEP, ["SIGTERM", "SIGINT", "SIGINT twice", "SIGHUP", "SIGKILL"], QUICK_SWEEPS)
def test_a_sweep_that_is_stopped_goes_on(moment: str, action: str, whole_sweep: Path) -> None:
    ended = in_a_fork("sweep", [*SWEEP, "output=run"], moment, action)
    if action == "SIGKILL":
        assert ended.code == -signal.SIGKILL
        assert_over(ended)
    else:
        assert_ended_by(action, ended)
    folders = [path.parent for path in Path("run").rglob("config.yaml")]
    again = advised(ended.told) or (["sweep", f"resume={folders[0]}"] if folders else None)
    assert (again is None) == (not folders), ended.told
    if again is not None:
        assert main(again) == 0
        frames = [read_results(each).drop(columns=["seconds", "command"]) for each in (folders[0], whole_sweep)]
        pandas.testing.assert_frame_equal(*frames, check_exact=True)


def in_one_of_two() -> list[tuple[str, str, int]]:
    """Each moment, action and process, but for those that are none: what one process does, and what is alone."""
    signals = ["SIGTERM", "SIGTERM everywhere", "SIGINT everywhere", "SIGINT twice everywhere", "SIGHUP everywhere"]
    before = ("composition", "model", "preparation")  # the first process has started no other
    of_first = ("checkpoint", "end of fit", "figure")
    cases = []
    for moment in MOMENTS:
        cases += [(moment, action, 0 if moment in of_first else 1) for action in signals]
        ranks = (1,) if moment in before else (0,) if moment in of_first else (0, 1)
        cases += [(moment, action, rank) for action in ("SIGKILL", "SIGSTOP", "hang") for rank in ranks]
    cases.remove(("figure", "SIGSTOP", 0))  # the other process is done, so that nobody is left who could notice
    return cases


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "action", "rank"), in_one_of_two())
def test_two_processes_end_together(moment: str, action: str, rank: int, whole_fit_in_two: Path) -> None:
    ended = in_two_processes([*FIT, "trainer=ddp_cpu", "output=run"], moment, action, rank)
    assert_over(ended)
    if moment == "test" and ended.code == 0:
        # The process had done its share when it was signalled, and the run was over before it could say so.
        assert action in CODES and (only_run("run") / "metrics.json").is_file()
    elif action.split()[0] in CODES:
        assert ended.code == CODES[action.split()[0]], ended.told
        assert ended.told.count("itrain: stopped by") == 1
        assert "Traceback" not in ended.told
    else:
        assert ended.code != 0
    if kept := sorted(Path("run").rglob("*.ckpt")):
        finish([f"ckpt={kept[0]}", "output=again"])
        found = weights(only_run("again"))
        for name, weight in weights(whole_fit_in_two).items():
            # But for rounding, as wherever processes are compared: what is cached anew comes from other batches.
            assert (found[name] - weight).double().norm() <= 1e-6 * weight.double().norm(), name


def test_a_process_of_two_that_is_killed_is_named_with_what_is_kept() -> None:
    ended = in_two_processes([*FIT, "trainer=ddp_cpu", "output=run"], "step", "SIGKILL", 1)
    assert ended.code == 1
    (kept,) = Path("run").rglob("last.ckpt")
    assert f"itrain: process 1 was ended by SIGKILL; to go on: itrain fit ckpt={kept.absolute()}" in ended.told
    assert_over(ended)


def test_ctrl_c_while_modules_are_imported_is_one_line() -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "itrain", "show"],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        stderr=subprocess.PIPE,
        preexec_fn=heed_interrupts,
    )
    assert process.stderr is not None
    told = b""
    while b"omegaconf" not in told:
        told += process.stderr.readline()
    process.send_signal(signal.SIGINT)
    lines = [line for line in process.communicate()[1].splitlines() if not line.startswith(b"import time:")]
    assert process.returncode == 130
    assert lines == [b"itrain: stopped by SIGINT"]


BLOCKED = """
import ctypes
from itrain import stops
stops.GRACE = 1.0
with stops.heeded() as stop:
    stop.advice = lambda: "kept"
    mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    library.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    library.pthread_mutex_lock(mutex)  # for good
"""


@pytest.mark.parametrize(("sent", "code"), [([signal.SIGTERM], 143), ([signal.SIGINT, signal.SIGINT], 130)])
def test_a_main_thread_that_waits_in_foreign_code_ends_too(sent: list[int], code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED],
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for signum in sent:
        time.sleep(0.5)  # until it waits, or until the signal before is seen
        process.send_signal(signum)
    told = process.communicate(timeout=20)[1]
    assert process.returncode == code
    assert told == f"itrain: stopped by {signal.Signals(sent[0]).name}; kept\n"


def test_what_is_ignored_stays_ignored() -> None:
    """As nohup and a shell's background jobs ask for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stops.heeded():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Finalised:
    """Python prints and ignores what is raised while an object is finalised."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_is_lost_is_told_by_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(stop: stops.Stop, verb: str, words: list[str]) -> int:
        Finalised()
        return 0

    monkeypatch.setattr(cli, "_command", command)
    assert main(["fit"]) == 143
    assert capsys.readouterr().err.endswith("itrain: stopped by SIGTERM\n")


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(signum) for signum in stops.SIGNALS]
    with stops.heeded():
        assert [signal.getsignal(signum) for signum in stops.SIGNALS] != before
    assert [signal.getsignal(signum) for signum in stops.SIGNALS] == before
    assert stops.current() is None
