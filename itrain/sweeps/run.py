"""Runs a sweep: many fits over methods, layers, positions, ranks and seeds, in one table with their controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig

from itrain.experiment import RunError, make_logger, open_model
from itrain.reports.html import REPORT, save_report
from itrain.reports.sweeps import SweepProgress, save_heat_maps, show_sweep
from itrain.reports.tracking import SweepLog
from itrain.sweeps.grid import Grid
from itrain.sweeps.jobs import jobs_of, make_trainer
from itrain.sweeps.results import JOBS, collect, write

if TYPE_CHECKING:
    import pandas


def sweep(cfg: DictConfig, folder: Path) -> pandas.DataFrame:
    """Fit all that the configuration's grid names and write table, heat maps and a summary; goes on where it was left.

    Fits of one layer are trained as a cohort, probes of all sites in one pass. A job that fails is told at the end and
    stops no other.

    Args:
        cfg: the configuration of a fit, with a grid in ``sweep``.
        folder: of the sweep; jobs that have left their rows in it are not run again.

    Raises:
        RunError: a job failed, after all others have run.
    """
    grid: Grid = instantiate(cfg.sweep, _convert_="all")
    (folder / JOBS).mkdir(exist_ok=True)
    log, failed = SweepLog(logger=make_logger(cfg, folder), folder=folder), []
    with SweepProgress(quiet=not cfg.trainer.get("enable_progress_bar", True)) as progress:
        for seed in grid.seeds:
            seeded = _with_seed(cfg, seed)
            grid = instantiate(seeded.sweep, _convert_="all")
            opened = open_model(seeded, folder)
            opened.network.to(make_trainer(seeded).strategy.root_device)
            opened.data.setup("fit")
            jobs = list(jobs_of(grid, seed, opened))
            progress.expect(sum(len(job.fits) for job in jobs) * len(grid.seeds))
            for job in jobs:
                file = folder / JOBS / f"{job.name}.json"
                if not file.is_file():
                    try:
                        rows = job.run(seeded, opened, grid)
                    # A fault of one job must not cost the others' results; it is told at the end.
                    except Exception as error:
                        failed.append(f"{job.name}: {type(error).__name__}: {error}")
                        continue
                    write(rows, file)
                rows = json.loads(file.read_text())
                progress.done(rows)
                log.fits(rows)
    frame = collect(folder)
    save_heat_maps(frame, folder / "heat_maps.png")
    save_report([folder], folder / REPORT)
    log.results(frame, folder / "heat_maps.png")
    show_sweep(frame, folder)
    if failed:
        raise RunError(f"{len(failed)} of the jobs failed, and their fits are missing: {'; '.join(failed)}")
    return frame


def _with_seed(cfg: DictConfig, seed: int) -> DictConfig:
    seeded = cfg.copy()
    seeded.seed = seed
    return seeded
