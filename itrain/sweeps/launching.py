"""Calls in other processes, through Hydra's launchers: joblib's on this machine, SLURM's or Ray's on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, ClassVar, TypeAlias, TypeVar

from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from itrain import stops
from itrain.processes import follow_parent

Result = TypeVar("Result")
Call: TypeAlias = Mapping[str, str | int]
"""The arguments of a call."""

TRIES = 3
"""How often a call is made whose process dies."""

SECONDS = 0.5
"""Seconds between two checks for the results of other processes."""


@dataclass(frozen=True)
class Failure:
    """The error of a call, as text: not every exception can be passed between processes."""

    message: str


def attempt(task: Callable[..., Result], **arguments: Any) -> Result | Failure:
    """The task's result or its failure: an error in one job must not lose the results of others."""
    try:
        return task(**arguments)
    except Exception as error:
        return _failure(error)


def launch(
    task: Callable[..., Result],
    calls: Sequence[Call],
    *,
    launcher: DictConfig,
    folder: Path,
    name: str,
) -> Sequence[Result | Failure]:
    """Call a task once for each set of arguments, in the processes of a launcher, and wait for all of them.

    A launcher takes overrides of a configuration; here these are the arguments of a call.

    Args:
        task: picklable; the files that it writes must not depend on the process that calls it.
        launcher: the settings of a launcher as its plugin declares them.
        folder: for the logs of launchers that write any.
        name: the name that a queue shows.

    Returns:
        The results in order. With a process that dies, joblib ends all others: calls are made again, at last each by
        itself. SLURM and Ray put the calls of a lost node back into queues of their own. If the launcher itself fails,
        every call is a failure, even if it has written its files.
    """
    quiet = ["hydra/hydra_logging=none", "hydra/job_logging=none", "hydra.output_subdir=null"]
    place = [f"hydra.sweep.dir={_quoted(str(folder))}", "hydra.sweep.subdir=."]
    with initialize_config_dir(str(folder), job_name=name, version_base="1.3"):
        config = compose(overrides=[*quiet, *place], return_hydra_config=True)
        with open_dict(config):
            config.hydra.launcher = instantiate(launcher, _convert_="all")
        context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
        plugin = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=partial(_call, task), config=config
        )
        overrides = [[f"+{key}={_quoted(value)}" for key, value in call.items()] for call in calls]
        for _ in range(TRIES - 1):
            with suppress(BrokenProcessPool):
                return _launched(plugin, overrides)
        return [_alone(plugin, each) for each in overrides]


def _launched(plugin: Launcher, overrides: Sequence[Sequence[str]]) -> list[Any]:
    """The results of all calls, or that all have failed.

    Raises:
        BrokenProcessPool: one of joblib's processes has died.
    """
    try:
        return [each.return_value for each in plugin.launch(overrides, initial_job_idx=0)]
    except BrokenProcessPool:
        raise
    except Exception as error:
        return [_failure(error)] * len(overrides)


def _alone(plugin: Launcher, override: Sequence[str]) -> Any:
    try:
        return _launched(plugin, [override])[0]
    except BrokenProcessPool as error:
        return _failure(error)


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A launcher of Hydra's, with what is the same in all its launches; the arguments are those of :func:`launch`."""

    launcher: DictConfig
    folder: Path
    name: str
    processes: ClassVar[None] = None
    redone: ClassVar[int] = 0

    def run(self, task: Callable[..., Result], calls: Sequence[Call]) -> Sequence[Result | Failure]:
        return launch(task, calls, launcher=self.launcher, folder=self.folder, name=self.name)


@contextmanager
def repeating(action: Callable[[], None]) -> Iterator[None]:
    """Repeat the action in a thread within the context; raise its error at the end."""
    stop = Event()

    def repeat() -> None:
        while not stop.wait(SECONDS):
            action()

    with ThreadPoolExecutor(1) as threads:
        thread = threads.submit(repeat)
        try:
            yield
        finally:
            stop.set()
    thread.result()


def _call(task: Callable[..., Result], arguments: DictConfig) -> Result | Failure:
    follow_parent()
    # In a process of a launcher, which otherwise would end with a success that nobody has had.
    with nullcontext() if stops.current() else stops.heeded():
        return attempt(task, **{str(key): value for key, value in arguments.items()})


def _failure(error: Exception) -> Failure:
    return Failure(f"{type(error).__name__}: {error}")


def _quoted(value: str | int) -> str | int:
    """A value for Hydra's grammar, which accepts spaces and signs only in quotes."""
    return QuotedString(text=value, quote=Quote.single).with_quotes() if isinstance(value, str) else value
