"""Calls in processes of this machine, one for each device: dealt so that each shares what is cached, and redone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from signal import Signals
from typing import TypeVar

import torch

from itrain.bounds import require_at_least
from itrain.files import remove
from itrain.processes import LAST_WORDS, PARENT
from itrain.sweeps.launching import TRIES, Call, Failure

Result = TypeVar("Result")

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices of this machine.

    Args:
        processes: more than there are devices share them; None: one for each GPU, or one where the CPU is used.

    Raises:
        ValueError: there is less than one process.
    """

    processes: int | None = None

    def __post_init__(self) -> None:
        require_at_least(1, processes=self.processes)

    def places(self, accelerator: str) -> list[str | None]:
        """What each process sees of the GPUs, as ``CUDA_VISIBLE_DEVICES`` has it; None where the CPU is used."""
        found: list[str | None] = [None]
        if accelerator in ("auto", "gpu", "cuda") and (count := torch.cuda.device_count()):
            seen = os.environ.get(VISIBLE)
            found = [*(map(str, range(count)) if seen is None else seen.split(",")[:count])]
        number = self.processes or len(found)
        return [found[place % len(found)] for place in range(number)]


def told(places: Sequence[str | None]) -> str:
    """Where processes run, in words."""
    gpus = sorted({place for place in places if place is not None})
    return f"GPU {', '.join(gpus)}" if gpus else "the CPU"


class Deal:
    """Shares calls out among workers: neighbours to each, since what is kept for one job serves the next.

    Jobs come seed by seed and layer by layer. Those of one seed have the model and the data in common, and the keys and
    values above the lowest layer of a share serve all its layers, so that shares of neighbours take the least room.
    A worker without any takes the later half of the longest share. Calls that were lost come last, and not to the
    worker that has lost them as long as there is another.
    """

    def __init__(self, calls: int, workers: int) -> None:
        bounds = [calls * worker // workers for worker in range(workers + 1)]
        self.shares = [deque(range(*each)) for each in pairwise(bounds)]
        self.again: list[tuple[int, int]] = []
        """Lost calls, and the worker that lost each."""

    def take(self, worker: int, *, alone: bool) -> int | None:
        """The worker's next call."""
        mine = self.shares[worker]
        if not mine:
            longest = max(self.shares, key=len)
            for _ in range((len(longest) + 1) // 2):
                mine.appendleft(longest.pop())
        if mine:
            return mine.popleft()
        lost = next((each for each in self.again if alone or each[1] != worker), None)
        if lost is None:
            return None
        self.again.remove(lost)
        return lost[0]

    def put_back(self, call: int, worker: int) -> None:
        self.again.append((call, worker))


class Worker:
    """One of the processes, as its parent sees it.

    Args:
        number: its place in the pool.
        sees: the GPU, if any.
        processes: how many share the CPU's cores.
        said: takes the lines that it prints.
    """

    def __init__(self, *, number: int, sees: str | None, processes: int, said: Callable[[str], None]) -> None:
        self.number, self.ready = number, False
        self.call: int | None = None
        """The call that it does."""
        self.connection, theirs = Pipe()
        environment = {**os.environ, PARENT: str(os.getpid()), "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "itrain.sweeps.worker", str(theirs.fileno()), str(processes)],
            env=environment | ({} if sees is None else {VISIBLE: sees}),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        theirs.close()
        self._lines = threading.Thread(target=self._listen, args=[said], daemon=True)
        self._lines.start()

    @property
    def idle(self) -> bool:
        """Whether it waits for a call."""
        return self.ready and self.call is None

    def give(self, call: int, task: Callable[..., object], arguments: Call) -> None:
        self.call = call
        with suppress(OSError):  # Where it is gone, nothing comes back either.
            self.connection.send((task, dict(arguments)))

    def end(self, seconds: float) -> str:
        """End it, unless it does so itself within some seconds; return how it has ended, in words."""
        self.connection.close()
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._lines.join(LAST_WORDS)
        return f"was ended by {Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _listen(self, said: Callable[[str], None]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                said(line.rstrip())


class Pool:
    """Processes that do calls until the pool is closed. A call whose process dies is done again, by another if it can.

    A process that dies is started again, unless it has died ``TRIES`` times without having done anything. A call that
    has lost so many processes fails.

    Args:
        places: what each process sees of the GPUs.
        folder: where calls write.
    """

    def __init__(self, places: Sequence[str | None], *, folder: Path) -> None:
        self.places, self.folder = places, folder
        self.redone = 0
        """How many calls were lost and put back."""
        self._deaths, self._tries = Counter[int](), Counter[int]()
        self._lines: set[str] = set()
        self._workers = {number: self._start(number) for number in range(len(places))}

    @property
    def processes(self) -> int:
        return len(self.places)

    def close(self) -> None:
        """End all processes, whatever they do."""
        for worker in self._workers.values():
            worker.process.kill()
        for worker in self._workers.values():
            self._end(worker)
        self._workers.clear()

    def run(self, task: Callable[..., Result], calls: Sequence[Call]) -> list[Result | Failure]:
        """The results of the calls, in order."""
        deal, found = Deal(len(calls), len(self.places)), dict[int, Result | Failure]()
        self._tries.clear()
        while self._workers and len(found) < len(calls):
            for worker in self._workers.values():
                next_one = deal.take(worker.number, alone=len(self._workers) == 1) if worker.idle else None
                if next_one is not None:
                    worker.give(next_one, task, calls[next_one])
            for worker in self._heard():
                call = worker.call
                try:
                    outcome = worker.connection.recv()
                except (OSError, EOFError):
                    how = self._replace(worker)
                    if call is not None and (failure := self._failure(call, how)):
                        found[call] = failure
                    elif call is not None:
                        deal.put_back(call, worker.number)
                    continue
                worker.ready, worker.call = True, None
                if call is not None:
                    found[call] = outcome
                    self._deaths[worker.number] = 0
        nobody = Failure("no process is left: each has ended several times before it had done anything")
        return [found.get(call, nobody) for call in range(len(calls))]

    def _heard(self) -> list[Worker]:
        """The workers that have something to say, or are gone."""
        heard = wait([worker.connection for worker in self._workers.values()])
        return [worker for worker in self._workers.values() if worker.connection in heard]

    def _replace(self, worker: Worker) -> str:
        """Start another in place of one that is gone; return how that has ended."""
        how = self._end(worker, LAST_WORDS)
        del self._workers[worker.number]
        self._deaths[worker.number] += 1
        if self._deaths[worker.number] < TRIES or (worker.ready and not self._workers):
            self._workers[worker.number] = self._start(worker.number)
        return how

    def _failure(self, call: int, how: str) -> Failure | None:
        """The failure of a call whose process has ended, unless it may be done again."""
        self._tries[call] += 1
        if self._tries[call] < TRIES:
            self.redone += 1
            return None
        memory = ", as where memory runs out; launcher.processes=<fewer> leaves more" if "SIGKILL" in how else ""
        return Failure(f"its process {how} in each of {TRIES} tries{memory}")

    def _start(self, number: int) -> Worker:
        return Worker(number=number, sees=self.places[number], processes=len(self.places), said=self._say)

    def _end(self, worker: Worker, seconds: float = 0.0) -> str:
        how = worker.end(seconds)
        for unfinished in self.folder.rglob(f".{worker.process.pid}-*.part"):
            remove(unfinished)
        return how

    def _say(self, line: str) -> None:
        """Pass a line on that a process prints, once: all of them have the same to say."""
        if line and line not in self._lines:
            self._lines.add(line)
            print(line, file=sys.stderr, flush=True)
