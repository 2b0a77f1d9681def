"""Runs of a row: each seed in a folder of its own, found again by what decides its figures."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from itrain import __version__, config, experiment
from itrain.config.overrides import quoted
from itrain.config.tables import fill_in_fingerprint
from itrain.files import write_json
from itrain.owned import runs_on_all_devices
from itrain.reproducing.figures import figures_of, require_figures
from itrain.reproducing.rows import words_of
from itrain.results.reproduction import Row, Run
from itrain.run_folder import run_folder
from itrain.signatures import ConfigError
from itrain.sweeps.launching import Failure, attempt
from itrain.sweeps.run import sweep
from itrain.telling import RunFailed, one_line

RECORD, LOG = "reproduction.json", "log.txt"
"""What a finished run leaves in its folder besides what every run does, and where a seed's last run has printed."""
_FREE = ("output", "name", "logger")
"""Keys of a configuration that change no figure."""


class Runs:
    """The runs of a row, those of earlier calls too.

    Args:
        row: what is run.
        home: the folder of the runs of all rows.

    Raises:
        ConfigError: the row's command asks for what cannot be run, or its figures are none of the run's.
    """

    def __init__(self, row: Row, home: Path) -> None:
        self.row, self.folder = row, home / row.name
        self._sweeps = words_of(row.command)[0] == "sweep"
        # One seed stands for all, whichever the row lists.
        composed = config.compose(self._words(0), sweeps=self._sweeps)
        require_figures(row.figures, list(composed.sweep.methods) if self._sweeps else None)
        fill_in_fingerprint(composed)
        if runs_on_all_devices(composed.trainer) or composed.trainer.get("devices", 1) != 1:
            raise ConfigError("command: a row runs in one process, on one device: leave trainer.devices=1")
        asked: Any = OmegaConf.to_container(composed, resolve=not self._sweeps)
        decides = {key: value for key, value in asked.items() if key not in _FREE}
        written = json.dumps([__version__, row.command, decides], sort_keys=True)
        self.identity = sha256(written.encode()).hexdigest()

    def kept(self) -> list[Run]:
        """The finished runs of the row as it stands now, in the order of its seeds.

        Raises:
            ConfigError: they have no figure of a name that the row gives.
        """
        found = []
        for seed in self.row.seeds:
            for file in sorted(self._home(seed).glob(f"*/{RECORD}"), reverse=True):
                record = json.loads(file.read_text(encoding="utf-8"))
                if record["identity"] == self.identity:
                    found.append(self._run(seed, file.parent, record))
                    break
        return found

    def run(self, seed: int) -> Run | Failure:
        """Run one seed and keep it, or say in one line why that failed; the log has what it printed."""
        log = self.log(seed)
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads()
        try:
            with log.open("w", encoding="utf-8") as printed, redirect_stdout(printed):
                return attempt(self._kept_run, seed=seed)
        finally:
            torch.set_num_threads(threads)  # A run sets them by the size of its model.

    def log(self, seed: int) -> Path:
        """The file of what a seed's last run has printed."""
        return self._home(seed) / LOG

    def _kept_run(self, seed: int) -> Run | Failure:
        try:
            configuration = config.request(self._words(seed), sweeps=self._sweeps)
            with run_folder(configuration) as folder, one_line(configuration):
                start = time.perf_counter()
                (sweep if self._sweeps else experiment.fit)(configuration, folder)
                record = {
                    "identity": self.identity,
                    "seconds": time.perf_counter() - start,
                    "made_with": {**_machine(), **configuration.versions, "commit": configuration.commit},
                }
                write_json(folder / RECORD, record)
                return self._run(seed, self._home(seed) / folder.name, record)
        except (ConfigError, RunFailed) as error:
            return Failure(str(error))
        except Exception:
            traceback.print_exc(file=sys.stdout)
            raise

    def _words(self, seed: int) -> list[str]:
        """What follows the verb in the command of one seed, with the place of its run."""
        words = words_of(self.row.command_of(seed))[1:]
        return [*words, f"output={quoted(str(self.folder))}", f"name=seed{seed}", "trainer.enable_progress_bar=false"]

    def _run(self, seed: int, folder: Path, record: Mapping[str, Any]) -> Run:
        return Run(
            seed=seed,
            folder=str(folder),
            seconds=record["seconds"],
            made_with=record["made_with"],
            figures=figures_of(folder, self.row.figures, sweeps=self._sweeps),
        )

    def _home(self, seed: int) -> Path:
        return self.folder / f"seed{seed}"


def _machine() -> dict[str, Any]:
    """What this machine computes with."""
    available = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _processor(),
        "cores": len(available(0)) if available else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
    }


def _processor() -> str:
    """The name of the CPU, as Linux tells it; elsewhere its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
