"""Stops: a signal ends a run at its next step, and a run that should end does so for certain.

The first signal is heeded between two steps, where there are steps, and at once elsewhere. A second Ctrl-C, or a main
thread that cannot heed the first in time, for example because it waits for another process, ends all at once. Whatever
ends a run, its last line says what is kept.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from itrain.files import UNFINISHED, remove
from itrain.processes import TICK, Fault, Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENOUGH = b"\0"
"""No signal: the watch ends."""
GRACE = 25.0
"""Seconds from a signal to the end; clusters commonly give 30."""


class Stopped(BaseException):
    """A signal stops the run. No error, so that nobody who catches errors goes on."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"

    @property
    def code(self) -> int:
        """The exit code, as shells have it."""
        return 128 + self.signum


class Stop:
    """What a process knows of the signals that it was sent, and of the other processes of its run.

    ``advice`` says how to go on; whoever has something to keep sets it. While there are ``steps``, a signal waits
    until :meth:`step` is called.
    """

    def __init__(self) -> None:
        self.advice: Callable[[], str] = str
        self.processes = Processes()
        self.signum: int | None = None
        self.steps = False
        self._pid, self._deadline = os.getpid(), float("inf")
        self._ending = threading.Lock()

    def install(self) -> None:
        """Let signals come here, unless whoever started the process has them ignored, as nohup does."""
        for signum in SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._heed)

    def step(self) -> None:
        """Stop here if a signal has come.

        Raises:
            Stopped: it has.
        """
        if self.signum is None:
            return
        stopped = Stopped(self.signum)
        if self.processes.watched:
            os._exit(stopped.code)
        # Before this process lets go of them, which they would report as an error.
        self.processes.kill()
        raise stopped

    def tell(self, what: str) -> str:
        """A last line: what has ended the run, and how to go on."""
        return "; ".join(filter(None, (what, self.advice())))

    def end(self, fault: Fault) -> NoReturn:
        """End this process and its children at once, from whichever thread comes first, with a last line."""
        self._ending.acquire()  # for good
        stopped = None if fault.signum is None else Stopped(fault.signum)
        self.processes.kill()
        for path in tuple(UNFINISHED):
            with suppress(OSError):
                remove(path)
        if self.processes.rank == 0:
            # A progress bar hides the cursor.
            cursor = "\x1b[?25h\n" if os.isatty(2) else ""
            with suppress(OSError):
                os.write(2, f"{cursor}itrain: {self.tell(str(stopped or fault.message))}\n".encode())
        os._exit(stopped.code if stopped else 1)

    def leave(self, code: int) -> int:
        """The exit code; a process of several leaves at once, for those that it waits for at its exit may be gone."""
        if self.processes.alone:
            return code
        self._ending.acquire()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        self.processes.kill()
        os._exit(code)

    def _heed(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            raise KeyboardInterrupt  # in a data loader's worker, which its parent ends
        if self.signum is None:
            self.signum = signum
            if not self.steps:
                raise Stopped(signum)

    def _watch(self, signals: socket.socket) -> None:
        """The thread that sees signals, time and processes even where the main thread waits in foreign code."""
        while True:
            ready, _, _ = select.select([signals], [], [], TICK)
            came = signals.recv(64) if ready else b""
            if ENOUGH in came:
                return
            for signum in came:
                if signum not in SIGNALS:
                    continue
                if signum == signal.SIGINT and self._deadline < float("inf"):
                    self._end_by(self.signum or signum)
                self._deadline = min(self._deadline, time.monotonic() + GRACE)
            if time.monotonic() > self._deadline:
                self._end_by(self.signum or signal.SIGTERM)
            if fault := self.processes.tick():
                self.end(fault)

    def _end_by(self, signum: int) -> NoReturn:
        self.end(Fault("", signum))


_current: list[Stop] = []


def current() -> Stop | None:
    """The stop of the command that runs, if one does."""
    return _current[-1] if _current else None


@contextmanager
def heeded() -> Iterator[Stop]:
    """Heed signals while inside. Only the main thread can; in others this does nothing."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    with _restoring(), stop.processes.children_know_parent(), _woken(stop._watch):
        stop.install()
        _current.append(stop)
        try:
            yield stop
        finally:
            _current.remove(stop)


@contextmanager
def _restoring() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            # None: set by foreign code, which cannot be put back from here.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _woken(watch: Callable[[socket.socket], None]) -> Iterator[None]:
    """Run ``watch`` in a thread, which gets the number of each signal at once, whatever the main thread does."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    _forget_in_forks()
    thread = threading.Thread(target=watch, args=[receiver], name="itrain-stops", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        # Closing it would say nothing: a data loader's workers, which are forks, hold it too.
        sender.send(ENOUGH)
        thread.join()
        sender.close()
        receiver.close()


def _forget_in_forks() -> None:
    """A forked process must not report its own signals to its parent's thread."""
    if not _registered:
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        _registered.append(True)


_registered: list[bool] = []
