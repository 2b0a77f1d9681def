"""Boundless DAS finds the size of a subspace: held against DAS at each rank, on price tagging and the embedded model.

python scripts/price_tagging.py --output outputs/price_tagging
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fit_common import Figures, arguments, control, fit, write

from itrain.interventions.base import Intervention
from itrain.interventions.boundless_das import BoundlessDAS
from itrain.interventions.das import DAS
from itrain.tasks.price_tagging import PriceTagging

SITE = "layer2.block_output@price"
METHODS: dict[str, Callable[[int], Intervention]] = {
    # The temperature of the paper is for 4096 dimensions; there are 80 here.
    "Boundless DAS": partial(BoundlessDAS, temperature=(5.0, 0.1)),
    **{f"DAS, rank {rank}": partial(DAS, rank=rank) for rank in (1, 4, 8, 16, 32, 64)},
}
COLUMNS = {
    "IIA": "test/iia_argmax",
    "label-changing": "test/iia_changing_argmax",
    "label-preserving": "test/iia_preserving_argmax",
    "soft gates": "test/soft/iia_argmax",
    "rank": "rank",
}


def main() -> None:
    options = arguments(__doc__)
    rows: dict[str, list[Figures]] = {}
    for name, intervention in METHODS.items():
        rows[name] = [
            fit(PriceTagging(variable="below"), SITE, intervention, seed=seed, steps=options.steps)
            for seed in options.seeds
        ]
        print(name, [round(run["test/iia_argmax"], 3) for run in rows[name]], flush=True)
    for name in ("full_vector", "random_subspace"):
        rows[f"{name.replace('_', ' ')} (beside Boundless DAS)"] = [control(run, name) for run in rows["Boundless DAS"]]
    write(rows, COLUMNS, options.output, "price_tagging")


if __name__ == "__main__":
    main()
