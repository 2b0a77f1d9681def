"""The verb: runs the rows that are asked for, and keeps the table of all of them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from itrain.reports.reproduction import PAGE, TABLE, list_rows, say, show_table
from itrain.reproducing.rows import chosen, missing, read_rows
from itrain.results.reproduction import FAILED, MISSED, Outcome
from itrain.signatures import ConfigError, nearest
from itrain.stops import Stop
from itrain.telling import RunFailed

HOME = "reproduce"
"""The folder of the table and of all its runs, in that of all runs."""
LIST = ("list", "--list")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for."""

    names: Sequence[str] = ()
    quick: bool = False
    lists: bool = False
    rows: Path | None = None
    output: Path = Path("outputs")

    @classmethod
    def of(cls, words: Sequence[str]) -> Request:
        """The request that words make.

        Raises:
            ConfigError: a word is of no use here.
        """
        found = cls()
        for word in words:
            key, equals, value = word.partition("=")
            if equals and key in ("rows", "output") and value:
                found = replace(found, **{key: Path(value).expanduser()})
            elif word in LIST:
                found = replace(found, lists=True)
            elif word == "quick":
                found = replace(found, quick=True)
            elif equals or word.startswith("-"):
                raise ConfigError(
                    f"'{word}' is not for 'reproduce'{nearest(key, ['rows', 'output', '--list'])}; it takes names of "
                    "rows, quick, list, rows=<folder> and output=<folder>"
                )
            else:
                found = replace(found, names=[*found.names, word])
        return found


def reproduce(words: Sequence[str], stop: Stop) -> None:
    """Run what is asked for, quick rows first, and keep the table; runs of earlier calls are not run again.

    Args:
        words: what follows the verb.
        stop: is told how to go on, should a signal come.

    Raises:
        ConfigError: a word or a file of a row is wrong.
        RunFailed: a row has missed its bounds or has failed, after all others have run.
    """
    request = Request.of(words)
    rows = read_rows(request.rows)
    asked = chosen(rows, request.names, quick=request.quick)
    if request.lists:
        list_rows([Outcome(row=row, needs=missing(row)) for row in asked])
        return
    from itrain.reproducing.progress import Reproduction

    home = request.output / HOME
    reproduction = Reproduction(rows, home)
    stop.advice = lambda: f"to go on: {shlex.join(['itrain', 'reproduce', *words])}"
    for row in asked:
        reproduction.run(row)
    outcomes = [reproduction.outcomes[row.name] for row in asked]
    show_table(outcomes)
    say(f"table: {home / TABLE}")
    say(f"page: {home / PAGE}")
    wrong = {state: [each.row.name for each in outcomes if each.state == state] for state in (MISSED, FAILED)}
    if any(wrong.values()):
        raise RunFailed("; ".join(f"{state}: {', '.join(names)}" for state, names in wrong.items() if names))
