"""trackio: runs in a local database and a dashboard of them in the browser, ``trackio show``, without an account."""

from __future__ import annotations

import importlib
import io
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from itrain.loggers.base import FinishedFit, beyond_the_test, captions, require_package
from itrain.loggers.runs import RESULTS, Identity, identify_results, legible
from itrain.results.best import BEST, best_table
from itrain.results.run import RunSummary
from itrain.results.summary import SweepSummary


class Trackio(Logger):
    """Logs fits and sweeps to trackio's database, whose folder is ``TRACKIO_DIR`` in the environment.

    Args:
        project, name, group: as in ``trackio.init``; in place of the recipe's name a run has that of its method, site,
            rank and seed, and the group is the recipe or the sweep unless it is given.

    Raises:
        RuntimeError: trackio is not installed.
    """

    def __init__(self, *, project: str, name: str | None = None, group: str | None = None) -> None:
        require_package("trackio")
        super().__init__()
        self.trackio: Any = importlib.import_module("trackio")
        self.project, self.run_name, self.group = project, name, group
        self.run: Any = None

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return self.run_name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        # Left open after a fit, whose test logs to it too; trackio ends it with the process.
        if self.run is None:
            self.run = self._open(name=self.run_name, group=self.group)
        return self.run

    @rank_zero_only
    def identify(self, identity: Identity) -> None:
        # The name that a configuration gives by itself is that of the recipe, which all its runs share.
        if self.run_name in (None, identity.group):
            self.run_name = identity.name
        self.group = self.group or identity.group
        self.log_hyperparams(dict(identity.config))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self.experiment.config.update(params if isinstance(params, dict) else vars(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(legible(metrics), step=step)

    @rank_zero_only
    def log_run(self, summary: RunSummary, figure: Path) -> None:
        tables = {name: self.trackio.Table(dataframe=table.frame()) for name, table in summary.named_tables.items()}
        picture = self.trackio.Image(figure, caption=summary.caption or None)
        self.experiment.log({"figure": picture, **tables, **beyond_the_test(summary)})

    def log_fit(self, fit: FinishedFit) -> None:
        identity = fit.identity
        with self._quietly(name=identity.name, group=self.group or fit.sweep, config=dict(identity.config)) as run:
            for epoch in fit.curve:
                run.log(dict(epoch), step=int(epoch["epoch"]))
            run.log(fit.figures)

    def log_results(self, sweep: str, summary: SweepSummary, pictures: Mapping[str, Path]) -> None:
        config = dict(identify_results(sweep, summary).config)
        time = sweep.rpartition(" ")[2]
        with self._quietly(name=f"{RESULTS} {time}", group=self.group or sweep, config=config) as run:
            read = captions(summary)
            images = {name: self.trackio.Image(file, caption=read.get(name)) for name, file in pictures.items()}
            tables = {RESULTS: summary.frame, BEST: best_table(summary.best).frame()}
            run.log({**{name: self.trackio.Table(dataframe=frame) for name, frame in tables.items()}, **images})

    def _open(self, **settings: Any) -> Any:
        return self.trackio.init(project=self.project, embed=False, **settings)

    @contextmanager
    def _quietly(self, **settings: Any) -> Iterator[Any]:
        """A run of its own; trackio tells of each run that begins and ends."""
        with redirect_stdout(io.StringIO()):
            run = self._open(**settings)
            try:
                yield run
            finally:
                run.finish()
