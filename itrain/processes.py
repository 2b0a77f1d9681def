"""Processes of one run: none outlives the others, and none is waited for that hangs or is gone.

Where Lightning starts them, the first process watches all others, and they watch it. Where a cluster or torchrun does,
that watches, and each process looks at its own steps alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PARENT = "ITRAIN_PARENT"
"""The environment variable that tells the processes of a run which one has started them."""
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")

TICK = 0.5
"""Seconds between two looks at the other processes."""
HANGS = 45.0
"""Seconds without any progress after which a process hangs."""
SLOWER = 20
"""How many times longer than the longest so far a step may take."""
IDLE = 0.05
"""The share of a processor below which processes do nothing but watch each other."""
LAST_WORDS = 3.0
"""Seconds in which a process may tell its own error when another has ended."""


def rank() -> int:
    """Which process of the run this is, before the processes have formed a group."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)


@dataclass(frozen=True)
class Fault:
    """Why a run cannot go on: a message, and the signal that ended a process, if one of those that stop runs did."""

    message: str
    signum: int | None = None


class Processes:
    """The other processes of a run, as one of them sees them."""

    def __init__(self) -> None:
        self.rank = rank()
        self.started: list[subprocess.Popen[bytes]] = []
        """The processes that this one has started."""
        self.launcher: object = None
        """Lightning's, whose ``procs`` are those that it has just started."""
        self.number = 1
        """How many processes the run has."""
        parent = os.environ.get(PARENT)
        self._parent = int(parent) if parent and self.rank else None
        self._taking = threading.Lock()
        self._ticked = time.monotonic()
        self._left: float | None = None
        self._steps, self._idle, self._stopped = Clock(), Clock(), Clock()
        self._began: float | None = None
        self._longest, self._busy = 0.0, 0.0

    @property
    def watched(self) -> bool:
        """Whether another process has started this one, and tells how the run ends."""
        return self._parent is not None

    @property
    def alone(self) -> bool:
        """Whether the run has no process but this one."""
        return not (self.started or self.number > 1 or self.watched)

    @contextmanager
    def children_know_parent(self) -> Iterator[None]:
        """Within, processes that are started learn who has started them."""
        if self.rank:
            yield
            return
        before = os.environ.get(PARENT)
        os.environ[PARENT] = str(os.getpid())
        try:
            yield
        except BaseException:
            self.kill()
            raise
        finally:
            os.environ.pop(PARENT)
            if before is not None:
                os.environ[PARENT] = before
            self._await()

    def mark(self, *, ended: bool = False) -> None:
        """A step begins, or the steps have ended."""
        now = time.monotonic()
        if self._began is not None:
            self._longest = max(self._longest, now - self._began)
        self._began = None if ended else now
        self._steps.reset()

    def tick(self) -> Fault | None:
        """Look at all processes once; return why the run must end now."""
        now = time.monotonic()
        # Less than has passed where this process was suspended, for example by Ctrl-Z.
        passed, self._ticked = min(now - self._ticked, 2.0), now
        if self._parent is not None:
            self._look_at(self._parent, passed)
            return None
        self._take_over()
        return self._look_at_children(passed) or self._look_at_steps(passed)

    def kill(self) -> None:
        """End the processes that this one has started."""
        self._take_over()
        for process in self.started:
            process.kill()
        for process in self.started:
            process.wait()

    def _take_over(self) -> None:
        """Take processes from the launcher, whose own observer would kill this process without a word."""
        procs = getattr(self.launcher, "procs", ())
        with self._taking:
            while procs:
                self.started.append(procs.pop(0))

    def lost(self, seconds: float = LAST_WORDS / 2) -> Fault | None:
        """A process that has ended early, or does so within some seconds; an error may be its echo."""
        self._take_over()
        end = time.monotonic() + seconds
        while self.started and time.monotonic() < end:
            if fault := self._ended():
                return fault
            time.sleep(0.05)
        return None

    def _await(self) -> None:
        end = time.monotonic() + HANGS
        while any(process.poll() is None for process in self.started) and time.monotonic() < end:
            time.sleep(0.05)
        self.kill()

    def _ended(self) -> Fault | None:
        for number, process in enumerate(self.started, 1):
            code = process.poll()
            if code:
                signum = -code if code < 0 else code - 128
                by = signal.Signals(signum).name if signum in signal.valid_signals() else ""
                message = f"process {number} " + (f"was ended by {by}" if by else f"failed with exit code {code}")
                stops = signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                return Fault(message, signum if stops else None)
        return None

    def _look_at_children(self, passed: float) -> Fault | None:
        if not self.started:
            return None
        if (fault := self._ended()) is not None:
            self._left = LAST_WORDS if self._left is None else self._left - passed
            return fault if self._left <= 0 else None
        busy = sum(map(_processor_seconds, (os.getpid(), *(each.pid for each in self.started))))
        before, self._busy = self._busy, busy
        # Those of other machines may be at work.
        if len(self.started) + 1 < self.number or busy == 0 or abs(busy - before) > IDLE * passed:
            self._idle.reset()
        if self._idle.reaches(HANGS, passed):
            return Fault(f"no process has done anything for {HANGS:.0f} s: one hangs")
        return None

    def _look_at_steps(self, passed: float) -> Fault | None:
        if self.alone or self._began is None or not self._longest:
            return None
        limit = max(HANGS, SLOWER * self._longest)
        if self._steps.reaches(limit, passed):
            return Fault(f"no step has ended for {limit:.0f} s: a process hangs")
        return None

    def _look_at(self, parent: int, passed: float) -> None:
        if os.getppid() != parent:
            os._exit(1)
        if _stat(parent)[:1] != ["T"]:
            self._stopped.reset()
        elif self._stopped.reaches(HANGS, passed):
            os.kill(parent, signal.SIGKILL)


def follow_parent() -> None:
    """In a worker of joblib: end it once the run is gone, for whose next call it would wait."""
    parent = os.environ.get(PARENT)
    if parent is not None and not _following and multiprocessing.current_process().name.startswith("LokyProcess"):
        follow(int(parent))


def follow(parent: int) -> None:
    """End this process once the one that has started it is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(TICK)
        os._exit(1)

    thread = threading.Thread(target=watch, name="itrain-parent", daemon=True)
    _following.append(thread)
    thread.start()


_following: list[threading.Thread] = []


class Clock:
    """Time that has been seen to pass since something was seen to happen."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def reset(self) -> None:
        self.seconds = 0.0

    def reaches(self, limit: float, passed: float) -> bool:
        self.seconds += passed
        return self.seconds > limit


def _stat(pid: int) -> list[str]:
    """The fields of a process after its name, as Linux has them; none elsewhere, and for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _processor_seconds(pid: int) -> float:
    """The processor time of a process, 0 where it is unknown."""
    return sum(map(int, _stat(pid)[11:13])) / os.sysconf("SC_CLK_TCK")
