"""Whole grids of fits: itrain's cohorts against itrain's separate fits and against pyvene's loop over the same work.

    python scripts/bench_sweep.py --grids tiny gpt2

All ways make the same steps on the same pairs and evaluate as often: a validation after each epoch and a test at the
end. ``tiny`` is the embedded model, all its layers and four positions. ``gpt2`` has GPT-2's size and random weights, 16
tokens, three of its layers and all positions. Cohorts are run in full, caches and their filling included. Of separate
fits and of pyvene's loop only some cells are run, and of the latter only some steps; the rest is extrapolated, since
all cells of a layer, and all steps of a fit, cost pyvene alike. Seconds are of the processor, which other work on the
machine changes little; the ways take turns. Beside them stands how much arithmetic each needs.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning
import torch
from bench_common import SETTINGS, import_pyvene, machine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from itrain.data import CounterfactualBatch, CounterfactualDataModule
from itrain.data.splits import SplitDataModule
from itrain.inputs import ModelInputs
from itrain.interventions.das import DAS
from itrain.models import load_embedded
from itrain.networks.base import Network
from itrain.networks.choose import make_network
from itrain.results.markdown import markdown
from itrain.sites import Site
from itrain.tasks.base import Split
from itrain.tasks.gender import Gender
from itrain.training.alignment import AlignmentSearch
from itrain.training.cohort import Cohort

Run = Callable[[CounterfactualBatch], object]
ADAM = partial(torch.optim.Adam, lr=1e-2)
SEPARATE, PEER_CELLS, PEER_STEPS = 2, 2, 6
"""Cells of each layer that are fitted apart, those that pyvene fits, and the steps that it makes there."""


class RandomPairs(SplitDataModule[CounterfactualBatch]):
    """Random tokens with random labels."""

    def __init__(self, network: Network, sizes: dict[Split, int], batch_size: int) -> None:
        super().__init__(network=network, sizes=sizes, batch_size=batch_size, eval_batch_size=batch_size, seed=0)

    def collect(self, split: Split) -> CounterfactualBatch:
        return SETTINGS["b16"].pairs(sum(self.sizes.values())).take(torch.arange(self.sizes[split]))

    def example(self) -> ModelInputs:
        return self.edited()[0].take(torch.arange(1))

    def edited(self) -> list[ModelInputs]:
        return [dataset.examples.base for dataset in self.datasets.values()]

    def read(self) -> list[ModelInputs]:
        return [source for dataset in self.datasets.values() for source in dataset.examples.sources.values()]

    def describe(self) -> dict[str, str]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A model, its pairs, and the sites that fits are made at."""

    model: nn.Module
    data: Callable[[Network], SplitDataModule]
    layers: Sequence[int]
    positions: Sequence[int]
    rank: int
    epochs: int


def tiny() -> Grid:
    base_model = load_embedded()
    task = Gender(templates="simple")
    task.bind(base_model.tokenizer)
    data = partial(CounterfactualDataModule, task=task)
    return Grid(
        model=base_model.model,
        data=lambda network: data(network=network),
        layers=range(6),
        positions=range(4),
        rank=1,
        epochs=10,
    )


def gpt2() -> Grid:
    sizes: dict[Split, int] = {"train": 64, "validation": 16, "test": 16}
    return Grid(
        model=SETTINGS["b16"].model(),
        data=lambda network: RandomPairs(network, sizes, batch_size=16),
        layers=(2, 6, 10),
        positions=range(16),
        rank=16,
        epochs=5,
    )


GRIDS = {"tiny": tiny, "gpt2": gpt2}


def search(grid: Grid, network: Network, layer: int, position: int) -> AlignmentSearch:
    lightning.seed_everything(0, verbose=False)
    return AlignmentSearch(
        network=network,
        sites=[Site(layer=layer, component="block_output", position=str(position))],
        intervention=partial(DAS, rank=grid.rank),
        optimizer=ADAM,
    )


def seconds_of_fit(module: AlignmentSearch | Cohort, data: SplitDataModule, grid: Grid) -> float:
    """From the untrained module to its test figures; nothing is kept of earlier fits."""
    network: Any = module.network
    network.forget()
    start = time.process_time()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=grid.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return time.process_time() - start


