"""What a run says on screen: what is about to happen, and what was found."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from itrain.data.splits import SplitDataModule
from itrain.metrics import RULES
from itrain.models import BaseModel
from itrain.training.base import Training

QUIET = "ITRAIN_QUIET"
"""The environment variable that leaves only results to be told, in all processes of a run."""


@contextmanager
def only_results() -> Iterator[None]:
    """Inside, neither what is about to happen nor progress is told."""
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
    """Say what is about to run: model, sites, trained parameters, examples, and how the model is run."""
    if is_quiet():
        return
    weights = sum(parameter.numel() for parameter in base_model.model.parameters())
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    kinds = ", ".join(sorted({type(part).__name__ for part in module.trained_parts.values()}))
    lines = {
        "model": f"{base_model.name}, {weights:,} parameters, {_state(base_model.model)}",
        **({"sites": ", ".join(map(str, module.sites))} if module.sites else {}),
        "trains": f"{kinds}, {trained:,} parameters",
        **data.describe(),
        "runs": how,
        "threads": threads,
        "folder": str(folder),
    }
    for name, line in lines.items():
        Console().print(f"{name:8}{line}", highlight=False, soft_wrap=True)


def _state(model: nn.Module) -> str:
    trained = [parameter.requires_grad for parameter in model.parameters()]
    return "all trained" if all(trained) else "partly trained" if any(trained) else "frozen"


def show(results: Mapping[str, float], folder: Path) -> None:
    """Print the final figures as a table, with the controls beside them."""
    console = Console()
    table = next((make for figure, make in TABLES.items() if figure in results), _figures_table)
    console.print(table(results))
    if "test/rank" in results:
        console.print(f"rank found: {results['test/rank']:g}", highlight=False)
    if "test/task_accuracy" in results:
        start = f", before {results['before/task_accuracy']:.3f}" if "before/task_accuracy" in results else ""
        console.print(f"task accuracy: {results['test/task_accuracy']:.3f}{start}", highlight=False)
    if "model/accuracy" in results:
        console.print(f"the model answers {results['model/accuracy']:.3f} of the inputs drawn right", highlight=False)
    console.print(f"folder: {folder}", highlight=False, soft_wrap=True)


def _pairs_table(results: Mapping[str, float]) -> Table:
    table = Table(title="interchange intervention accuracy on held-out pairs", box=SIMPLE_HEAD, padding=0)
    table.add_column("\n", no_wrap=True)
    changing, preserving = (int(results[f"test/pairs_{kind}"]) for kind in ("changing", "preserving"))
    columns = {
        "iia_changing": f"changing {changing}",
        "iia_preserving": f"preserving {preserving}",
        "iia": f"all {changing + preserving}",
    }
    if "test/disentangle_argmax" in results:
        columns = {figure: figure for figure in ("cause", "isolate", "disentangle")}
    for title in columns.values():
        for rule, head in zip(RULES, (title, ""), strict=True):
            table.add_column(f"{head}\n{rule}", justify="right", min_width=9)
    for place in sorted(
        filter(_is_shown, (key.rpartition("/")[0] for key in results if key.endswith("/iia_argmax"))), key=_rank
    ):
        table.add_row(
            _row_name(place), *(f"{results[f'{place}/{figure}_{rule}']:.3f}" for figure in columns for rule in RULES)
        )
    return table


def _is_control(place: str) -> bool:
    return place.split("/")[1:2] in (["random_subspace"], ["full_vector"])


def _is_shown(place: str) -> bool:
    """All but the parts of controls and those of the start, which the results have too."""
    return not _is_control(place) or (place.startswith("test") and place.count("/") == 1)


def _rank(place: str) -> tuple[bool, bool, int, str]:
    """The trained intervention first, then the start, then the controls, each before its parts."""
    return _is_control(place), place.startswith("before"), place.count("/"), place


def _row_name(place: str) -> str:
    when, _, what = place.partition("/")
    names = {"test": "trained", "before": "before"}
    return what.replace("_", " ") if _is_control(place) else " ".join(filter(None, (names[when], what)))


def _probes_table(results: Mapping[str, float]) -> Table:
    table = Table(title="accuracy of probes on held-out examples", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column()
    figures = {"probe_accuracy": "probe", "control_accuracy": "control", "selectivity": "selectivity"}
    figures |= {"majority_accuracy": "majority", "l2": "l2"}
    present = {figure: title for figure, title in figures.items() if any(f"test/{figure}/" in key for key in results)}
    for title in present.values():
        table.add_column(title, justify="right", min_width=len(title))
    for name in (key.removeprefix("test/l2/") for key in results if key.startswith("test/l2/")):
        values = {figure: results[f"test/{figure}/{name}"] for figure in present}
        table.add_row(name, *(f"{value:g}" if figure == "l2" else f"{value:.3f}" for figure, value in values.items()))
    return table


def _figures_table(results: Mapping[str, float]) -> Table:
    table = Table("figure", "value", title="held-out examples", box=SIMPLE_HEAD)
    for key, value in results.items():
        if key.startswith(("test/", "before/")):
            table.add_row(key.removeprefix("test/").replace("_", " "), f"{value:.3f}")
    return table


TABLES = {"test/iia_pairwise": _pairs_table, "test/probe_accuracy": _probes_table}
"""The table of a run, by a figure that only such runs have."""
