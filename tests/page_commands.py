"""The commands on the pages: long ones are composed and checked as a run would be, short ones run in this process."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import itrain
from itrain import cli, config
from itrain.reproducing.rows import chosen, read_rows
from itrain.reproducing.verb import Request
from tests.pages import HOME

SMALL = ["data.train_pairs=32", "data.validation_pairs=16", "data.test_pairs=16", "trainer.max_epochs=1"]
OF_A_RUN = re.compile(r"(?:outputs/(\w+)/<time>|<run>)")
COMPOSED = ("fit", "sweep", "test", "plan", "reproduce")
"""Verbs that take long. All others run."""


class PageCommands:
    """Does what a line of a block says, in the folder where the page's files are."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.trained = cache(self._train)

    def __call__(self, line: str) -> str | None:
        """What a command prints; None if it was composed or looked up only.

        Raises:
            AssertionError: the line is no command that can be tried here, or it fails.
        """
        words = shlex.split(line, comments=True)
        while re.match(r"[A-Z_]+=", words[0]) or words[0] == "srun":
            words = words[1:]
        if words[:3] == ["python", "-m", "itrain"]:
            words = words[2:]
        if words[0] == "itrain":
            return self._itrain([OF_A_RUN.sub(lambda found: str(self.trained(found[1])), word) for word in words[1:]])
        assert _exists(words), f"'{line}' cannot be tried here; mark the block: <!-- not run: reason -->"
        return None

    def _itrain(self, words: list[str]) -> str | None:
        if words[0] in COMPOSED and not {"--list", "list", "--help", "-h"} & set(words):
            compose(words[0], words[1:])
            return None
        said, wrong = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
            code = cli.main(words)
        assert code == 0, f"itrain {shlex.join(words)}: {wrong.getvalue()}"
        return said.getvalue()

    def _train(self, recipe: str | None) -> Path:
        """The folder of a short run of a recipe."""
        with contextlib.redirect_stdout(io.StringIO()):
            return itrain.fit(recipe or "das_gender", *SMALL, output=str(self.runs)).folder


def compose(verb: str, words: list[str]) -> None:
    """Compose and check what a command asks for, as `itrain show` does.

    Raises:
        ConfigError: the command would be refused.
    """
    if verb == "reproduce":
        asked = Request.of(words)
        assert chosen(read_rows(asked.rows), asked.names, quick=asked.quick)
        return
    words = [word for word in words if not word.startswith("rate=")]
    if verb == "sweep" and words[0].startswith("resume="):
        # Of a sweep that ran, only what is said besides is left to check.
        recipe = re.search(r"outputs/(\w+)/", words[0])
        words = [f"recipe={recipe[1] if recipe else 'das_vs_probe_gender'}", *words[1:]]
    config.request(words, sweeps=verb == "sweep", tests=verb == "test")


def _exists(words: list[str]) -> bool:
    """Whether what another program is asked for is there: a target, a script, an extra of the package."""
    program, *rest = words
    if program == "make":
        return all(re.search(rf"^{re.escape(each)}:", (HOME / "Makefile").read_text(), re.MULTILINE) for each in rest)
    if program == "python":
        return rest[0].startswith("scripts/") and (HOME / rest[0]).is_file()
    if words[:2] == ["pip", "install"]:
        declared = (HOME / "pyproject.toml").read_text(encoding="utf-8")
        extras = [extra for each in rest for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", each)))]
        return all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras)
    return False
