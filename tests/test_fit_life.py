"""What a fit's life takes care of at its edges: statistics, schedules, modes, interrupted splits, and other modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

import itrain
from itrain.data import CounterfactualDataModule
from itrain.interventions.ablation import Mean
from itrain.models import load_embedded
from itrain.networks.choose import make_network
from itrain.training.alignment import AlignmentSearch
from itrain.training.cohort import Cohort
from itrain.training.iit import InterchangeInterventionTraining
from itrain.training.probing import ProbeTraining
from tests.planted import HIDDEN, Bits, Planted
from tests.test_plain_lightning import ADAM, CLOSED_FORM, pairs, search, trainer

CLASSES = {"gender": 2}


def probes(network: Any) -> ProbeTraining:
    return ProbeTraining(network=network, sites="layer4.block_output@verb", classes=CLASSES, optimizer=ADAM)


def buffers(module: itrain.Training) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.exported.named_buffers()}


# --- statistics


@pytest.mark.filterwarnings(CLOSED_FORM)
def test_a_shared_intervention_has_the_statistics_of_all_its_sites() -> None:
    sites = ["layer1.block_output@name", "layer4.block_output@last"]
    module, data = search(sites=sites, intervention=Mean, shared=True)
    trainer().fit(module, data)
    base = data.datasets["train"].examples.base
    rows = torch.cat([each.flatten(0, -2) for each in module.network.read(base, module.sites).values()])
    torch.testing.assert_close(module.trained[module.sites[0]].mean, rows.mean(0))


def test_one_object_at_several_sites_is_refused_unless_it_is_shared() -> None:
    made = Mean(80)
    sites = ["layer1.block_output@name", "layer4.block_output@last"]
    with pytest.raises(ValueError, match="it gives several sites one object"):
        search(sites=sites, intervention=lambda size: made)
    members = {name: search(intervention=lambda size: made)[0] for name in "ab"}
    members["b"].network = members["a"].network
    with pytest.raises(ValueError, match="members of a cohort share an intervention object"):
        Cohort(members=members)


def test_unfitted_weights_that_are_loaded_are_fitted_later() -> None:
    network = make_network(load_embedded().model)
    fresh, module = probes(network), probes(network)
    module.load_state_dict(fresh.state_dict())
    trainer(max_epochs=1).fit(module, pairs(network))
    assert any(
        not torch.equal(value, torch.zeros_like(value)) for name, value in buffers(module).items() if "mean" in name
    )


@pytest.mark.filterwarnings(CLOSED_FORM)
def test_statistics_that_were_loaded_as_an_export_are_kept_in_a_test() -> None:
    module, data = search(intervention=Mean)
    trainer().fit(module, data)
    again, _ = search(intervention=Mean)
    again.exported.load_state_dict(module.exported.state_dict())
    trainer().test(again, pairs(again.network, seed=7), verbose=False)
    assert all(torch.equal(value, buffers(module)[name]) for name, value in buffers(again).items())


def test_statistics_fitted_by_hand_serve_a_test_without_a_data_module() -> None:
    module, data = search(intervention=Mean)
    data.setup("test")
    module.fit_activations(data.whole("train"))
    assert trainer().test(module, data.test_dataloader(), verbose=False)


# --- schedules


def test_schedules_need_to_know_the_number_of_steps() -> None:
    module, data = search()
    changing = GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(ValueError, match="use accumulate_grad_batches=<n>"):
        trainer(callbacks=[changing]).fit(module, data)
    with pytest.raises(ValueError, match="set max_epochs or max_steps"):
        trainer(max_epochs=-1, max_time="00:00:00:05").fit(module, data)


# --- modes and other modules


def test_a_fit_trains_in_train_mode_wherever_it_starts_from() -> None:
    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            seen.append((pl_module.interchange.training, pl_module.network.model.training))

    module, data = search()
    trainer(max_epochs=1, callbacks=[Watch()]).fit(module.eval(), data)
    assert set(seen) == {(True, False)}


def test_a_model_that_another_network_has_frozen_is_no_silent_fit() -> None:
    model = Planted()
    network = make_network(model, trainable=True)
    given = {"sites": "module:embed.output", "intervention": partial(itrain.FixedBlocks, blocks=1)}
    module = InterchangeInterventionTraining(network=network, optimizer=ADAM, hidden_sizes=[HIDDEN], **given)
    make_network(model)
    with pytest.raises(ValueError, match="another network that was made of the same model has frozen it"):
        trainer().fit(module, CounterfactualDataModule(task=Bits(), network=network, train_pairs=32))


def test_a_trainer_goes_on_to_modules_of_other_kinds() -> None:
    module, data = search()
    runner = trainer(max_epochs=1)
    runner.fit(module, data)
    runner.fit(BoringModel())


def test_an_interrupted_split_leaves_nothing_behind() -> None:
    class Interrupt(lightning.Callback):
        def on_test_batch_end(self, trainer: Any, *rest: Any) -> None:
            raise RuntimeError("stopped")

    module, data = search()
    (expected,) = trainer().test(module, data, verbose=False)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(callbacks=[Interrupt()]).test(module, data, verbose=False)
    assert trainer().test(module, data, verbose=False) == [expected]


# --- cohorts


def test_each_member_s_gradients_are_clipped_alone() -> None:
    sgd = partial(torch.optim.SGD, lr=1.0)
    alone, data = search(optimizer=sgd)
    trainer(gradient_clip_val=0.1).fit(alone, data)
    member, data = search()
    other = AlignmentSearch(network=member.network, sites="layer4.block_output@last", intervention=itrain.DAS)
    trainer(gradient_clip_val=0.1).fit(Cohort(members={"it": member, "other": other}, optimizer=sgd), data)
    found, expected = (each.trained[each.sites[0]].subspace.rows for each in (member, alone))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_validating_a_cohort_costs_none_of_its_patience() -> None:
    module, data = search()
    cohort = Cohort(members={"it": module}, optimizer=ADAM, patience=1)
    for _ in range(3):
        trainer().validate(cohort, data, verbose=False)
    assert cohort.learning == ["it"]


# --- sites


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": ["layer2.block_output@name"] * 2}, "is listed twice"),
        ({"sites": "layer2.block_output@name", "hidden_sizes": [80, 80]}, "2 are given for 1 sites"),
    ],
)
def test_sites_and_sizes_that_do_not_match_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(**settings)
