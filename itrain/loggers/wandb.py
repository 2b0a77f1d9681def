"""Weights & Biases: a fit is a run; a sweep is a group of runs, one for each fit and one for its results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from wandb.env import DATA_DIR
from wandb.errors import UsageError

from itrain.loggers.base import FinishedFit, beyond_the_test, captions, digest
from itrain.loggers.runs import RESULTS, Identity, identify_results, legible
from itrain.results.best import BEST, best_table
from itrain.results.columns import COMPONENT, EPOCH, LAYER, METHOD, POSITION, RANK, SEED, VALIDATION
from itrain.results.run import RunSummary
from itrain.results.summary import SweepSummary

REPORT = "report"
"""The page of a sweep, as media."""
EXPORT, SWEEP = "intervention", "sweep"
"""The types of artifacts: of a fit's portable weights, and of a sweep's table, pictures and page."""
FILES = ("results.parquet", "curves.parquet", "config.yaml", "*.png", "*.svg", "*.html")
"""The files of a sweep that its artifact holds."""


class Wandb(WandbLogger):
    """Lightning's logger with an account that is asked for at the start, and sweeps.

    Every run has the whole resolved configuration, and the same names of figures in a fit alone and in a sweep.

    Args:
        project, name, entity, group, job_type, tags, notes, id: as in ``wandb.init``; in place of the recipe's name a
            run has that of its method, site, rank and seed, which are tags too; the group is the recipe or the sweep
            unless it is given. In a sweep each run has a name, job type and id of its own.
        save_dir: where the runs are kept; in the folder of the run unless told otherwise.
        offline: log to disk without an account, for ``wandb sync`` later.
        log_model: upload checkpoints: the last ones at the end, or all of them at once.

    Raises:
        RuntimeError: W&B takes no such project or id, or neither is there an account nor is it offline.
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
        try:
            wandb.Settings(project=project, run_id=id)
        except UsageError as error:
            raise RuntimeError(f"logger: {error}") from error
        _require_account(offline)
        self.shared: dict[str, Any] = {"entity": entity, "notes": notes}
        self.tags = list(tags)
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
            tags=self.tags,
            # Otherwise a second logger of a process would go on with the run of the first.
            reinit="create_new",
            **self.shared,
        )
        self.over_epochs: set[str] = set()
        """The figures whose horizontal axis is the epoch."""
        # Lightning always gives it, and wandb, which knows it no more, warns.
        self._wandb_init.pop("anonymous", None)

    @rank_zero_only
    def identify(self, identity: Identity) -> None:
        # Lightning keeps here what it opens the run with, at the first use.
        opened = self._wandb_init
        # The name that a configuration gives by itself is that of the recipe, which all its runs share.
        if opened.get("name") in (None, identity.group):
            opened["name"] = self._name = identity.name
        opened["group"] = opened.get("group") or identity.group
        opened["job_type"] = opened.get("job_type") or identity.job_type
        opened["tags"] = self._tagged(identity)
        if opened.get("id") is None and identity.former is not None:
            opened["id"] = self._id = _run_of(identity.former)
        self.log_hyperparams(dict(identity.config))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        shown = legible(metrics)
        curve = {name for name in shown if name.startswith(VALIDATION)} - self.over_epochs
        _plot_over_epochs(self.experiment, curve)
        self.over_epochs |= curve
        super().log_metrics(shown, step)

    @rank_zero_only
    def log_run(self, summary: RunSummary, figure: Path) -> None:
        tables = {name: wandb.Table(dataframe=table.frame()) for name, table in summary.named_tables.items()}
        export = figure.parent / "export"
        run = self.experiment
        with _staged(self.folder):
            picture = wandb.Image(str(figure), caption=summary.caption or None)
            run.log({"figure": picture, **tables, **beyond_the_test(summary)})
            if export.is_dir():
                run.log_artifact(_artifact(run, EXPORT, [export]))

    def log_fit(self, fit: FinishedFit) -> None:
        with self._run(fit.id, fit.identity) as run:
            _plot_over_epochs(run, {name for epoch in fit.curve for name in epoch} - {EPOCH})
            for epoch in fit.curve:
                run.log(dict(epoch))
            run.summary.update(fit.figures)

    def log_results(self, sweep: str, summary: SweepSummary, pictures: Mapping[str, Path]) -> None:
        tables = {RESULTS: summary.frame, BEST: best_table(summary.best).frame()}
        page = summary.folder / "report.html"
        with self._run(digest(sweep), identify_results(sweep, summary)) as run, _staged(self.folder):
            run.log({name: wandb.Table(dataframe=frame) for name, frame in tables.items()})
            read = captions(summary)
            run.log({name: wandb.Image(str(file), caption=read.get(name)) for name, file in pictures.items()})
            if page.is_file():
                run.log({REPORT: wandb.Html(str(page), inject=False)})
            run.summary.update({f"best/{row.method}": row.value.value for row in summary.best})
            files = [file for pattern in FILES for file in sorted(summary.folder.glob(pattern))]
            run.log_artifact(_artifact(run, SWEEP, files))

    def _tagged(self, identity: Identity) -> list[str]:
        return list(dict.fromkeys([*self.tags, *identity.tags]))

    def _run(self, id: str, identity: Identity) -> wandb.Run:
        # Hundreds of runs follow each other, none of which has anything to say of the machine.
        quiet = wandb.Settings(
            silent=True, console="off", x_disable_stats=True, x_disable_meta=True, x_save_requirements=False
        )
        return wandb.init(
            id=id,
            name=identity.name,
            project=self.project,
            group=self.group or identity.group,
            job_type=identity.job_type,
            tags=self._tagged(identity),
            config=dict(identity.config),
            dir=self.folder,
            mode=self.mode,
            reinit="create_new",
            settings=quiet,
            **self.shared,
        )


