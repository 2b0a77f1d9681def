"""The folder of a run: the same in all its processes, and gone again where nothing came of the run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from itrain.files import write_text
from itrain.processes import RANKS, rank
from itrain.saved import CONFIGURATION
from itrain.signatures import ConfigError

FOLDER = "ITRAIN_FOLDER"
"""The environment variable that hands the folder of a run to its other processes."""


@contextmanager
def run_folder(configuration: DictConfig) -> Iterator[Path]:
    """A new folder that holds the run's configuration, removed if the run fails and leaves nothing else in it.

    All processes of a run get the same folder, whether Lightning or a launcher starts them.

    Raises:
        ConfigError: the folder cannot be written.
    """
    home = Path(configuration.output, configuration.name).absolute()
    absent = [path for path in (home, *home.parents) if not path.exists()]
    folder = _agreed_folder(home)
    if rank() > 0:
        yield folder
        return
    os.environ[FOLDER] = str(folder)
    try:
        _write_configuration(configuration, folder)
        yield folder
    except BaseException:
        _remove_unused(folder, absent)
        raise
    finally:
        del os.environ[FOLDER]


def _agreed_folder(home: Path) -> Path:
    environment = os.environ
    if FOLDER in environment and any(name in environment for name in RANKS):
        return Path(environment[FOLDER])
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import TCPStore

        # The store that torchrun keeps for its processes, before they have formed a group.
        store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
        key = f"{FOLDER}/{environment['TORCHELASTIC_RESTART_COUNT']}"
        if rank() == 0:
            store.set(key, str(_new_folder(home)))
        return Path(store.get(key).decode())
    if int(environment.get("SLURM_NTASKS", "1")) > 1:
        return home / f"job{environment['SLURM_JOB_ID']}.{environment.get('SLURM_STEP_ID', '0')}"
    return _new_folder(home)


def _new_folder(home: Path) -> Path:
    """A folder named after the time, created at once so that no other run takes it."""
    time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = (time if number == 1 else f"{time}_{number}" for number in count(1))
    while True:
        folder = home / next(names)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise _unwritable(folder, error) from error
        return folder


def _write_configuration(configuration: DictConfig, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIGURATION, OmegaConf.to_yaml(configuration))
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"output: cannot write to '{folder}': {error.strerror}")


def _remove_unused(folder: Path, absent: Sequence[Path]) -> None:
    names = {path.name for path in folder.rglob("*") if not path.is_dir()}
    if names <= {CONFIGURATION, "hparams.yaml"}:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in absent:
            with suppress(OSError):
                parent.rmdir()
