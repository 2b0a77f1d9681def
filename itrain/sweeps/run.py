"""Runs a sweep: many fits over methods, layers, positions, ranks and seeds, in one table with their controls."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import distributed

from itrain.files import write_json
from itrain.loggers.base import SweepLog
from itrain.opening import Opened, open_model
from itrain.owned import runs_on_all_devices
from itrain.processes import rank
from itrain.reports.curves import save_curves
from itrain.reports.heat_maps import save_comparison, save_heat_maps
from itrain.reports.html import REPORT, write_report
from itrain.reports.sweeps import SweepProgress, show_sweep
from itrain.reports.terminal import aligned, described
from itrain.results.summary import summarise
from itrain.results.table import JOBS, collect, read_rows, require_rows, table_of_jobs, write
from itrain.results.tokens import save_tokens
from itrain.sweeps.devices import Devices, Pool, told
from itrain.sweeps.grid import Grid, reads_only
from itrain.sweeps.jobs import Job, jobs_of
from itrain.sweeps.launching import Failure, Plugin, attempt, repeating
from itrain.sweeps.rows import identity, make_trainer
from itrain.tasks import TaskError
from itrain.tasks.base import Task
from itrain.tasks.contract import count_classes
from itrain.trainers import RunError, make_logger

if TYPE_CHECKING:
    import pandas

WALL_TIME = "wall_time.json"


def sweep(cfg: DictConfig, folder: Path) -> pandas.DataFrame:
    """Run all fits of the configuration's grid, and write table, heat maps and report; resume a stopped sweep.

    Fits of one layer are trained as a cohort, probes of all sites in one fit. A failed job is reported at the end and
    stops no other. Jobs run one after the other in this process, or where a launcher runs them; the results are the
    same. Under DDP or FSDP all processes share each job, a failed one ends the sweep, and the first process writes.

    Args:
        cfg: the configuration of a fit, with a grid in ``sweep`` and perhaps a ``launcher``.
        folder: the sweep's; jobs whose rows are in it are not run again.

    Raises:
        RunError: a job failed, after all others have run; or a launcher's process cannot open model and data.
    """
    grid: Grid = instantiate(cfg.sweep, _convert_="all")
    folder = folder.absolute()
    (folder / JOBS).mkdir(exist_ok=True)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    logger = make_logger(cfg, folder) if rank() == 0 else None
    log = SweepLog(logger=logger, folder=folder, configuration=resolved)
    start, processes, redone = time.monotonic(), 1, 0
    with SweepProgress(quiet=rank() > 0 or not cfg.trainer.get("enable_progress_bar", True)) as progress:
        finished = Finished(folder=folder, progress=progress, log=log)
        if cfg.get("launcher") is None:
            failed = _run_here(cfg, folder, grid.seeds, finished)
            processes = _count_processes()
        else:
            with _launched(cfg, folder, progress) as launcher:
                failed = _run_launched(cfg, folder, grid.seeds, finished, launcher)
                processes, redone = launcher.processes, launcher.redone
    missing = f"{len(failed)} of the jobs failed, and their fits are missing: {_told(failed)}"
    if not any((folder / JOBS).glob("*.json")):
        raise RunError(missing)
    finished.require_known()
    took = WallTime(seconds=time.monotonic() - start, processes=processes, redone=redone)
    if rank() > 0:
        return table_of_jobs(folder)
    took.keep(folder)
    frame = collect(folder)
    (summary,) = summarise([folder])
    heat_maps = save_heat_maps(summary)
    save_curves(summary)
    write_report([summary], folder / REPORT)
    log.results(summary, lambda: {**heat_maps, **save_comparison(summary, folder)})
    show_sweep(summary, folder / REPORT, took.told)
    if failed:
        raise RunError(missing)
    return frame


@dataclass(frozen=True, kw_only=True)
class WallTime:
    """How long the jobs of a sweep took, from the first to the last."""

    seconds: float
    processes: int | None
    """None: as many as a launcher of others has started."""
    redone: int
    """How many jobs were done again, since their process had died."""

    def keep(self, folder: Path) -> None:
        """Write it to the sweep's folder, after those of the times before that the sweep was resumed."""
        file = folder / WALL_TIME
        before = json.loads(file.read_text()) if file.is_file() else []
        write_json(file, [*before, asdict(self)])

    @property
    def told(self) -> str:
        count = {None: "", 1: " in 1 process"}.get(self.processes, f" in {self.processes} processes")
        return f"wall time {self.seconds:.0f} s{count}" + (f"; {self.redone} jobs done again" if self.redone else "")


