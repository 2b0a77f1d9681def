"""What is frozen stays as it was, buffers included, and statistics and choices stay those of the fit that made them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from itrain.data import CounterfactualBatch, CounterfactualDataModule
from itrain.interventions.ablation import Mean
from itrain.interventions.blocks import FixedBlocks
from itrain.networks.choose import make_network
from itrain.training.alignment import AlignmentSearch
from itrain.training.callbacks import FirstStepError
from itrain.training.cohort import Cohort
from itrain.training.iit import InterchangeInterventionTraining
from itrain.training.probing import ProbeSet, ProbeTraining
from tests.planted import HIDDEN, Bits, Planted
from tests.test_not_finite import ADAM, SITE, pairs, search, trainer
from tests.test_plain_lightning import CLOSED_FORM


class Normed(nn.Module):
    """Layers with running statistics and dropout, some without weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, HIDDEN)
        self.first = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Dropout(0.2))
        self.plain = nn.BatchNorm1d(HIDDEN, affine=False)
        self.second = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Dropout(0.2))
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, bits: Tensor) -> Tensor:
        return self.head(self.second(self.plain(self.first(self.embed(bits)))))


def co_trained(model: nn.Module, **settings: Any) -> InterchangeInterventionTraining:
    return InterchangeInterventionTraining(
        network=make_network(model, trainable=True),
        sites=SITE,
        intervention=FixedBlocks,
        optimizer=ADAM,
        hidden_sizes=[HIDDEN],
        **settings,
    )


class Modes(lightning.Callback):
    """Notes which modules are in train mode in each step."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, ...]] = set()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        leaves = [(name, each) for name, each in pl_module.network.model.named_modules() if not list(each.children())]
        self.seen.add(tuple(name for name, each in leaves if each.training))


PARTS = {
    "embed, second": (["embed", "second"], ("embed", "second.0", "second.1", "second.2")),
    "one weight": (["embed", "second.0.weight"], ("embed",)),
    "a pattern": (["embed", "first.*"], ("embed", "first.0", "first.1", "first.2")),
}


@pytest.mark.parametrize("name", PARTS)
def test_all_outside_the_parts_is_the_same_to_the_last_bit(name: str) -> None:
    parts, modes = PARTS[name]
    lightning.seed_everything(0, verbose=False)
    model, watch = Normed(), Modes()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    module = co_trained(model, parts=parts)
    trainer(callbacks=[watch]).fit(module, pairs(module.network))
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    inside = [part.removesuffix(".*") for part in parts]
    assert moved and all(any(key == part or key.startswith(f"{part}.") for part in inside) for key in moved), moved
    assert any("running_mean" in key for key in moved) == ("weight" not in name)
    assert watch.seen == {modes}
    assert not any(each.training for each in model.modules()), "after a fit all of it is in eval mode"


def test_what_the_user_has_frozen_stays_too() -> None:
    model = Normed()
    model.first.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    module = co_trained(model)
    trainer().fit(module, pairs(module.network))
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert "second.1.running_mean" in moved and not [key for key in moved if key.startswith("first.")]


# --- statistics and choices


@pytest.mark.filterwarnings(CLOSED_FORM)
def test_a_fit_to_other_data_fits_the_statistics_again() -> None:
    module = search(intervention=Mean)
    first, other = pairs(module.network), pairs(module.network, seed=5, train_pairs=24)
    trainer().fit(module, first)
    before = module.trained[module.sites[0]].mean.clone()
    trainer().fit(module, other)
    base = other.datasets["train"].examples.base
    expected = module.network.read(base, module.sites)[module.sites[0]].mean(0)
    torch.testing.assert_close(module.trained[module.sites[0]].mean, expected)
    trainer().fit(module, first)
    assert torch.equal(module.trained[module.sites[0]].mean, before)


@pytest.mark.filterwarnings(CLOSED_FORM)
def test_a_cohort_fits_its_own_statistics_again_and_keeps_those_that_were_loaded() -> None:
    own, given = search(intervention=Mean), search(intervention=Mean)
    given.interchange.__dict__["network"] = given.network = own.network
    given.trained[given.sites[0]].fit(torch.ones(4, HIDDEN))
    given.fitted.fill_(True)
    cohort = Cohort(members={"own": own, "given": given})
    means = []
    for seed in (0, 5):
        trainer().fit(cohort, pairs(cohort.network, seed=seed, train_pairs=24))
        means.append(own.trained[own.sites[0]].mean.clone())
        assert torch.equal(given.trained[given.sites[0]].mean, torch.ones(HIDDEN))
    assert not torch.equal(*means)


def test_a_probe_s_strength_is_chosen_by_the_validation_of_a_fit_alone() -> None:
    module = ProbeTraining(
        network=make_network(Planted()), sites=SITE, classes={"left": 2}, optimizer=ADAM, hidden_sizes=[HIDDEN]
    )
    data = pairs(module.network)
    (probe_set,) = (each for each in module.probes.values() if isinstance(each, ProbeSet))
    chosen = []

    class Watch(lightning.Callback):
        def on_train_start(self, *rest: Any) -> None:
            chosen.append(int(probe_set.chosen))

    trainer(callbacks=[Watch()], num_sanity_val_steps=2).fit(module, data)
    assert chosen == [-1] and int(probe_set.chosen) >= 0, "a sanity check chooses nothing"
    probe_set.chosen.fill_(2)
    trainer().validate(module, pairs(module.network, seed=3), verbose=False)
    assert int(probe_set.chosen) == 2
    probe_set.chosen.fill_(-1)
    trainer().validate(module, data, verbose=False)
    assert int(probe_set.chosen) >= 0, "where none has been chosen yet"


# --- the first step


class Isolating(CounterfactualDataModule):
    """The first batches of an epoch isolate."""

    def collect(self, split: Any) -> CounterfactualBatch:
        batch = super().collect(split)
        return replace(batch, isolates=torch.arange(len(batch)) < len(batch) - 16)

    def train_dataloader(self) -> Any:
        return self.loader(self.datasets["train"], self.batch_size)


def isolating(module: AlignmentSearch) -> Isolating:
    sizes = {"train_pairs": 64, "validation_pairs": 16, "test_pairs": 16, "batch_size": 16, "keep": "all"}
    return Isolating(task=Bits(), network=module.network, **sizes)


def test_a_first_step_of_pairs_without_weight_decides_nothing() -> None:
    module = search(isolate_weight=0.0)
    trainer(max_epochs=1).fit(module, isolating(module))


def test_a_later_step_still_refuses_what_the_answer_cannot_see() -> None:
    class Blind(Planted):
        def forward(self, bits: Tensor) -> Tensor:
            return self.head(bits.repeat(1, HIDDEN // 2) + 0 * self.embed(bits))

    module = search(Blind(), isolate_weight=0.0)
    with pytest.raises(FirstStepError, match="has no effect on the label"):
        trainer(max_epochs=1).fit(module, isolating(module))
