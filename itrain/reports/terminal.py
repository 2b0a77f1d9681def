"""A run on screen: what is about to run, and its results."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from itrain.data.splits import SplitDataModule
from itrain.models import BaseModel
from itrain.quantized import count_weights
from itrain.reports.generations import print_generations
from itrain.reports.tables import print_table
from itrain.reports.text import plain
from itrain.results.run import summarise_run
from itrain.shards import own_class
from itrain.training.base import Training
from itrain.training.steering import Steering

QUIET = "ITRAIN_QUIET"
"""The environment variable that silences all but results, in all processes of a run."""
NAMES = 7
"""Letters of the names before a run's lines, or as many as the longest has."""


@contextmanager
def only_results() -> Iterator[None]:
    """Print results alone while inside: no announcement, no progress."""
    before = os.environ.get(QUIET)
    os.environ[QUIET] = "1"
    try:
        yield
    finally:
        os.environ.pop(QUIET)
        if before is not None:
            os.environ[QUIET] = before


def is_quiet() -> bool:
    return os.environ.get(QUIET, "0") not in ("", "0")


@rank_zero_only
def announce(
    base_model: BaseModel,
    data: SplitDataModule,
    module: Training,
    folder: Path,
    *,
    how: str,
    threads: str,
) -> None:
    """Print what is about to run: model, sites, trained parameters, examples, and how the model is run."""
    if is_quiet():
        return
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    kinds = ", ".join(sorted({own_class(part).__name__ for part in module.trained_parts.values()}))
    lines = {
        "model": described(base_model),
        **({"sites": ", ".join(map(str, module.placements))} if module.sites else {}),
        "trains": f"{kinds}, {trained:,} parameters",
        **data.describe(),
        **({"judge": module.judge.name} if isinstance(module, Steering) and module.judge is not None else {}),
        "runs": how,
        "threads": threads,
        "folder": str(folder),
    }
    say_lines(lines)


def aligned(lines: Mapping[str, str]) -> list[str]:
    """Lines behind their names, which have a column of their own."""
    width = max(NAMES, *map(len, lines)) + 1
    return [f"{name:{width}}{line}" for name, line in lines.items()]


def say_lines(lines: Mapping[str, str]) -> None:
    """Print lines behind their names."""
    for line in aligned(lines):
        Console().print(plain(line), soft_wrap=True)


def described(base_model: BaseModel) -> str:
    """A model in a line: its name, its size, and whether it is trained."""
    return f"{base_model.name}, {count_weights(base_model.model):,} parameters, {_state(base_model)}"


@rank_zero_only
def announce_best(file: Path, monitor: str, score: float) -> None:
    """Print which weights are tested and exported, where they are not the last ones."""
    if not is_quiet():
        say_lines({"weights": f"best checkpoint, tested and exported: {monitor} {score:.4g}, {file}"})


@rank_zero_only
def announce_controls(names: Sequence[str]) -> None:
    """Print which controls a fit is followed by, and what leaves them out."""
    if names and not is_quiet():
        spoken = ", ".join(name.replace("_", " ") for name in names)
        say_lines({"vacuity": f"{len(names)} control fits follow: {spoken} (vacuity=false leaves them out)"})


def _state(base_model: BaseModel) -> str:
    trained = [parameter.requires_grad for parameter in base_model.model.parameters()]
    state = "all trained" if all(trained) else "partly trained" if any(trained) else "frozen"
    return state if base_model.quantization is None else f"quantised ({base_model.quantization}), {state}"


def show(results: Mapping[str, float], folder: Path, texts: Mapping[str, Sequence[str]] | None = None) -> None:
    """Print the final figures as tables with the controls beside them, texts where there are some, and the folder."""
    console, summary = Console(), summarise_run(results)
    for table in summary.tables:
        print_table(console, table)
    for line in summary.lines:
        console.print(plain(line))
    if texts is not None:
        print_generations(texts)
    console.print(plain(f"folder: {folder}"), soft_wrap=True)


def suggest(commands: Mapping[str, str]) -> None:
    """Print which commands come next, each with what it gives."""
    if is_quiet():
        return
    width = max(map(len, commands))
    for number, (command, gives) in enumerate(commands.items()):
        Console().print(plain(f"{'' if number else 'next:':6}{command:{width}}  # {gives}"), soft_wrap=True)


def typed(path: Path) -> str:
    """A path as it is typed in a command here."""
    absolute, here = path.absolute(), Path.cwd()
    return shlex.quote(str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute))
