"""Divergence at the sites of a search: what an edit makes of activations, beside natural ones, however it is run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from itrain.data import CounterfactualDataModule
from itrain.interventions.base import Intervention
from itrain.interventions.blocks import FixedBlocks
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.interventions.fixed import AddVector, Scale
from itrain.models import load_embedded
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.tasks.gender import Gender
from itrain.training import divergence
from itrain.training.alignment import AlignmentSearch
from itrain.training.cohort import Cohort
from itrain.training.divergence import Divergences, pair_keys
from itrain.training.iit import InterchangeInterventionTraining
from tests.chained import ChainedGender
from tests.planted import Planted
from tests.test_interchange import EMBED, QUIET, TwoBits

HERE = "layer2.block_output@name"
Figures = dict[str, float]


def gender(task: type[Gender] = Gender, *, pairs: int = 96, replay: str = "on") -> CounterfactualDataModule:
    base_model = load_embedded()
    bound = task()
    bound.bind(base_model.tokenizer)
    network = make_network(base_model.model, replay=replay)  # type: ignore[arg-type]
    return CounterfactualDataModule(
        task=bound, network=network, train_pairs=8, validation_pairs=8, test_pairs=pairs, eval_batch_size=40
    )


def test_of(
    data: CounterfactualDataModule, sites: Any, intervention: Callable[[int], Intervention], **how: Any
) -> Figures:
    lightning.seed_everything(0, verbose=False)
    search = AlignmentSearch(network=data.network, sites=sites, intervention=intervention, **how)
    (found,) = lightning.Trainer(**QUIET).test(search, datamodule=data, verbose=False)
    return {key.removeprefix("test/"): value for key, value in found.items() if "divergence" in key}


test_of.__test__ = False  # type: ignore[attr-defined]


def off_the_data(data: CounterfactualDataModule) -> Tensor:
    """A direction that activations at the site do not vary in, of the length of a typical deviation of all of them."""
    data.setup("fit")
    found = data.network.read(data.datasets["test"].examples.base, [Site.parse(HERE)])[Site.parse(HERE)][:, 0]
    centred = found - found.mean(0)
    return torch.linalg.svd(centred)[2][-1] * centred.square().sum(1).mean().sqrt()


def test_a_natural_swap_is_at_the_baseline_and_an_edit_off_the_data_is_seen() -> None:
    data = gender(pairs=256)
    swapped = test_of(data, HERE, FullVector)
    assert swapped["divergence"] < 1.5 * swapped["natural_divergence"]
    shift = partial(AddVector, vector=torch.full((80,), 3.0))
    off_data = partial(AddVector, vector=off_the_data(data))
    for planted in (off_data, shift, partial(Scale, factor=3.0), partial(Scale, factor=0.0)):
        found = test_of(data, HERE, planted)
        assert found["natural_divergence"] < 2 * swapped["natural_divergence"], "that of activations, not of edits"
        assert found["divergence"] > 5 * found["natural_divergence"], planted


def test_replay_hooks_and_cohorts_agree_in_whatever_batches() -> None:
    searches = {
        "name": (HERE, DAS),
        "verb": ("layer2.block_output@verb", DAS),
        "both": ([HERE, "layer4.block_output@last"], DAS),
    }
    found: dict[str, list[Figures]] = {name: [] for name in searches}
    for replay, size in (("on", 40), ("off", 96)):
        data = gender(replay=replay)
        data.eval_batch_size = size
        for name, (sites, intervention) in searches.items():
            found[name].append(test_of(data, sites, intervention))
    members = {}
    for name, (sites, intervention) in searches.items():
        lightning.seed_everything(0, verbose=False)
        members[name] = AlignmentSearch(network=data.network, sites=sites, intervention=intervention)
    cohort = Cohort(members=members)
    lightning.Trainer(**QUIET).test(cohort, datamodule=data, verbose=False)
    for name, (replayed, hooked) in found.items():
        assert replayed == pytest.approx(hooked, abs=1e-5)
        together = {
            key.removeprefix(f"{name}/test/"): value for key, value in cohort.found.items() if f"{name}/test/" in key
        }
        assert hooked == pytest.approx({key: together[key] for key in hooked}, abs=1e-5)
    assert len(found["both"][0]) == 6, "each site's, and their mean"
    assert f"divergence/{HERE}" in found["both"][0]


@pytest.mark.parametrize(
    ("sites", "how"),
    [
        ("layer2.block_output@last", {}),
        ("layer1.block_output@first3", {"join_positions": True}),
        ("layer1.attention_value_output.head1@name", {}),
        ("layer1.block_output@first3", {}),
        ({"write": HERE, "read": "layer1.block_output@name"}, {}),
    ],
    ids=["one token", "joined", "head", "several tokens", "read elsewhere"],
)
def test_every_kind_of_site_has_the_figures(sites: Any, how: dict[str, Any]) -> None:
    found = test_of(gender(pairs=40), sites, FullVector if "write" not in sites else DAS, **how)
    assert 0 < found["natural_divergence"] < 1 and 0 < found["divergence"] < 1


def test_sources_that_are_intervened_are_no_natural_activations() -> None:
    found = test_of(gender(ChainedGender, pairs=60), HERE, partial(AddVector, vector=[9.0] * 80))
    assert found["divergence"] > 5 * found["natural_divergence"] > 0


def test_a_model_in_bf16_has_finite_figures() -> None:
    data = gender(pairs=40, replay="off")
    data.network.model.to(torch.bfloat16)
    found = test_of(data, HERE, FullVector)
    assert 0 < found["divergence"] < 1 and 0 < found["natural_divergence"] < 1


def test_several_variables_and_a_co_trained_model_have_the_figures() -> None:
    network = HookedNetwork(Planted(), trainable=True)
    data = CounterfactualDataModule(task=TwoBits(), network=network, batch_size=8, train_pairs=16, test_pairs=48)
    module = InterchangeInterventionTraining(
        network=network, sites=[EMBED], intervention=partial(FixedBlocks, blocks={"left": 4, "right": 4})
    )
    (found,) = lightning.Trainer(**QUIET).test(module, datamodule=data, verbose=False)
    assert 0 < found["test/divergence"] < torch.inf and 0 <= found["test/natural_divergence"] < torch.inf


# --- which pairs are looked at


def test_the_key_of_a_pair_does_not_depend_on_its_batch() -> None:
    data = CounterfactualDataModule(task=TwoBits(), network=HookedNetwork(Planted()), batch_size=8, train_pairs=64)
    data.setup("fit")
    batch = data.datasets["train"].examples
    keys = pair_keys(batch)
    for group in range(len(batch.groups)):
        rows = (batch.group == group).nonzero()[:, 0]
        assert torch.equal(pair_keys(batch.take(rows)), keys[rows])
    same = [(tuple(row.tolist())) for row in batch.base.arguments["bits"]]
    assert len(set(keys.tolist())) > len(set(same)), "sources are part of a pair"


def test_no_more_pairs_are_run_than_the_sample_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "PAIRS", 16)
    rows: list[int] = []
    take = Divergences._take

    def counting(self: Divergences, *arguments: Any) -> None:
        rows.append(len(arguments[-1]))
        take(self, *arguments)

    monkeypatch.setattr(Divergences, "_take", counting)
    found = test_of(gender(pairs=96), HERE, FullVector)
    assert len(rows) <= 3 and rows[0] == 16 and sum(rows) < 40 and found["divergence"] > 0
    assert torch.tensor(found["divergence"]).isfinite()