@dataclass(frozen=True, kw_only=True)
class Part:
    """The jobs of one seed, with the model and the data that they share."""

    cfg: DictConfig
    folder: Path
    grid: Grid
    opened: Opened
    jobs: Mapping[str, Job]

    def plan(self) -> dict[str, int]:
        """The number of fits of each job. For the first seed, also write the tokens of an example, for pictures.

        Raises:
            ValueError: rows that a job has left are damaged, or those of other fits.
        """
        for name, job in self.jobs.items():
            if (file := _rows_of(self.folder, name)).is_file():
                require_rows(file, [identity(fit, self.grid) for fit in job.fits])
        if self.cfg.seed == self.grid.seeds[0] and rank() == 0:
            inputs, sites = self.opened.data.edited()[0], self.grid.all_sites(self.opened)
            save_tokens(inputs, sites, self.opened.base_model.tokenizer, self.folder)
        return {name: len(job.fits) for name, job in self.jobs.items()}

    @property
    def announced(self) -> list[str]:
        """What the sweep is about to run and what it leaves out, a line each."""
        model, sites = self.opened.base_model, len(self.grid.all_sites(self.opened))
        lines = {
            "model": described(model),
            "methods": ", ".join(self.grid.methods),
            "sites": f"{sites}, fitted in {len(self.jobs)} jobs for each seed",
            **self.opened.data.describe(),
            "threads": self.opened.threads,
            "folder": str(self.folder),
        }
        return [*aligned(lines), *self.grid.left_out(model.model)]

    def run(self, name: str) -> None:
        """Run a job and write its rows, unless its file exists."""
        file = _rows_of(self.folder, name)
        if not file.is_file():
            rows = self.jobs[name].run(self.cfg, self.opened, self.grid)
            if rank() == 0:
                write(rows, file)


def _require_classes(method: str, task: Task, grid: Grid) -> None:
    """Refuse probes of variables without values to tell apart, before anything is fitted."""
    try:
        for variable in task.variables:
            count_classes(task, variable)
    except TaskError as error:
        others = ",".join(name for name in grid.methods if name != method)
        raise TaskError(f"{error}; or leave probes out: sweep.methods=[{others}]") from error


def open_part(cfg: DictConfig, folder: Path, seed: int, before: Part | None = None) -> Part:
    """A seed's part of the sweep. It reuses the cache of the part before, where the model is the same."""
    seeded = cfg.copy()
    seeded.seed = seed
    grid: Grid = instantiate(seeded.sweep, _convert_="all")
    trainer = make_trainer(seeded)
    training = instantiate(seeded.training, _convert_="all").func
    like = None if before is None else before.opened
    opened = open_model(seeded, folder, trainable=training.trains_model, like=like, trainer=trainer)
    for method, factory in grid.methods.items():
        if reads_only(factory):
            _require_classes(method, opened.task, grid)
    opened.network.to(trainer.strategy.root_device)
    opened.data.setup("fit")
    jobs = {job.name: job for job in jobs_of(grid, seed, opened, training)}
    return Part(cfg=seeded, folder=folder, grid=grid, opened=opened, jobs=jobs)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Reports each awaited job once its rows are written."""

    folder: Path
    progress: SweepProgress
    log: SweepLog
    waiting: list[str] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    """The names of all jobs so far."""

    def wait_for(self, name: str) -> None:
        self.waiting.append(name)
        self.known.add(name)

    def require_known(self) -> None:
        """Refuse rows of jobs that this sweep does not have.

        Raises:
            RunError: naming a file.
        """
        for file in sorted((self.folder / JOBS).glob("*.json")):
            if file.stem not in self.known:
                raise RunError(f"'{file}' belongs to no job of this sweep; remove it, and resume the sweep")

    def tell(self) -> None:
        for name in [name for name in self.waiting if _rows_of(self.folder, name).is_file()]:
            self.waiting.remove(name)
            rows = read_rows(_rows_of(self.folder, name))
            self.progress.done(rows)
            self.log.fits(rows)


def _run_here(cfg: DictConfig, folder: Path, seeds: Sequence[int], finished: Finished) -> dict[str, str]:
    """Run all jobs one after the other; return the errors, by job."""
    failed, part = {}, None
    for seed in seeds:
        part = open_part(cfg, folder, seed, part)
        if seed == seeds[0]:
            for line in part.announced:
                finished.progress.say(line)
        finished.progress.expect(sum(part.plan().values()) * len(seeds))
        for name in part.jobs:
            finished.wait_for(name)
            outcome = attempt(part.run, name=name)
            if isinstance(outcome, Failure):
                if runs_on_all_devices(cfg.trainer):
                    # The others may wait for this process within the job.
                    raise RunError(f"{name}: {outcome.message}")
                failed[name] = outcome.message
            finished.tell()
    if _count_processes() > 1:
        distributed.barrier()  # or some might miss the rows of the last job
    return failed


def _count_processes() -> int:
    """The processes that have shared each job."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


