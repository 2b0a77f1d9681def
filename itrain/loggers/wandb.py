"""Weights & Biases: a fit is a run; a sweep is a group of runs, one for each fit and one for its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from wandb.errors import UsageError

from itrain.loggers.base import FinishedFit, digest
from itrain.results.run import RunSummary
from itrain.results.summary import SweepSummary

RESULTS = "results"
"""The name of the table of a sweep."""


class Wandb(WandbLogger):
    """Lightning's logger with an account that is asked for at the start, and sweeps.

    Args:
        project, name, entity, group, job_type, tags, notes, id: as in ``wandb.init``; in a sweep each run has a name,
            job type and id of its own, and the group is that of the sweep unless it is given.
        save_dir: where the runs are kept; in the folder of the run unless told otherwise.
        offline: log to disk without an account, for ``wandb sync`` later.
        log_model: upload checkpoints: the last ones at the end, or all of them at once.

    Raises:
        RuntimeError: neither is there an account nor is it offline.
    """

    def __init__(
        self,
        *,
        project: str,
        name: str | None = None,
        save_dir: str = ".",
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        id: str | None = None,
        offline: bool = False,
        log_model: Literal["all"] | bool = False,
    ) -> None:
        _require_account(offline)
        self.shared = {"entity": entity, "tags": list(tags), "notes": notes}
        self.group, self.project, self.folder = group, project, save_dir
        self.mode: Literal["offline"] | None = "offline" if offline else None
        super().__init__(
            project=project,
            name=name,
            save_dir=save_dir,
            id=id,
            offline=offline,
            # By itself Lightning asks for it in the environment, which wandb reads but once in a process.
            mode=self.mode,
            log_model=log_model,
            group=group,
            job_type=job_type,
            # Otherwise a second logger of a process would go on with the run of the first.
            reinit="create_new",
            **self.shared,
        )

    @rank_zero_only
    def log_run(self, summary: RunSummary, figure: Path) -> None:
        tables = {table.title: wandb.Table(dataframe=table.frame()) for table in summary.tables}
        self.experiment.log({"figure": wandb.Image(str(figure)), **tables})

    def log_fit(self, fit: FinishedFit) -> None:
        with self._run(fit.id, name=fit.name, sweep=fit.sweep, job_type="fit", config=fit.settings) as run:
            for epoch in fit.curve:
                run.log(dict(epoch))
            run.summary.update(fit.figures)

    def log_results(self, sweep: str, summary: SweepSummary, pictures: Mapping[str, Path]) -> None:
        with self._run(digest(sweep), name=sweep, sweep=sweep, job_type="results") as run:
            run.log({RESULTS: wandb.Table(dataframe=summary.frame)})
            run.log({name: wandb.Image(str(file)) for name, file in pictures.items()})

    def _run(self, id: str, *, sweep: str, **settings: Any) -> wandb.Run:
        # Hundreds of runs follow each other, none of which has anything to say of the machine.
        quiet = wandb.Settings(
            silent=True, console="off", x_disable_stats=True, x_disable_meta=True, x_save_requirements=False
        )
        return wandb.init(
            id=id,
            project=self.project,
            group=self.group or sweep,
            dir=self.folder,
            mode=self.mode,
            reinit="create_new",
            settings=quiet,
            **self.shared,
            **settings,
        )


@rank_zero_only
def _require_account(offline: bool) -> None:
    if offline or wandb.setup().settings.mode not in ("online", "shared"):
        return
    try:
        wandb.login()
    except UsageError as error:
        raise RuntimeError(
            "logger=wandb: there is no W&B account on this machine; run `wandb login`, or add logger.offline=true "
            "and upload the runs later with `wandb sync`"
        ) from error
