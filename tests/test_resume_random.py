"""Random numbers of a fit: a function of the seed and the step, so that a resumed fit draws the same."""

from __future__ import annotations

import csv
import random
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from itrain.cli import main
from itrain.data import CounterfactualDataModule
from itrain.interventions.das import DAS
from itrain.interventions.featurizers import PrincipalComponents
from itrain.interventions.masking import HardConcreteGate, Mask
from itrain.networks.choose import make_network
from itrain.results.history import read_curve
from itrain.training.alignment import AlignmentSearch
from itrain.training.base import Training
from itrain.training.cohort import Cohort
from itrain.training.iit import InterchangeInterventionTraining
from tests.commands import SMALL
from tests.planted import HIDDEN, Bits, Planted
from tests.test_interchange import QUIET

SITE = "module:embed.output"
ADAM = partial(torch.optim.Adam, lr=3e-2)


class Dropping(nn.Module):
    """A model whose dropout shows in its answers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Linear(2, HIDDEN), nn.Dropout(0.5), nn.Linear(HIDDEN, 2)

    def forward(self, bits: Tensor) -> Tensor:
        return self.head(self.drop(self.embed(bits)))


def pairs(module: Training) -> CounterfactualDataModule:
    sizes = {"train_pairs": 64, "validation_pairs": 16, "test_pairs": 16, "batch_size": 16, "keep": "all"}
    return CounterfactualDataModule(task=Bits(), network=module.network, **sizes)


def masked(network: Any = None, **settings: Any) -> AlignmentSearch:
    given = {"sites": SITE, "optimizer": ADAM, "hidden_sizes": [HIDDEN]} | settings
    given.setdefault("intervention", partial(Mask, gate=HardConcreteGate))
    return AlignmentSearch(network=network or make_network(Planted()), **given)


def dropping() -> InterchangeInterventionTraining:
    network = make_network(Dropping(), trainable=True)
    return InterchangeInterventionTraining(
        network=network, sites=SITE, intervention=DAS, optimizer=ADAM, hidden_sizes=[HIDDEN]
    )


def cohort() -> Cohort:
    first = masked()
    return Cohort(members={"a": first, "b": masked(first.network)}, optimizer=ADAM)


MODULES = {"hard-concrete gates": masked, "dropout in IIT": dropping, "a cohort of gates": cohort}


def seeded(make: Any, seed: int = 0) -> Training:
    lightning.seed_everything(seed, verbose=False)
    return make()


def weights(module: Training) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def trainer(**settings: Any) -> lightning.Trainer:
    return lightning.Trainer(**{"max_epochs": 3, **QUIET, **settings})


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("steps", [4, 6], ids=["at an epoch's end", "within an epoch"])
@pytest.mark.parametrize("name", MODULES)
def test_a_resumed_fit_has_the_weights_of_one_without_a_stop(name: str, steps: int, tmp_path: Path) -> None:
    whole = seeded(MODULES[name])
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=steps, save_top_k=-1)
    trainer(callbacks=[kept], enable_checkpointing=True).fit(whole, pairs(whole))
    # Another seed: all that the fit draws comes from the checkpoint.
    resumed = seeded(MODULES[name], seed=7)
    trainer().fit(resumed, pairs(resumed), ckpt_path=tmp_path / f"step={steps}.ckpt")
    for found, expected in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(found, expected)


def test_python_s_and_numpy_s_generators_go_on_where_they_were(tmp_path: Path) -> None:
    module = seeded(masked)
    runner = trainer(max_epochs=1)
    runner.fit(module, pairs(module))
    runner.save_checkpoint(tmp_path / "run.ckpt")
    expected = random.random(), numpy.random.rand()
    found = []

    class Draw(lightning.Callback):
        def on_train_batch_start(self, *rest: Any) -> None:
            found.append((random.random(), numpy.random.rand()))

    again = seeded(masked, seed=7)
    trainer(max_epochs=2, callbacks=[Draw()]).fit(again, pairs(again), ckpt_path=tmp_path / "run.ckpt")
    assert found[0] == expected


def test_a_step_s_numbers_do_not_depend_on_what_was_drawn_before() -> None:
    class Disturb(lightning.Callback):
        def on_train_batch_end(self, *rest: Any) -> None:
            torch.rand(3)

    found = []
    for callbacks in ([], [Disturb()]):
        module = seeded(dropping)
        trainer(callbacks=callbacks).fit(module, pairs(module))
        found.append(weights(module))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    "intervention",
    [partial(Mask, gate=HardConcreteGate), partial(Mask, featurizer=PrincipalComponents, gate=HardConcreteGate)],
    ids=["neurons", "components"],
)
def test_random_gates_of_a_cohort_are_those_of_fits_alone(intervention: Any) -> None:
    alone = [seeded(partial(masked, make_network(Planted()), intervention=intervention), seed) for seed in (0, 1)]
    for seed, module in enumerate(alone):
        lightning.seed_everything(seed, verbose=False)
        trainer().fit(module, pairs(module))
    network = make_network(Planted())
    members = {str(seed): seeded(partial(masked, network, intervention=intervention), seed) for seed in (0, 1)}
    together = Cohort(members=members, optimizer=ADAM)
    trainer().fit(together, pairs(together))
    for module, member in zip(alone, members.values(), strict=True):
        for found, expected in zip(weights(member), weights(module), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_small_batches_that_are_accumulated_draw_the_gates_of_the_large_one() -> None:
    gates = HardConcreteGate(HIDDEN)
    gates.anneal(0.25)
    drawn = gates()
    assert torch.equal(gates(), drawn), "one draw for a step"
    gates.anneal(0.5)
    assert not torch.equal(gates(), drawn)
    gates.anneal(0.25)
    assert torch.equal(gates(), drawn)


def test_a_resumed_run_s_metrics_begin_with_those_before_the_stop(tmp_path: Path) -> None:
    words = ["recipe=das_gender", *SMALL, "intervention=hard_concrete_mask"]
    assert main(["fit", *words, f"output={tmp_path / 'first'}"]) == 0
    (checkpoint,) = (tmp_path / "first").rglob("*.ckpt")
    assert main(["fit", *words, "trainer.max_epochs=4", f"ckpt={checkpoint}", f"output={tmp_path / 'on'}"]) == 0
    (former,), (metrics,) = ((tmp_path / name).rglob("metrics.csv") for name in ("first", "on"))

    def rows(file: Path) -> list[dict[str, float]]:
        with file.open(newline="") as lines:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(lines)]

    kept = [row for row in rows(former) if not any(key.startswith("test/") for key in row)]
    assert rows(metrics)[: len(kept)] == kept
    curve = read_curve(metrics)
    assert curve is not None
    steps = [step for step, _ in curve.losses]
    assert steps == list(range(len(steps))) and len(curve.validation) == 4
