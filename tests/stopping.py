"""What tests of stops share: commands that are disturbed at a moment, and what is left of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from itrain.cli import main
from tests import disturbed
from tests.commands import SMALL

ROOT = Path(__file__).parents[1]
FIT = [
    "recipe=das_gender",
    "trainer.max_epochs=4",
    "data.batch_size=16",
    "data.train_pairs=77",
    "data.validation_pairs=33",
    "data.test_pairs=61",
    "data.eval_batch_size=32",
    "trainer.enable_progress_bar=false",
]
"""20 steps in 4 epochs."""
DRAWN = [*FIT, "intervention=hard_concrete_mask"]
"""The same with gates that are drawn at each step."""
SWEEP = [
    "recipe=das_vs_probe_gender",
    "sweep.layers=[1,2]",
    "sweep.positions=[name]",
    *SMALL,
]
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}


class Ended(NamedTuple):
    """How a command has ended, and how many seconds after it was disturbed."""

    code: int
    told: str
    seconds: float
    left: list[str]
    """The processes that are left of it."""


def in_a_fork(verb: str, words: list[str], moment: str, action: str) -> Ended:
    """Run a command in a fork of this process, which has all modules, and disturb it."""
    mark, log = Path("mark").absolute(), Path("log").absolute()
    mark.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _disturbed(verb, words, moment, action, mark, log)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return _ended(os.waitstatus_to_exitcode(status), log.read_text(), mark, child)


def _disturbed(verb: str, words: list[str], moment: str, action: str, mark: Path, log: Path) -> int:
    os.setsid()
    descriptor = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
    disturbed.heed_all()
    disturbed.disturb({"fit": disturbed.FIT, "sweep": disturbed.SWEEP}[verb][moment], disturbed.ACTIONS[action], mark)
    try:
        return main([verb, *words])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def in_two_processes(words: list[str], moment: str, action: str, rank: int) -> Ended:
    """Run a fit in two processes, and disturb one of them."""
    mark = Path("mark").absolute()
    mark.unlink(missing_ok=True)
    process = start(words, {disturbed.DISTURB: f"fit,{moment},{action},{rank},{mark}"})
    told, _ = process.communicate(timeout=280)
    return _ended(process.returncode, told, mark, process.pid)


def finish(words: list[str]) -> None:
    """Run a fit in processes that nothing happens to."""
    process = start(words, {})
    told, _ = process.communicate(timeout=280)
    assert process.returncode == 0, told


def start(words: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.disturbed", "fit", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=disturbed.heed_all,
    )


def _ended(code: int, told: str, mark: Path, session: int) -> Ended:
    seconds = time.time() - mark.stat().st_mtime
    # What the system needs to end a process that was killed.
    for _ in range(20):
        if not (left := _of_session(session)):
            break
        time.sleep(0.1)
    return Ended(code, told, seconds, left)


def _of_session(session: int) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(f"{folder.name} {command}")
    return found


def advised(told: str) -> list[str] | None:
    """The words of the command with which a run says to go on."""
    found = re.search(r"to go on: itrain (fit|sweep) (\S+)", told)
    return [found[1], found[2]] if found else None


def weights(run: Path) -> dict[str, Tensor]:
    """What a run has exported; a fit that is resumed when it is over writes no checkpoint again."""
    return load_file(run / "export" / "intervention.safetensors")
