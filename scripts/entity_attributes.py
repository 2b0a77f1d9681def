"""Which methods swap one attribute of an entity and leave the others: cause, isolate and disentangle on held-out pairs.

Each figure is the mean over the attributes, and then mean and spread over the seeds. Invented things have independent
attributes; of real cities the country decides the rest.

    python scripts/entity_attributes.py --output outputs/entity_attributes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from fit_common import Figures, arguments, control, fit, mean, write

from itrain.interventions.base import Intervention
from itrain.interventions.das import DAS
from itrain.interventions.featurizers import PrincipalComponents, Rotation
from itrain.interventions.masking import HardConcreteGate, Mask
from itrain.tasks.entity_attributes import EntityAttributes

SITE = "layer1.block_output@entity"
RANK = 8


@dataclass(frozen=True, kw_only=True)
class Method:
    """An intervention and how it is trained."""

    intervention: Callable[[int], Intervention]
    isolate_weight: float = 1.0
    lr: float = 1e-2


METHODS = {
    "DAS": Method(intervention=partial(DAS, rank=RANK), isolate_weight=0.0),
    "MDAS": Method(intervention=partial(DAS, rank=RANK)),
    "mask of neurons": Method(intervention=Mask),
    "hard-concrete mask of neurons": Method(intervention=partial(Mask, gate=HardConcreteGate), lr=3e-2),
    "mask of principal components": Method(intervention=partial(Mask, featurizer=PrincipalComponents), lr=3e-2),
    "mask of a learned rotation": Method(intervention=partial(Mask, featurizer=Rotation)),
}
WORLDS: dict[tuple[Literal["things", "geography"], Literal["entity", "context"]], list[str]] = {
    ("things", "entity"): list(METHODS),
    ("things", "context"): list(METHODS),
    ("geography", "entity"): ["DAS", "MDAS"],
}
COLUMNS = {
    "cause": "test/cause_argmax",
    "isolate": "test/isolate_argmax",
    "disentangle": "test/disentangle_argmax",
    "with soft gates": "test/soft/disentangle_argmax",
    "rank": "rank",
}


def main() -> None:
    options = arguments(__doc__)
    for (entities, splits), methods in WORLDS.items():
        attributes = list(EntityAttributes(entities=entities).templates)
        rows: dict[str, list[Figures]] = {}
        for name in methods:
            method = METHODS[name]
            rows[name] = [
                mean(
                    [
                        fit(
                            EntityAttributes(entities=entities, attributes=[attribute], splits=splits),
                            SITE,
                            method.intervention,
                            seed=seed,
                            steps=options.steps,
                            isolate_weight=method.isolate_weight,
                            lr=method.lr,
                        )
                        for attribute in attributes
                    ]
                )
                for seed in options.seeds
            ]
            print(entities, splits, name, [round(run["test/disentangle_argmax"], 3) for run in rows[name]], flush=True)
        rows["full vector"] = [control(run, "full_vector") for run in rows["MDAS"]]
        rows[f"random subspace of rank {RANK}"] = [control(run, "random_subspace") for run in rows["MDAS"]]
        write(rows, COLUMNS, options.output, f"{entities}_{splits}")


if __name__ == "__main__":
    main()
