"""The loss over the labels' candidates alone: the same logits for less, and an error for labels that are none."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from itrain.adapters import add_lora
from itrain.data import CounterfactualBatch, CounterfactualDataModule
from itrain.inputs import ModelInputs
from itrain.interventions.das import DAS
from itrain.models import load_embedded
from itrain.networks.base import Network
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.tasks.gender import Gender
from itrain.training.alignment import AlignmentSearch
from itrain.training.cohort import Cohort
from tests.models import ALL_TYPES, CAUSAL_TYPES, VOCABULARY, hook_count, tiny_inputs, tiny_model
from tests.planted import Bits, Planted
from tests.test_interchange import QUIET

CANDIDATES = torch.tensor([3, 5, 11])
SITE = Site.parse("layer0.block_output@2")
NAME = Site.parse("layer2.block_output@name")


def loss_and_gradient(network: Network, inputs: ModelInputs, *, whole: bool) -> list[Tensor]:
    """The cross entropy over the candidates, from their logits or from all, and its gradient in an edit."""
    torch.manual_seed(0)
    shift = torch.randn(network.hidden_size(SITE, inputs), requires_grad=True)
    asked = inputs if whole else inputs.among(CANDIDATES)
    logits = network.edit(asked, [(SITE, lambda base: base + shift)])
    assert logits.shape[-1] == (VOCABULARY if whole else len(CANDIDATES))
    chosen = logits[..., CANDIDATES] if whole else logits
    loss = cross_entropy(chosen, torch.arange(len(inputs.arguments["input_ids"])))
    loss.backward()
    assert shift.grad is not None
    return [loss.detach(), shift.grad]


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_candidates_have_the_logits_and_gradients_that_they_have_among_all(model_type: str) -> None:
    inputs = tiny_inputs((6, 5), answer=True)
    network = make_network(tiny_model(model_type), replay="on" if model_type in CAUSAL_TYPES else "auto")
    expected = loss_and_gradient(network, inputs, whole=True)
    for _ in range(3):
        found = loss_and_gradient(network, inputs, whole=False)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_no_other_logits_are_computed() -> None:
    network, inputs = HookedNetwork(tiny_model("llama")), tiny_inputs(answer=True)
    counts = []
    for asked in (inputs, inputs.among(CANDIDATES)):
        with FlopCounterMode(display=False) as counter:
            network(asked)
        counts.append(counter.get_total_flops())
    hidden = network.model.get_output_embeddings().in_features
    assert counts[0] - counts[1] == 2 * 2 * hidden * (VOCABULARY - len(CANDIDATES))


@pytest.mark.parametrize("kind", ["hooked", "edited", "adapted"])
def test_a_head_that_is_no_plain_linear_map_gives_all_logits_of_which_candidates_are_kept(kind: str) -> None:
    network, inputs = HookedNetwork(tiny_model("llama")), tiny_inputs(answer=True)
    seen: list[int] = []
    edits = []
    if kind == "hooked":
        head = network.model.get_output_embeddings()
        head.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    elif kind == "edited":
        edits = [(Site.parse("module:lm_head.output"), lambda logits: (seen.append(logits.shape[-1]), -logits)[1])]
    else:
        add_lora(network.model, rank=2, alpha=4.0, targets=["lm_head"])
        nn.init.normal_(next(p for n, p in network.model.named_parameters() if "lora_B" in n))
    whole = network.edit(inputs, edits)
    some = network.edit(inputs.among(CANDIDATES), edits)
    torch.testing.assert_close(some, whole[:, CANDIDATES])
    assert seen == ([] if kind == "adapted" else [VOCABULARY, VOCABULARY])


def test_the_head_is_left_as_it_was_found() -> None:
    network, inputs = HookedNetwork(tiny_model("llama")), tiny_inputs(answer=True)
    whole = network(inputs)
    with pytest.raises(ZeroDivisionError):
        network.edit(inputs.among(CANDIDATES), [(SITE, lambda base: base / (1 // 0))])
    assert "forward" not in network.model.get_output_embeddings().__dict__
    assert hook_count(network.model) == 0
    assert torch.equal(network(inputs), whole)


def test_candidates_stay_with_what_is_made_of_inputs() -> None:
    inputs = tiny_inputs((6, 4), answer=True).among(CANDIDATES)
    for made in (inputs.take(torch.tensor([1])), inputs.to("cpu")):
        assert made.candidates is not None and torch.equal(made.candidates, CANDIDATES)
    assert inputs.prompts().candidates is None, "generated text may have any token"


def gender(network: Network) -> CounterfactualDataModule:
    task = Gender()
    task.bind(load_embedded().tokenizer)
    return CounterfactualDataModule(
        task=task, network=network, train_pairs=64, validation_pairs=32, test_pairs=32, batch_size=16
    )


def search(network: Network, **settings: object) -> AlignmentSearch:
    lightning.seed_everything(0, verbose=False)
    adam = partial(torch.optim.Adam, lr=1e-2)
    return AlignmentSearch(network=network, sites=[NAME], intervention=DAS, optimizer=adam, **settings)  # type: ignore[arg-type]


def pairs_of_gender(network: Network) -> CounterfactualBatch:
    data = gender(network)
    data.setup("fit")
    return data.datasets["train"].examples


def test_the_candidates_of_a_task_are_its_labels_and_the_loss_is_that_over_them() -> None:
    network = HookedNetwork(load_embedded().model)
    batch = pairs_of_gender(network)
    assert batch.candidates is not None
    assert batch.candidates.tolist() == batch.counterfactual_label.unique().tolist()
    module = search(network, loss_over="candidates")
    logits = module.interchange(batch, module.trained)[:, batch.candidates]
    label = (batch.counterfactual_label[:, None] == batch.candidates).long().argmax(1)
    asked = module.trained_on(batch)
    found = module.loss(module.outcome(asked, module.trained))
    torch.testing.assert_close(found, cross_entropy(logits, label))
    assert torch.equal(asked.changes, batch.changes)


def test_over_all_classes_of_a_module_both_losses_are_one() -> None:
    network = HookedNetwork(Planted())
    data = CounterfactualDataModule(task=Bits(), network=network, train_pairs=32)
    data.setup("fit")
    batch = data.datasets["train"].examples
    narrow = batch.among_candidates()
    assert torch.equal(narrow.counterfactual_label, batch.counterfactual_label)
    assert torch.equal(network(narrow.base), network(batch.base))


def test_a_label_that_is_no_candidate_is_an_error() -> None:
    network = HookedNetwork(load_embedded().model)
    batch = pairs_of_gender(network)
    assert batch.candidates is not None
    module = search(network, loss_over="candidates")
    asked = module.trained_on(replace(batch, candidates=batch.candidates[:1]))
    with pytest.raises(IndexError, match="-1 is out of bounds"):
        module.loss(module.outcome(asked, module.trained))


def test_answers_of_several_tokens_are_refused() -> None:
    network = HookedNetwork(load_embedded().model)
    batch = pairs_of_gender(network)
    with pytest.raises(ValueError, match="several tokens"):
        search(network, loss_over="candidates").trained_on(replace(batch, candidates=None))


@pytest.mark.parametrize("replay", ["on", "off"])
def test_a_cohort_s_fits_over_candidates_are_those_made_alone(replay: str) -> None:
    results, weights = [], []
    for together in (False, True):
        network = make_network(load_embedded().model, replay=replay)  # type: ignore[arg-type]
        member = search(network, loss_over="candidates")
        module = Cohort(members={"a": member}, optimizer=member.optimizer) if together else member
        trainer = lightning.Trainer(max_epochs=3, **QUIET)
        trainer.fit(module, datamodule=gender(network))
        weights.append([each.detach() for each in member.exported.parameters()])
        (found,) = trainer.test(module, datamodule=gender(network), verbose=False)
        results.append(module.found if isinstance(module, Cohort) else found)
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)
    # Tests are over the whole vocabulary.
    assert results[1]["a/test/iia_argmax"] == pytest.approx(results[0]["test/iia_argmax"])
    assert results[0]["test/full_vector/iia_argmax"] > 0.9


def test_members_of_different_losses_are_refused() -> None:
    network = HookedNetwork(load_embedded().model)
    members = {over: search(network, loss_over=over) for over in ("vocabulary", "candidates")}
    with pytest.raises(ValueError, match="candidates and vocabulary"):
        Cohort(members=members)
