"""What the scripts that compare methods share: a fit on the embedded model, and a table of many."""

from __future__ import annotations

import json
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import lightning
import torch

from itrain.data import CounterfactualDataModule
from itrain.interventions.base import Intervention
from itrain.models import load_embedded
from itrain.networks.choose import make_network
from itrain.reports.silence import silence_others
from itrain.results.markdown import markdown
from itrain.sites import Site
from itrain.tasks.base import Task
from itrain.training.alignment import AlignmentSearch

TRAIN_PAIRS, TEST_PAIRS = 1024, 512

Figures = Mapping[str, float]
"""Name -> value, as a test reports them; ``rank`` is that of the intervention that was tested."""


def arguments(description: str | None) -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, required=True, help="folder for the tables")
    return parser.parse_args()


def fit(
    task: Task,
    site: str,
    intervention: Callable[[int], Intervention],
    *,
    seed: int,
    steps: int,
    isolate_weight: float = 1.0,
    lr: float = 1e-2,
) -> Figures:
    """The figures of an intervention that is trained on the embedded model and tested."""
    lightning.seed_everything(seed, verbose=False)
    base_model = load_embedded()
    task.bind(base_model.tokenizer)
    network = make_network(model=base_model.model)
    data = CounterfactualDataModule(
        task=task, network=network, train_pairs=TRAIN_PAIRS, test_pairs=TEST_PAIRS, seed=seed
    )
    search = AlignmentSearch(
        network=network,
        sites=[Site.parse(site)],
        intervention=intervention,
        optimizer=partial(torch.optim.Adam, lr=lr),
        isolate_weight=isolate_weight,
    )
    data.setup("fit")
    return {**trained(search, data, max_steps=steps), "rank": search.trained[search.placements[0]].hardened().rank}


def trained(search: AlignmentSearch, data: CounterfactualDataModule, **length: int) -> Figures:
    """The figures of a search after a training of so many steps or epochs."""
    silence_others()
    trainer = lightning.Trainer(
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **length,  # type: ignore[arg-type]
    )
    trainer.fit(search, data)
    (figures,) = trainer.test(search, data, verbose=False)
    return figures


def control(figures: Figures, name: str) -> Figures:
    """The figures of a control, under the names that the intervention's have."""
    prefix = f"test/{name}/"
    return {f"test/{key.removeprefix(prefix)}": value for key, value in figures.items() if key.startswith(prefix)}


def mean(runs: Sequence[Figures]) -> Figures:
    """The mean of the figures that all runs have."""
    return {key: statistics.fmean(run[key] for run in runs) for key in runs[0] if all(key in run for run in runs)}


def write(rows: Mapping[str, Sequence[Figures]], columns: Mapping[str, str], folder: Path, name: str) -> None:
    """Print and keep a table with a row for each method: mean and standard deviation of its runs."""
    lines = [
        [method, *(_spread([run[key] for run in runs if key in run]) for key in columns.values())]
        for method, runs in rows.items()
    ]
    table = markdown([name, *columns], lines) + "\n"
    print(table)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(table)
    (folder / f"{name}.json").write_text(json.dumps({method: list(runs) for method, runs in rows.items()}, indent=2))


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
