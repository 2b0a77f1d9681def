"""A reproduction under way: what has come of each row, on screen and in the table after each run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from itrain.reports.reproduction import say, write_table
from itrain.reproducing.rows import missing
from itrain.reproducing.runs import Runs
from itrain.results.reproduction import Outcome, Row
from itrain.signatures import ConfigError
from itrain.sweeps.launching import Failure


class Reproduction:
    """All rows with their runs, those of earlier calls too; the table is written after each change.

    Args:
        rows: of the table, by name.
        home: the folder of the table and of the runs.
    """

    def __init__(self, rows: Mapping[str, Row], home: Path) -> None:
        self.home = home
        self.outcomes: dict[str, Outcome] = {}
        self._runs: dict[str, Runs] = {}
        for row in rows.values():
            self.outcomes[row.name] = Outcome(row=row, needs=missing(row))
            if (home / row.name).is_dir() and self.outcomes[row.name].needs is None:
                self._open(row)
        write_table(list(self.outcomes.values()), home)

    def run(self, row: Row) -> None:
        """Run the seeds of a row that are not there, up to the first that fails."""
        if self.outcomes[row.name].needs is not None:
            return
        runs = self._runs.get(row.name) or self._open(row)
        there = {run.seed for run in self.outcomes[row.name].runs}
        for seed in row.seeds:
            if runs is not None and seed not in there and self.outcomes[row.name].error is None:
                self._run(runs, seed)
        write_table(list(self.outcomes.values()), self.home)

    def _open(self, row: Row) -> Runs | None:
        """The runs of a row; None where its command is wrong, which is kept as its error."""
        outcome = self.outcomes[row.name]
        try:
            runs = self._runs[row.name] = Runs(row, self.home)
            self.outcomes[row.name] = replace(outcome, runs=runs.kept())
        except ConfigError as error:
            self.outcomes[row.name] = replace(outcome, error=str(error))
        return self._runs.get(row.name)

    def _run(self, runs: Runs, seed: int) -> None:
        row, outcome = runs.row, self.outcomes[runs.row.name]
        name = f"{row.name}, seed {seed}"
        about = "" if row.minutes is None else f" (about {row.minutes:g} min)"
        say(f"{name}{about}: itrain {row.command_of(seed)}")
        run = runs.run(seed)
        if isinstance(run, Failure):
            say(f"{name}: failed: {run.message}; log: {runs.log(seed)}")
            self.outcomes[row.name] = replace(outcome, error=f"seed {seed}: {run.message}")
            return
        found = ", ".join(f"{figure} {value:.3f}" for figure, value in run.figures.items())
        say(f"{name}: {found}; {run.seconds / 60:.1f} min")
        order = {seed: place for place, seed in enumerate(row.seeds)}
        every = sorted([*outcome.runs, run], key=lambda each: order[each.seed])
        self.outcomes[row.name] = replace(outcome, runs=every)
        write_table(list(self.outcomes.values()), self.home)
