"""What tests that start processes share."""

from __future__ import annotations

import signal


def heed_interrupts() -> None:
    """In a child, before it starts: Ctrl-C counts even where the suite runs in a background that ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
