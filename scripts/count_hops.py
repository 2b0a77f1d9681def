"""Counts what one training step of recipe das_gender runs of itrain's own code: calls, functions and files.

Counted is ``training_step``, as Lightning calls it: the source run, the base run and the loss, without the backward
pass, the optimizer and Lightning's own loop. The steps before it have filled the caches. A function counts once,
however often it is called, and so does a method, a property or a function within a function. Comprehensions, generator
expressions and lambdas are parts of the function that they stand in: they are left out of functions and calls. Code
that a decorator such as ``dataclass`` writes has no file and is left out too, and so are torch, transformers and
Lightning.

    python scripts/count_hops.py          # one line for plain hooks, one for replay
    python scripts/count_hops.py --list   # and each function, with its calls
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import itrain
from itrain.config import compose
from itrain.experiment import fit
from itrain.training.alignment import AlignmentSearch

PACKAGE = Path(itrain.__file__).parent
SETTINGS = ("recipe=das_gender", "data.train_pairs=32", "trainer.max_epochs=4", "data.test_pairs=8")
"""One batch an epoch, so that each epoch after the first finds its examples in the caches."""
UNNAMED = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<lambda>")


@dataclass(frozen=True)
class Hops:
    """The functions of the package that a step calls, by file and name, and how often."""

    functions: Counter[tuple[str, str]]

    @property
    def files(self) -> int:
        return len({file for file, _ in self.functions})

    def listed(self) -> str:
        """Each function with its calls, a line each."""
        return "\n".join(f"    {times:3}  {file}:{name}" for (file, name), times in sorted(self.functions.items()))

    def __str__(self) -> str:
        return f"{self.functions.total()} calls of {len(self.functions)} functions in {self.files} files"


def count(*overrides: str) -> Hops:
    """The hops of a fit's last step."""
    found: list[Counter[CodeType]] = []
    step = AlignmentSearch.training_step

    def counted(module: AlignmentSearch, *args: Any) -> Any:
        calls: Counter[CodeType] = Counter()

        def note(frame: FrameType, event: str, argument: object) -> None:
            if event == "call":
                calls[frame.f_code] += 1

        found.append(calls)
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            return step(module, *args)
        finally:
            sys.setprofile(before)

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(AlignmentSearch, "training_step", counted),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        fit(compose([*SETTINGS, *overrides]), Path(folder))
    return Hops(own(found[-1]))


def own(calls: Counter[CodeType]) -> Counter[tuple[str, str]]:
    """The named functions of the package among those that were called, by file and by first line and name."""
    found: Counter[tuple[str, str]] = Counter()
    for code, times in calls.items():
        file = Path(code.co_filename)
        if file.is_relative_to(PACKAGE) and code.co_name not in UNNAMED:
            found[str(file.relative_to(PACKAGE)), f"{code.co_firstlineno} {code.co_name}"] += times
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name each function")
    arguments = parser.parse_args()
    for name, way in (("hooks", "off"), ("replay", "on")):
        hops = count(f"network.replay={way}")
        print(f"{name}: {hops}")
        if arguments.list:
            print(hops.listed())


if __name__ == "__main__":
    main()
