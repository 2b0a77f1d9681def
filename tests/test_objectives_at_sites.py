"""Objectives over real sites: tokens that examples lack, batches of other pairs, and pairs that they cannot be of."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from itrain.data import CounterfactualBatch
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.objectives.cross_entropy import CrossEntropy
from itrain.objectives.distributions import KL, JensenShannon
from itrain.objectives.edits import EditSize
from itrain.training.alignment import AlignmentSearch
from tests.models import tiny_inputs, tiny_model
from tests.planted import Planted
from tests.test_alignment import trainer
from tests.test_objectives import search


def ragged(lengths: tuple[int, ...] = (7, 4, 5, 6)) -> CounterfactualBatch:
    """Pairs of texts of different lengths, each with a source as long."""
    base, source = (tiny_inputs(lengths, answer=True, seed=seed) for seed in range(2))
    label = torch.arange(len(lengths))
    return CounterfactualBatch(
        base=base,
        sources={"value": source},
        base_label=label,
        counterfactual_label=label + 1,
        contrast_label=label,
        source_labels={"value": label + 1},
        variables={"value": label},
        groups=(("value",),),
        group=torch.zeros_like(label),
        isolates=torch.zeros(len(label), dtype=torch.bool),
    )


@pytest.mark.parametrize("site", ["layer1.block_output@all", "layer1.block_output@first+last", "layer1.block_output"])
@pytest.mark.parametrize("norm", [1, 2])
def test_the_size_of_an_edit_counts_the_tokens_that_an_example_has(site: str, norm: Any) -> None:
    batch, network = ragged(), make_network(tiny_model("gpt2"), replay="off")
    search = AlignmentSearch(
        network=network, sites=site, intervention=FullVector, objectives={"size": partial(EditSize, norm=norm)}
    )
    losses = search.objectives(search.outcome(batch, search.trained))[0]
    whole = [network.read(each, [search.sites[0].at("all")]) for each in (batch.base, batch.sources["value"])]
    for row, (start, stop) in enumerate(batch.base.tokens.tolist()):  # type: ignore[union-attr]
        moved = next(iter(whole[1].values()))[row] - next(iter(whole[0].values()))[row]
        own = moved[start:stop] if "first" not in site else moved[[start, stop - 1]]
        torch.testing.assert_close(losses[row], own.flatten().norm(p=norm))
        alone = batch.take(torch.tensor([row]))
        torch.testing.assert_close(search.objectives(search.outcome(alone, search.trained))[0][0], losses[row])


def test_the_target_of_isolate_pairs_is_the_base() -> None:
    isolates = torch.tensor([False, True, False, True])
    batch, network = replace(ragged(), isolates=isolates), make_network(tiny_model("gpt2"), replay="off")
    search = AlignmentSearch(
        network=network, sites="layer1.block_output@last", intervention=partial(DAS, rank=2), objectives={"kl": KL}
    )
    found = search.outcome(batch, search.trained).source_logits()
    torch.testing.assert_close(found[isolates], network(batch.base)[isolates])
    torch.testing.assert_close(found[~isolates], network(batch.sources["value"])[~isolates])


@pytest.mark.parametrize("make", [KL, JensenShannon])
def test_a_source_of_another_answer_is_no_target(make: type[KL]) -> None:
    batch = ragged()
    make().require(batch)
    label = batch.counterfactual_label.clone()
    label[2] = 0
    other = replace(batch, counterfactual_label=label)
    with pytest.raises(ValueError, match="in 1 of 4 pairs the source's answer is another"):
        make().require(other)
    make().require(replace(other, isolates=torch.arange(4) == 2))
    make(target="base").require(other)


def test_a_checkpoint_knows_its_objectives(tmp_path: Path) -> None:
    module, data = search(objectives={"ce": CrossEntropy, "size": partial(EditSize, norm=1, weight=0.25)})
    runner = trainer(max_epochs=1)
    runner.fit(module, datamodule=data)
    runner.save_checkpoint(tmp_path / "last.ckpt")
    found = AlignmentSearch.load_from_checkpoint(tmp_path / "last.ckpt", network=HookedNetwork(Planted()))
    parts: Any = found.objectives.parts
    assert list(parts) == ["ce", "size"] and found.objectives.named
    assert (parts["size"].norm, parts["size"].weight, parts["ce"].weight) == (1, 0.25, 1.0)
