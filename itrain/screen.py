"""The screen: a run goes on without it."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Lasting(io.RawIOBase):
    """Writes to a file descriptor until that fails, and nowhere from then on.

    ``error`` is why. A closed pipe, such as that of ``| head``, and a terminal that is gone end no run.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.error: OSError | None = None

    def write(self, data: Buffer, /) -> int:
        if self.error is None:
            try:
                return os.write(self.descriptor, data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def writable(self) -> bool:
        return True


class Screen:
    """The output streams of a command."""

    def __init__(self) -> None:
        self.streams: dict[str, Lasting] = {}

    @property
    def lost(self) -> str | None:
        """Which stream could not be written to, and why; nothing of it for a reader that has left."""
        for name, stream in self.streams.items():
            if stream.error is not None:
                gone = stream.error.errno in (errno.EPIPE, errno.EIO)
                return "" if gone else f"cannot write to {name}: {stream.error.strerror}"
        return None


@contextmanager
def lasting_screen() -> Iterator[Screen]:
    """While inside, output that cannot be written is dropped, and is no error."""
    screen = Screen()
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            if (stream := getattr(sys, name)) is not None and stream is getattr(sys, f"__{name}__"):
                stack.enter_context(_replaced(name, stream, screen))
        yield screen


@contextmanager
def _replaced(name: str, stream: io.TextIOWrapper, screen: Screen) -> Iterator[None]:
    raw = screen.streams[f"standard {'output' if name == 'stdout' else 'error'}"] = Lasting(stream.fileno())
    lasting = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=name == "stderr" or raw.isatty(),
    )
    setattr(sys, name, lasting)
    try:
        yield
    finally:
        setattr(sys, name, stream)
        lasting.flush()