@contextmanager
def _staged(folder: str) -> Iterator[None]:
    """Keep the files of artifacts, which ``wandb sync`` needs, with the run, unless the user has named a place.

    wandb takes the place from the environment alone; what it opens later must find that as it was.
    """
    if DATA_DIR in os.environ:
        yield
        return
    os.environ[DATA_DIR] = str(Path(folder, "wandb").absolute())
    try:
        yield
    finally:
        del os.environ[DATA_DIR]


def _run_of(checkpoint: Path) -> str | None:
    """The id of the newest run in the folder of a checkpoint's fit; None where it logged none there."""
    folders = (parent / "wandb" for parent in checkpoint.parents[:2])
    names = [path.name for folder in folders for path in folder.glob("*run-*-*") if path.is_dir()]
    # run-<time>-<id> or offline-run-<time>-<id>
    runs = sorted(name.partition("run-")[2] for name in names)
    return runs[-1].partition("-")[2] if runs else None


def _plot_over_epochs(run: wandb.Run, figures: Iterable[str]) -> None:
    """Make the epoch the horizontal axis of these figures.

    By their whole names: which of several patterns wins, such as Lightning's for all figures, W&B leaves open.
    """
    for name in (EPOCH, *sorted(figures)) if figures else ():
        run.define_metric(name, step_metric=None if name == EPOCH else EPOCH)


def _artifact(run: wandb.Run, kind: str, paths: Sequence[Path]) -> wandb.Artifact:
    """Named by its run's id, since runs of one name are common; what it is of stands beside it."""
    settings = {key: run.config.get(key) for key in (METHOD, COMPONENT, LAYER, POSITION, RANK, SEED)}
    known = {key: value for key, value in settings.items() if value is not None}
    artifact = wandb.Artifact(
        f"{kind}-{run.id}",
        type=kind,
        description=f"{run.name}, of {run.group}",
        metadata={"run": run.name, "group": run.group, **known},
    )
    for path in paths:
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
    return artifact


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
