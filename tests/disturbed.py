"""A command that something happens to at a chosen moment: ``python -m tests.disturbed <words>``.

The environment variable names the moment, what happens there, and in which process. The processes that a command
starts are this program again, so that the moment may be in any of them.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

DISTURB = "TEST_DISTURB"


class Moment(NamedTuple):
    """A call of a function: the first that a module has of the names, and how many calls go before."""

    module: str
    name: str
    before: int = 0


FIT = {
    "composition": Moment("itrain.config.composition", "check"),
    "model": Moment("itrain.experiment", "open_model"),
    "preparation": Moment("itrain.training.base", "Training.prepare"),
    "start": Moment("itrain.training.callbacks", "Preparation.on_fit_start"),
    "first step": Moment("itrain.training.alignment", "AlignmentSearch.training_step"),
    "step": Moment("itrain.training.alignment", "AlignmentSearch.training_step", 7),
    "last step": Moment("itrain.training.alignment", "AlignmentSearch.training_step", 9),
    "validation": Moment("itrain.training.base", "Training.validation_step", 3),
    "checkpoint": Moment("itrain.training.safeguards", "WholeCheckpoints.save_checkpoint", 1),
    "end of fit": Moment("itrain.training.safeguards", "BetweenSteps.on_train_end"),
    "test": Moment("itrain.training.base", "Training.test_step", 1),
    "figure": Moment("itrain.experiment", "save_run_figure"),
}
SWEEP = {
    "composition": Moment("itrain.config.composition", "check"),
    "model": Moment("itrain.sweeps.run", "open_model"),
    "plan": Moment("itrain.sweeps.run", "Part.plan"),
    "preparation": Moment("itrain.training.cohort", "Cohort.prepare"),
    "first step": Moment("itrain.training.cohort", "Cohort.training_step"),
    "step": Moment("itrain.training.cohort", "Cohort.training_step", 9),
    "validation": Moment("itrain.training.cohort", "Cohort.validation_step", 1),
    "test": Moment("itrain.training.cohort", "Cohort.test_step", 1),
    "rows": Moment("itrain.sweeps.run", "write", 1),
    "probes": Moment("itrain.training.probing", "ProbeTraining.training_step"),
    "table": Moment("itrain.sweeps.run", "collect"),
    "report": Moment("itrain.sweeps.run", "write_report"),
}


def heed_all() -> None:
    """In a child: signals count even where the suite runs in a background that ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def hang() -> None:
    while True:
        time.sleep(1)


def send(signum: int, times: int = 1, *, everywhere: bool = False) -> None:
    """Send a signal to this process or to all of its run; the second time like someone who has waited a little."""
    for number in range(times):
        if number:
            time.sleep(0.3)
        (os.killpg if everywhere else os.kill)(0 if everywhere else os.getpid(), signum)


ACTIONS: dict[str, Callable[[], None]] = {
    "SIGTERM": functools.partial(send, signal.SIGTERM),
    "SIGINT": functools.partial(send, signal.SIGINT),
    "SIGINT twice": functools.partial(send, signal.SIGINT, 2),
    "SIGHUP": functools.partial(send, signal.SIGHUP),
    "SIGKILL": functools.partial(send, signal.SIGKILL),
    "SIGSTOP": functools.partial(send, signal.SIGSTOP),
    "SIGTERM everywhere": functools.partial(send, signal.SIGTERM, everywhere=True),
    "SIGINT everywhere": functools.partial(send, signal.SIGINT, everywhere=True),
    "SIGINT twice everywhere": functools.partial(send, signal.SIGINT, 2, everywhere=True),
    "SIGHUP everywhere": functools.partial(send, signal.SIGHUP, everywhere=True),
    "hang": hang,
}


def disturb(moment: Moment, action: Callable[[], None], mark: Path) -> None:
    """Let something happen at a moment of this process, once, and leave a file when it does."""
    owner: Any = __import__(moment.module, fromlist=["_"])
    *classes, name = moment.name.split(".")
    for each in classes:
        owner = getattr(owner, each)
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def disturbed(*arguments: Any, **settings: Any) -> Any:
        calls.append(0)
        if len(calls) == moment.before + 1:
            mark.touch()
            action()
        return original(*arguments, **settings)

    setattr(owner, name, disturbed)


def main(words: list[str]) -> int:
    from itrain import cli

    verb, moment, action, rank, mark = os.environ.get(DISTURB, ",,,,").split(",")
    if verb and os.environ.get("LOCAL_RANK", "0") == rank:
        disturb({"fit": FIT, "sweep": SWEEP}[verb][moment], ACTIONS[action], Path(mark))
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
