"""Another process that orders sets in another way, in which functions of the tests are called."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PROGRAM = """
import importlib, sys

answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    module, name = line.split()
    print(repr(getattr(importlib.import_module(module), name)()), file=answers, flush=True)
"""


class Elsewhere:
    """Calls functions of test files without arguments, in one process that starts with the first call."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, function: Callable[[], object]) -> str:
        """The ``repr`` of what the function returns there."""
        module, name = f"tests.{function.__module__.rpartition('.')[2]}", function.__qualname__
        process = self.process = self.process or self._start()
        assert process.stdin and process.stdout
        print(module, name, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        assert answer, f"{module}.{name} failed in the other process, which has said why"
        return answer.rstrip("\n")

    def close(self) -> None:
        if self.process is not None:
            with self.process:  # which closes the pipes and waits
                self.process.kill()

    def _start(self) -> subprocess.Popen[str]:
        seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        words = [sys.executable, "-W", "ignore", "-c", PROGRAM]
        return subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
