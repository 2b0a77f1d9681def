"""The folder of a run: the same in all its processes, and gone again where nothing came of the run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from itrain.config.saved import CONFIGURATION, last_checkpoint
from itrain.files import read_yaml, write_text
from itrain.processes import RANKS, rank
from itrain.signatures import ConfigError

FOLDER = "ITRAIN_FOLDER"
"""The environment variable that hands the folder of a run to its other processes."""
JOBS = ".jobs"
"""The folder beside the runs in which the tasks of SLURM's jobs count their runs."""
RESTARTS = "SLURM_RESTART_COUNT"


@contextmanager
def run_folder(configuration: DictConfig) -> Iterator[Path]:
    """A new folder that holds the run's configuration, removed if the run fails and leaves nothing else in it.

    All processes of a run get the same folder, whether Lightning or a launcher starts them. The same command in a
    SLURM job that was requeued gets the folder it had before, and its newest checkpoint as ``ckpt``.

    Raises:
        ConfigError: the folder cannot be written.
    """
    home = Path(configuration.output, configuration.name).absolute()
    absent = [path for path in (home, *home.parents) if not path.exists()]
    folder = _agreed_folder(home)
    if goes_on := _was_requeued() and folder.exists():
        if _is_of(configuration, folder):
            configuration.ckpt = _kept_before(folder) or configuration.ckpt
        else:
            folder = folder.with_name(f"{folder.name}_restart{os.environ[RESTARTS]}")
            goes_on = False
    if rank() > 0:
        yield folder
        return
    os.environ[FOLDER] = str(folder)
    try:
        if not goes_on:
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
    if "SLURM_JOB_ID" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return _folder_of_job(home)
    return _new_folder(home)


def _folder_of_job(home: Path) -> Path:
    """The folder of this SLURM job's step, with a number for each of its runs but the first.

    The tasks of a step cannot yet speak to each other, but run the same commands in turn: each counts its own.
    """
    step = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', '0')}"
    counted = home / JOBS / f"{step}.{os.environ.get(RESTARTS, '0')}"
    try:
        counted.mkdir(parents=True, exist_ok=True)
        number = next(number for number in count(1) if _created(counted / f"task{rank()}.{number}"))
    except OSError as error:
        raise _unwritable(home, error) from error
    return home / (f"job{step}" if number == 1 else f"job{step}_{number}")


def _created(file: Path) -> bool:
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _was_requeued() -> bool:
    return int(os.environ.get(RESTARTS, "0")) > 0


def _is_of(configuration: DictConfig, folder: Path) -> bool:
    """Whether the folder's run had this configuration; its file may say more than that."""
    file = folder / CONFIGURATION
    return file.is_file() and _says(read_yaml(file), OmegaConf.to_container(configuration, resolve=True))


def _says(saved: object, asked: object) -> bool:
    if isinstance(saved, Mapping) and isinstance(asked, Mapping):
        return all(key in saved and _says(saved[key], value) for key, value in asked.items())
    return saved == asked


def _kept_before(folder: Path) -> str | None:
    """The newest checkpoint of a folder, under a name that Lightning does not load of its own accord.

    It would test ``hpc_ckpt_1.ckpt``, which it writes when SLURM requeues a job, instead of what is trained.
    """
    newest = last_checkpoint(folder)
    if newest is None:
        return None
    taken = folder / "requeued.ckpt" if newest.name.startswith("hpc_ckpt_") else newest
    if rank() == 0:
        newest.replace(taken)
        for earlier in folder.glob("hpc_ckpt_*.ckpt"):
            earlier.unlink()
    return str(taken)


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
    if names <= {CONFIGURATION, "hparams.yaml", "tokens.json"}:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in absent:
            with suppress(OSError):
                parent.rmdir()
