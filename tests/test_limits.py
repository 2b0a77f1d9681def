"""Limits: a disk, a screen or a number of files that has come to its end costs no result, and is told in a line."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from itrain import experiment, leaving
from itrain.cli import main
from itrain.data.loading import Loader
from itrain.networks.replay.budget import GIB, Budget, BudgetError
from itrain.sweeps import run as sweeps
from itrain.training.safeguards import WholeCheckpoints
from tests.commands import SMALL
from tests.stopping import SWEEP

FIT = ["fit", "recipe=das_gender", *SMALL]
Disk = namedtuple("Disk", "total used free")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def failing(original: Callable[..., Any], error: OSError, *, after: int) -> Callable[..., Any]:
    calls: list[int] = []

    def fail(*arguments: Any, **settings: Any) -> Any:
        calls.append(0)
        if len(calls) > after:
            raise error
        return original(*arguments, **settings)

    return fail


CASES = {
    "full at a checkpoint": (WholeCheckpoints, "save_checkpoint", 1, errno.ENOSPC, "last.ckpt"),
    "read-only at a step": (CSVLogger, "save", 9, errno.EROFS, "metrics.csv"),
    "over quota at the figure": (experiment, "save_run_figure", 0, errno.EDQUOT, "figure.png"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_written_is_one_line_with_what_is_kept(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    owner, name, after, number, file = CASES[case]
    error = OSError(number, os.strerror(number), file)
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), error, after=after))
    assert main([*FIT, "output=run"]) == 1
    (kept,) = Path("run").rglob("last.ckpt")
    told = capsys.readouterr().err
    assert told == (
        f"itrain: cannot write '{file}': {os.strerror(number)}; to go on: itrain fit ckpt={kept.absolute()}\n"
    )


def test_a_sweep_that_cannot_write_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "collect", failing(sweeps.collect, error, after=0))
        assert main(["sweep", *SWEEP, "sweep.layers=[2]", "sweep.methods=[full_vector]", "output=run"]) == 1
    told = capsys.readouterr().err
    (folder,) = (path.parent.absolute() for path in Path("run").rglob("config.yaml"))
    assert told == (
        f"itrain: cannot write 'results.parquet': No space left on device; to go on: itrain sweep resume={folder}\n"
    )
    assert main(["sweep", f"resume={folder}"]) == 0
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out


def test_results_are_written_before_they_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "show", failing(leaving.show, OSError(errno.EIO, "gone"), after=0))
    assert main([*FIT, "output=run"]) == 1
    (run,) = (path.parent for path in Path("run").rglob("config.yaml"))
    for name in ("metrics.json", "export/intervention.safetensors", "export/intervention_config.json", "figure.svg"):
        assert (run / name).is_file(), name
        assert (run / name).stat().st_mode & 0o777 == 0o666 & ~umask(), name


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("screen", ["full", "closed"])
def test_a_screen_that_is_gone_costs_no_result(screen: str) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 9
        try:
            os.close(reader)  # the only one: the pipe is closed
            os.dup2(os.open("/dev/full", os.O_WRONLY) if screen == "full" else writer, 1)
            os.dup2(os.open("told", os.O_CREAT | os.O_WRONLY), 2)
            sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
            code = main([*FIT, "output=run"])
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(reader)
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    lines = Path("told").read_text().splitlines()
    assert lines == (["itrain: cannot write to standard output: No space left on device"] if screen == "full" else [])
    assert list(Path("run").rglob("export/intervention.safetensors"))


def test_workers_without_open_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(list(range(4)), num_workers=2)  # type: ignore[arg-type]
    allowed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: allowed.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    with pytest.raises(
        ValueError, match=r"num_workers=2 needs about 128 open files, and 64 are allowed.*ulimit -n 128"
    ):
        next(iter(loader))
    assert not allowed
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 4096))
    assert int(next(iter(loader))) == 0
    assert allowed == [(128, 4096)], "what may be raised is"


def test_caches_leave_room_on_the_disk_for_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(0, folder=tmp_path)
    asked = (1024, 256, torch.float32, torch.device("cpu"))  # 1 MiB
    for total, free, fits in [
        (100 * GIB, GIB + (2 << 20), True),
        (100 * GIB, GIB, False),
        (GIB, (GIB // 10) + (2 << 20), True),
        (GIB, GIB // 10, False),
    ]:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, total=total, free=free: Disk(total, 0, free))
        if fits:
            assert budget.take(*asked).shape == (1024, 256)
        else:
            with pytest.raises(BudgetError, match="for checkpoint and results"):
                budget.take(*asked)
    assert not list(tmp_path.iterdir())
