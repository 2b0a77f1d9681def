"""What DAS finds in each layer of networks of 16 neurons that have learned hierarchical equality, beside its controls.

python scripts/hierarchical_equality.py --output outputs/hierarchical_equality

Each variable gets 8 dimensions of a rotation of the layer. The published means are over 10 networks: Sutter et al.
2025, "The Non-Linear Representation Dilemma: Is Causal Abstraction Enough for Mechanistic Interpretability?"
"""

from __future__ import annotations

from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import lightning
import torch
from fit_common import Figures, control, trained, write

from itrain.data import CounterfactualDataModule
from itrain.interventions.das import FullRotationDAS
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.tasks.hierarchical_equality import HierarchicalEquality, trained_mlp
from itrain.training.alignment import AlignmentSearch

PUBLISHED = {1: 0.842, 2: 0.614, 3: 0.498}
"""Mean IIA of both equalities, by layer."""
COLUMNS = {
    "IIA": "test/iia_argmax",
    "label-changing": "test/iia_changing_argmax",
    "label-preserving": "test/iia_preserving_argmax",
}


def fit(data: CounterfactualDataModule, layer: int, *, seed: int, epochs: int) -> Figures:
    """The figures of DAS in a layer of the data's network."""
    lightning.seed_everything(seed, verbose=False)
    search = AlignmentSearch(
        network=data.network,
        sites=[Site.parse(f"module:hidden{layer}.output")],
        intervention=partial(FullRotationDAS, blocks=dict.fromkeys(data.task.variables, 8)),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        hidden_sizes=[16],
    )
    return trained(search, data, max_epochs=epochs)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the networks")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True, help="folder for the table")
    options = parser.parse_args()
    rows: dict[str, list[Figures]] = {}
    for seed in options.seeds:
        network = HookedNetwork(trained_mlp(seed=seed))
        both, first = (
            CounterfactualDataModule(
                task=task,
                network=network,
                train_pairs=32768,
                test_pairs=8192,
                batch_size=1024,
                eval_batch_size=4096,
                seed=seed,
            )
            for task in (HierarchicalEquality(), HierarchicalEquality(hypothesis="first_argument"))
        )
        for layer, published in PUBLISHED.items():
            found = fit(both, layer, seed=seed, epochs=options.epochs)
            each = {
                f"both equal (published {published})": found,
                "random rotation": control(found, "random_subspace"),
                "identity of the first argument": fit(first, layer, seed=seed, epochs=options.epochs),
            }
            for name, figures in each.items():
                rows.setdefault(f"layer {layer}, {name}", []).append(figures)
                print(f"seed {seed}, layer {layer}, {name}: {figures['test/iia_argmax']:.3f}", flush=True)
    write(rows, COLUMNS, options.output, "hierarchical_equality")


if __name__ == "__main__":
    main()
