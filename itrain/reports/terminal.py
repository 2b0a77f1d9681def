"""A run on screen: what is about to run, and its results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from itrain.data.splits import SplitDataModule
from itrain.models import BaseModel
from itrain.quantized import count_weights
from itrain.reports.text import plain
from itrain.results.run import Table as FiguresTable
from itrain.results.run import summarise_run
from itrain.shards import own_class
from itrain.training.base import Training
from itrain.training.steering import Steering

QUIET = "ITRAIN_QUIET"
"""The environment variable that silences all but results, in all processes of a run."""

ROOM = 60
"""Columns of a terminal of 80 that a table has for its numbers."""


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
    weights = count_weights(base_model.model)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    kinds = ", ".join(sorted({own_class(part).__name__ for part in module.trained_parts.values()}))
    lines = {
        "model": f"{base_model.name}, {weights:,} parameters, {_state(base_model)}",
        **({"sites": ", ".join(map(str, module.placements))} if module.sites else {}),
        "trains": f"{kinds}, {trained:,} parameters",
        **data.describe(),
        **({"judge": module.judge.name} if isinstance(module, Steering) and module.judge is not None else {}),
        "runs": how,
        "threads": threads,
        "folder": str(folder),
    }
    for name, line in lines.items():
        Console().print(plain(f"{name:8}{line}"), soft_wrap=True)


@rank_zero_only
def announce_best(file: Path, monitor: str, score: float) -> None:
    """Print which weights are tested and exported, where they are not the last ones."""
    if not is_quiet():
        line = f"the best checkpoint's are tested and exported, {monitor} {score:.4g}: {file}"
        Console().print(plain(f"{'weights':8}{line}"), soft_wrap=True)


@rank_zero_only
def announce_controls(names: Sequence[str]) -> None:
    """Print which controls a fit is followed by, and what leaves them out."""
    if names and not is_quiet():
        spoken = ", ".join(name.replace("_", " ") for name in names)
        line = f"the fit is repeated {len(names)} times as a control: {spoken}; vacuity=false leaves these out"
        Console().print(plain(f"{'vacuity':8}{line}"), soft_wrap=True)


def _state(base_model: BaseModel) -> str:
    trained = [parameter.requires_grad for parameter in base_model.model.parameters()]
    state = "all trained" if all(trained) else "partly trained" if any(trained) else "frozen"
    return state if base_model.quantization is None else f"quantised ({base_model.quantization}), {state}"


def show(results: Mapping[str, float], folder: Path) -> None:
    """Print the final figures as a table, with the controls beside them."""
    console, summary = Console(), summarise_run(results)
    for table in summary.tables:
        console.print(_drawn(table))
    for line in summary.lines:
        console.print(plain(line))
    console.print(plain(f"folder: {folder}"), soft_wrap=True)


def _drawn(table: FiguresTable) -> Table:
    two_lines = any(upper for upper, _ in table.heads)
    drawn = Table(title=plain(table.title, "table.title"), box=SIMPLE_HEAD, padding=0 if two_lines else (0, 0, 0, 1))
    drawn.add_column("\n" if two_lines else "", no_wrap=two_lines)
    wide = min(9, ROOM // max(len(table.heads), 1))
    for upper, lower in table.heads:
        head, width = (f"{upper}\n{lower}", wide) if two_lines else (lower, len(lower))
        drawn.add_column(plain(head), justify="right", min_width=width)
    for name, cells in table.rows.items():
        drawn.add_row(*map(plain, (name, *cells)))
    return drawn