def peer(grid: Grid, layer: int, position: int) -> tuple[Run, Run]:
    """pyvene's answer on a batch, and its training step."""
    pyvene = import_pyvene()
    settings = {"layer": layer, "component": "block_output", "low_rank_dimension": grid.rank}
    config = pyvene.IntervenableConfig(
        [{**settings, "intervention_type": pyvene.LowRankRotatedSpaceIntervention}], type(grid.model)
    )
    intervenable = pyvene.IntervenableModel(config, grid.model)
    intervenable.set_device("cpu")
    intervenable.disable_model_gradients()
    (intervention,) = intervenable.interventions.values()
    optimizer = ADAM([each for each in intervention.parameters() if each.requires_grad])

    def answer(batch: CounterfactualBatch) -> Tensor:
        (source,) = batch.sources.values()
        ids = ({"input_ids": each.arguments["input_ids"]} for each in (batch.base, source))
        base, other = ids
        return intervenable(base, [other], {"sources->base": position})[1].logits[:, -1]

    def step(batch: CounterfactualBatch) -> None:
        cross_entropy(answer(batch), batch.counterfactual_label).backward()
        optimizer.step()
        intervenable.set_zero_grad()

    return answer, step


def seconds_of_peer(grid: Grid, data: SplitDataModule, layer: int, position: int) -> float:
    """What pyvene's loop takes for a fit: the median step and the median evaluation, times how many there are."""
    answer, step = peer(grid, layer, position)

    def timed(run: Run, batches: Sequence[CounterfactualBatch]) -> float:
        times = []
        for batch in batches:
            start = time.process_time()
            run(batch)
            times.append(time.process_time() - start)
        return statistics.median(times[1:])

    training, validation, test = (
        list(data.train_dataloader()),
        list(data.val_dataloader()),
        list(data.test_dataloader()),
    )
    per_step = timed(step, (training * PEER_STEPS)[: PEER_STEPS + 1])
    with torch.no_grad():
        per_validation = timed(answer, validation[:1] * 3) * len(validation)
        per_test = timed(answer, test[:1] * 3) * len(test)
    grid.model.zero_grad()
    return grid.epochs * (len(training) * per_step + per_validation) + per_test


def operations(run: Run, batch: CounterfactualBatch) -> int:
    """FLOPs of a step on the batch, without attention, when all that is kept of it is there."""
    run(batch)
    with FlopCounterMode(display=False) as counter:
        run(batch)
    return counter.get_total_flops()


def step_of(cohort: Cohort) -> Run:
    """The cohort's losses and their gradients."""

    def step(batch: CounterfactualBatch) -> None:
        answers = cohort.interchange(batch, {name: member.trained for name, member in cohort.members.items()})
        losses = [cross_entropy(answer, batch.counterfactual_label) for answer in answers.values()]
        torch.stack(losses).sum().backward()

    return step


def spread(positions: Sequence[int], count: int) -> list[int]:
    """So many of the positions, evenly spread."""
    return [positions[(2 * place + 1) * len(positions) // (2 * count)] for place in range(count)]


def measure(name: str) -> list[object]:
    """Seconds for the whole grid, by each way."""
    grid = GRIDS[name]()
    totals = {"cohorts": 0.0, "separate": 0.0, "pyvene": 0.0}
    flops = {"cohorts": 0, "pyvene": 0}
    network = make_network(grid.model, replay="on")
    data = grid.data(network)
    data.setup("fit")
    count = len(grid.positions)
    for layer in grid.layers:
        members = {f"at {position}": search(grid, network, layer, position) for position in grid.positions}
        cohort = Cohort(members=members, optimizer=ADAM)
        totals["cohorts"] += seconds_of_fit(cohort, data, grid)
        batch = next(iter(data.train_dataloader()))
        flops["cohorts"] += operations(step_of(cohort), batch)
        flops["pyvene"] += count * operations(peer(grid, layer, grid.positions[0])[1], batch)
        separate = [
            seconds_of_fit(search(grid, network, layer, each), data, grid) for each in spread(grid.positions, SEPARATE)
        ]
        theirs = [seconds_of_peer(grid, data, layer, each) for each in spread(grid.positions, PEER_CELLS)]
        totals["separate"] += count * statistics.fmean(separate)
        totals["pyvene"] += count * statistics.fmean(theirs)
    ours = totals["cohorts"]
    return [
        name,
        len(grid.layers) * count,
        *(f"{seconds:.1f} s" for seconds in totals.values()),
        f"{ours / totals['separate']:.2f}",
        f"{totals['pyvene'] / ours:.1f}x",
        f"{flops['pyvene'] / flops['cohorts']:.1f}x",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--threads", type=int, default=1)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(machine())
    head = ["grid", "fits", "cohorts", "separate fits", "pyvene", "cohorts / separate", "pyvene / cohorts", "by FLOPs"]
    print(markdown(head, [measure(name) for name in words.grids]))


if __name__ == "__main__":
    main()
