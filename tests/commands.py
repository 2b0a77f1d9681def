"""What tests of the command line share."""

from __future__ import annotations

import signal
from pathlib import Path

SMALL = [
    "trainer.max_epochs=2",
    "data.train_pairs=64",
    "data.validation_pairs=32",
    "data.test_pairs=64",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
]
"""Words that make a fit short."""


def heed_interrupts() -> None:
    """In a child, before it starts: Ctrl-C counts even where the suite runs in a background that ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def only_run(folder: str | Path) -> Path:
    """The folder of the only run below a folder."""
    (found,) = [path.parent for path in Path(folder).rglob("config.yaml")]
    return found
