"""Batches that leave an intervention alone: no pair interchanges its variable, or no response has its tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import lightning
import pytest
import torch

from itrain.data import CounterfactualDataModule
from itrain.data.counterfactual import IntervenedInputs, Sources
from itrain.data.responses import ResponseBatch, ResponseDataModule
from itrain.interventions.das import DAS
from itrain.interventions.reft import LoReFT
from itrain.models import load_embedded
from itrain.networks.base import Network
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.tasks.response_style import ResponseStyle
from itrain.training.alignment import AlignmentSearch
from itrain.training.callbacks import FirstStepError
from itrain.training.finetuning import RepresentationFinetuning
from itrain.training.interchange import Interchange
from tests.models import tiny_model
from tests.test_interchange import ADAM, QUIET, two_bits
from tests.test_placements import A, B, two_variables


def test_a_batch_of_text_in_which_no_pair_interchanges_a_variable_is_run() -> None:
    part, batch = Interchange(HookedNetwork(tiny_model("llama")), sites=[A], intervention=DAS), two_variables()
    whole = part(batch, part.trained)
    for number in range(3):
        rows = (batch.group == number).nonzero()[:, 0]
        torch.testing.assert_close(part(batch.take(rows), part.trained), whole[rows], atol=1e-5, rtol=1e-5)


def test_a_batch_whose_sources_are_all_left_alone_is_run_as_in_a_mixed_one() -> None:
    part, batch = Interchange(HookedNetwork(tiny_model("llama")), sites=[A], intervention=DAS), two_variables()
    group = torch.tensor([0, 1, 0, 1, 0, 1])
    inner = Sources({"left": batch.base}, ((), ("left",)), group)
    chained = IntervenedInputs.of(batch.sources["left"], inner)
    batch = replace(batch, sources={"left": chained}, groups=(("left",),), group=torch.zeros(6, dtype=torch.long))
    whole = part(batch, part.trained)
    for rows in (group == 0, group == 1):
        alone = part(batch.take(rows.nonzero()[:, 0]), part.trained)
        torch.testing.assert_close(alone, whole[rows], atol=1e-5, rtol=1e-5)


def test_every_weight_has_a_gradient_whatever_a_batch_interchanges() -> None:
    """Of 0 where it serves no pair: several processes would wait for one that has none."""
    part = Interchange(HookedNetwork(tiny_model("llama")), sites={"left": A, "right": B}, intervention=DAS)
    batch = two_variables().take(torch.tensor([0, 3]))  # both interchange left
    (part(batch, part.trained).sum() + part.penalty(batch)).backward()
    used, idle = ([p.grad for p in each.parameters()] for each in part.trained.values())
    assert all(each is not None and each.any() for each in used)
    assert all(each is not None and not each.any() for each in idle)


def in_order(first: str) -> tuple[AlignmentSearch, CounterfactualDataModule]:
    """A search of two variables, of whose first steps all pairs interchange the one alone."""
    _, data = two_bits()
    data.setup("fit")
    pairs = data.datasets["train"].examples
    rows = [(pairs.group == pairs.groups.index(group)).nonzero()[:, 0] for group in ((first,), ("left", "right"))]
    data.datasets["train"].examples = pairs.take(torch.cat(rows))
    sites = {"left": "module:embed.output", "right": "module:embed.output"}
    return (
        AlignmentSearch(network=data.network, sites=sites, intervention=DAS, optimizer=ADAM, hidden_sizes=[8, 8]),
        data,
    )


def test_a_first_batch_that_leaves_a_site_alone_ends_no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = in_order("left")
    monkeypatch.setattr(data, "train_dataloader", lambda: data.loader(data.datasets["train"], 32))  # unshuffled
    before = [each.subspace.rows.clone() for each in module.trained.values()]  # type: ignore[union-attr]
    lightning.Trainer(max_epochs=1, **QUIET).fit(module, datamodule=data)
    for was, each in zip(before, module.trained.values(), strict=True):
        assert not torch.equal(was, each.subspace.rows)  # type: ignore[union-attr]


def test_a_site_that_an_epoch_leaves_alone_ends_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = in_order("left")
    monkeypatch.setattr(data, "train_dataloader", lambda: data.loader(data.datasets["train"], 32))
    with pytest.raises(FirstStepError, match=r"right: module:embed\.output.*no gradient in an epoch"):
        lightning.Trainer(max_epochs=1, limit_train_batches=2, **QUIET).fit(module, datamodule=data)


# --- responses


def finetuning(network: Network, acts: list[int]) -> RepresentationFinetuning:
    return RepresentationFinetuning(
        network=network, sites="layer2.block_output@last", intervention=partial(LoReFT, rank=2), acts=acts
    )


@pytest.fixture(scope="module")
def responses() -> ResponseDataModule:
    embedded, task = load_embedded(), ResponseStyle()
    task.bind(embedded.tokenizer)
    sizes = {"train_examples": 8, "validation_examples": 2, "test_examples": 2}
    data = ResponseDataModule(task=task, network=HookedNetwork(embedded.model), **sizes)
    data.setup("fit")
    return data


def shortened(batch: ResponseBatch, tokens: int) -> ResponseBatch:
    """The batch with so many tokens of each response."""
    inputs = batch.inputs
    assert inputs.tokens is not None and inputs.answer is not None
    shorter = replace(inputs, stop=inputs.tokens[:, 1] + tokens - 1, answer=inputs.answer[:, :tokens])
    return replace(batch, inputs=shorter, label=batch.label[:, :tokens])


@pytest.mark.parametrize("replay", ["on", "off"])
def test_responses_that_end_before_the_edit_have_gradients_of_0(replay: str, responses: ResponseDataModule) -> None:
    module = finetuning(make_network(responses.network.model, replay=replay), [5])  # type: ignore[arg-type]
    module.log = lambda *given, **settings: None  # type: ignore[method-assign]
    for batch, moves in (
        (shortened(responses.datasets["train"].examples, 3), False),
        (responses.datasets["train"].examples, True),
    ):
        module.zero_grad()
        module.training_step(batch, 0).backward()
        found = [each.grad for each in module.exported.parameters()]
        assert all(each is not None for each in found)
        assert any(bool(each.any()) for each in found if each is not None) == moves


def test_an_edit_after_every_response_is_refused_before_a_run(responses: ResponseDataModule) -> None:
    finetuning(responses.network, [6]).check(responses)
    with pytest.raises(ValueError, match=r"acts=\[7\]: a training response goes on after 7 of its tokens at most"):
        finetuning(responses.network, [7]).check(responses)
