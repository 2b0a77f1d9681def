"""What a run says on screen: what is about to happen, and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from itrain.data import CounterfactualDataModule
from itrain.metrics import RULES
from itrain.models import BaseModel
from itrain.training.alignment import AlignmentSearch
from itrain.training.probing import ProbeTraining

PLACES = {"trained": "test", "random subspace": "test/random_subspace", "full vector": "test/full_vector"}
"""The rows of the table of a search, and where their figures lie in the results."""


@rank_zero_only
def announce(
    base_model: BaseModel,
    data: CounterfactualDataModule,
    module: AlignmentSearch | ProbeTraining,
    folder: Path,
    *,
    how: str,
) -> None:
    """Say what is about to run: model, sites, trained parameters, pairs, and how the model is run."""
    weights = sum(parameter.numel() for parameter in base_model.model.parameters())
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    kinds = ", ".join(sorted({type(part).__name__ for part in module.trained_parts.values()}))
    pairs = (
        f"{len(dataset)} {split} ({int(dataset.pairs.changes.sum())} change the label)"
        for split, dataset in data.datasets.items()
    )
    lines = {
        "model": f"{base_model.name}, {weights:,} parameters, frozen",
        "sites": ", ".join(map(str, module.sites)),
        "trains": f"{kinds}, {trained:,} parameters",
        "pairs": ", ".join(pairs),
        "runs": how,
        "folder": str(folder),
    }
    for name, line in lines.items():
        Console().print(f"{name:8}{line}", highlight=False, soft_wrap=True)


def show(results: Mapping[str, float], data: CounterfactualDataModule, folder: Path) -> None:
    """Print the final figures as a table, with the controls beside them."""
    console = Console()
    console.print(_pairs_table(results) if "test/iia_pairwise" in results else _probes_table(results))
    accuracy = f"the model answers {results['model/accuracy']:.3f} of the inputs drawn right (data.keep={data.keep})"
    console.print(accuracy, highlight=False)
    console.print(f"folder: {folder}", highlight=False, soft_wrap=True)


def _pairs_table(results: Mapping[str, float]) -> Table:
    table = Table(title="interchange intervention accuracy on held-out pairs", box=SIMPLE_HEAD, padding=0)
    table.add_column("\n", no_wrap=True)
    changing, preserving = (int(results[f"test/pairs_{kind}"]) for kind in ("changing", "preserving"))
    columns = {
        "_changing": f"changing {changing}",
        "_preserving": f"preserving {preserving}",
        "": f"all {changing + preserving}",
    }
    for title in columns.values():
        for rule, head in zip(RULES, (title, ""), strict=True):
            table.add_column(f"{head}\n{rule}", justify="right", min_width=9)
    for name, place in PLACES.items():
        table.add_row(name, *(f"{results[f'{place}/iia{kind}_{rule}']:.3f}" for kind in columns for rule in RULES))
    return table


def _probes_table(results: Mapping[str, float]) -> Table:
    table = Table("probe", "accuracy", title="probes on held-out examples", box=SIMPLE_HEAD)
    for key, value in results.items():
        if key.startswith("test/probe_accuracy/"):
            table.add_row(key.removeprefix("test/probe_accuracy/"), f"{value:.3f}")
    return table