@contextmanager
def _launched(cfg: DictConfig, folder: Path, progress: SweepProgress) -> Iterator[Pool | Plugin]:
    """The launcher of the configuration: the processes of this machine that it starts, or Hydra's plugin."""
    if get_object(cfg.launcher._target_) is not Devices:
        yield Plugin(launcher=cfg.launcher, folder=folder, name=cfg.name)
        return
    places = instantiate(cfg.launcher).places(str(cfg.trainer.get("accelerator", "auto")))
    progress.say(f"processes {len(places)}, on {told(places)}")
    pool = Pool(places, folder=folder)
    try:
        yield pool
    finally:
        pool.close()


def _run_launched(
    cfg: DictConfig, folder: Path, seeds: Sequence[int], finished: Finished, launcher: Pool | Plugin
) -> dict[str, str]:
    """Run all jobs through the launcher, and nothing of the model in this process; return the errors, by job."""
    known = {"configuration": OmegaConf.to_yaml(cfg), "folder": folder}
    plans: dict[int, Mapping[str, int]] = {}
    planned = launcher.run(partial(_plan, **known), [{"seed": seed} for seed in seeds])
    for seed, found in zip(seeds, planned, strict=True):
        if isinstance(found, Failure):
            raise RunError(found.message)
        plans[seed], lines = found
        for line in lines if seed == seeds[0] else ():
            finished.progress.say(line)
    finished.progress.expect(sum(sum(plan.values()) for plan in plans.values()))
    for plan in plans.values():
        for name in plan:
            finished.wait_for(name)
    finished.tell()
    calls = [{"seed": seed, "name": name} for seed, plan in plans.items() for name in plan if name in finished.waiting]
    if not calls:
        return {}
    with repeating(finished.tell):
        outcomes = launcher.run(partial(_run, **known), calls)
    finished.tell()
    return {
        str(call["name"]): outcome.message
        for call, outcome in zip(calls, outcomes, strict=True)
        if isinstance(outcome, Failure) and call["name"] in finished.waiting
    }


def _plan(configuration: str, folder: Path, seed: int) -> tuple[dict[str, int], list[str]]:
    part = _part(configuration, folder, seed)
    return part.plan(), part.announced


def _run(configuration: str, folder: Path, seed: int, name: str) -> None:
    # Another process may have done it before it was lost.
    if not _rows_of(folder, name).is_file():
        _part(configuration, folder, seed).run(name)


def _part(configuration: str, folder: Path, seed: int) -> Part:
    """The seed's part, which a process keeps for its next job, but no two: they may be too large for one device."""
    key = configuration, folder, seed
    if key not in _kept:
        _kept.clear()
        cfg = OmegaConf.create(configuration)
        assert isinstance(cfg, DictConfig)
        _kept[key] = open_part(cfg, folder, seed)
    return _kept[key]


_kept: dict[tuple[str, Path, int], Part] = {}


def _rows_of(folder: Path, name: str) -> Path:
    return folder / JOBS / f"{name}.json"


def _told(failed: Mapping[str, str]) -> str:
    """The errors, each with the jobs in which it occurred."""
    jobs: dict[str, list[str]] = {}
    for name, message in failed.items():
        jobs.setdefault(message, []).append(name)
    return "; ".join(f"{', '.join(names)}: {message}" for message, names in jobs.items())
