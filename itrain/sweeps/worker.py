"""A process that does one call after the other for a sweep: ``python -m itrain.sweeps.worker <pipe> <processes>``.

Its parent has given it a device to see and one end of a pipe, from which it takes calls until the pipe is closed.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection

import torch

from itrain import stops
from itrain.processes import PARENT, follow

# All that a job needs is imported before the process says that it is ready.
from itrain.sweeps import run as run
from itrain.sweeps.launching import Failure, attempt

LOST = 75
"""The exit code of a process whose device does nothing any more."""


def main(descriptor: int, processes: int) -> int:
    """Do the calls that come through the pipe; return the exit code."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        # A terminal sends them to the parent, too, which ends this process.
        signal.signal(signum, signal.SIG_IGN)
    follow(int(os.environ[PARENT]))
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    calls = Connection(descriptor)
    try:
        with stops.heeded():
            calls.send(None)
            while True:
                task, arguments = calls.recv()
                outcome = attempt(task, **arguments)
                if isinstance(outcome, Failure) and not device_answers():
                    print(outcome.message, file=sys.stderr, flush=True)
                    return LOST
                calls.send(outcome)
    except EOFError:
        return 0
    except stops.Stopped as stopped:
        return stopped.code


def device_answers() -> bool:
    """Whether the device still works: after some of its errors every later call in the process fails, too."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    # At once: what Python does at its end may wait for a device that is gone.
    code = main(*map(int, sys.argv[1:]))
    sys.stderr.flush()
    os._exit(code)
