"""NNsightNetwork: traces of nnsight equal plain hooks, on three architectures and on modules of one's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from itrain.inputs import ModelInputs
from itrain.interventions.das import DAS
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import EditAt
from itrain.networks.nnsight import LibraryError, NNsightNetwork
from itrain.sites import Site
from itrain.training.interchange import Interchange
from tests.models import HIDDEN, hook_count, pairs, sites, tiny_inputs, tiny_model

ARCHITECTURES = ["gpt2", "llama", "gpt_neox"]
each_architecture = pytest.mark.parametrize("model_type", ARCHITECTURES)
SITES = (
    "layer1.block_output@last",  # not in the order in which they run
    "layer0.block_output@all",
    "layer1.mlp_output@0",
    "layer0.query_output.head2@last",
    "layer1.attention_value_output.head1@last2",
    "layer0.mlp_input",
    "layer0.attention_output@name",
)


pytestmark = pytest.mark.usefixtures("nnsight")


def networks(model: nn.Module) -> tuple[HookedNetwork, NNsightNetwork]:
    return HookedNetwork(model), NNsightNetwork(model)


def ragged(*, answer: bool = True) -> ModelInputs:
    """Texts padded on the left, with a span that has other tokens in each."""
    return tiny_inputs((6, 4), left=True, answer=answer, spans={"name": torch.tensor([[1, 4], [3, 4]])})


@each_architecture
def test_reads_equal_those_of_hooks(model_type):
    hooks, traces = networks(tiny_model(model_type))
    inputs, found = ragged(), sites(*SITES)
    expected, read = hooks.read(inputs, found), traces.read(inputs, found)
    assert set(read) == set(found)
    assert all(torch.equal(read[site], expected[site]) for site in found)


@each_architecture
def test_edits_answers_and_gradients_equal_those_of_hooks(model_type):
    hooks, traces = networks(tiny_model(model_type))
    weight = torch.randn(HIDDEN, HIDDEN, requires_grad=True)
    late, early, mlp, head, *_ = sites(*SITES)
    source = hooks.read(tiny_inputs((5, 5), seed=1), [early.at("last")])[early.at("last")]
    edits = [(late, lambda base: base @ weight), (early.at("last"), lambda base: source), (mlp, torch.neg)]
    edits += [(head, lambda base: base + 1), (late, lambda base: 2 * base)]
    for inputs in (ragged(), ragged(answer=False), ragged().among(torch.tensor([3, 7]))):
        answers = [network.edit(inputs, edits) for network in (hooks, traces)]
        grads = [torch.autograd.grad(answer.square().sum(), weight)[0] for answer in answers]
        assert torch.allclose(*answers, rtol=1e-5) and torch.allclose(*grads, rtol=1e-5)
        assert not torch.allclose(answers[1], traces(inputs))
    under = [network.read(ragged(), [late, early], edits) for network in (hooks, traces)]
    assert all(torch.equal(under[0][site], under[1][site]) for site in (late, early))


@each_architecture
def test_members_in_one_run_equal_those_of_hooks(model_type):
    hooks, traces = networks(tiny_model(model_type))
    late, early, *_ = sites(*SITES)
    members = [[(late, torch.neg)], [(early, torch.neg), (late, torch.neg)], []]
    found = [network.edit_each(ragged(), members, rows=4) for network in (hooks, traces)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@each_architecture
@pytest.mark.parametrize("acts", ["prompt", "generated", "all", (0, 2)])
def test_generations_equal_those_of_hooks(model_type, acts):
    hooks, traces = networks(tiny_model(model_type))
    first, second = sites("layer1.block_output@name", "layer0.attention_value_output.head1@last2")
    shift = 5 * torch.randn(HIDDEN)
    edits = [EditAt(first, lambda base: base + shift, acts), EditAt(second, torch.neg, acts)]
    for settings in ({}, {"num_beams": 2}, {"use_cache": False}):
        tokens = [network.generate(ragged(), edits, max_new_tokens=4, **settings) for network in (hooks, traces)]
        assert torch.equal(*tokens), settings
    assert not torch.equal(tokens[1], traces.generate(ragged(), [], max_new_tokens=4))


def test_draws_equal_those_of_hooks():
    hooks, traces = networks(tiny_model("llama"))
    draws = partial(hooks.generate), partial(traces.generate)
    found = [
        draw(
            ragged(),
            [],
            max_new_tokens=4,
            do_sample=True,
            generators=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        )
        for draw in draws
    ]
    assert torch.equal(*found)


def test_a_fit_trains_what_it_trains_under_hooks():
    model, batch = tiny_model("gpt_neox"), pairs(ragged(), tiny_inputs((6, 4), left=True, seed=2))
    losses = []
    for network in networks(model):
        torch.manual_seed(0)
        interchange = Interchange(network, sites="layer0.block_output@last", intervention=partial(DAS, rank=2))
        optimizer = torch.optim.Adam(interchange.parameters(), lr=1e-1)
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(interchange(batch, interchange.trained), batch.counterfactual_label)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Recurrent(nn.Module):
    """A cell that is called once for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out, self.unused = nn.GRUCell(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 4)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.out(state)


def test_calls_are_told_apart_and_those_that_are_not_there_are_refused():
    """nnsight alone would take the first call, without a word."""
    hooks, traces = networks(Recurrent())
    inputs = ModelInputs(arguments={"x": torch.randn(5, 3, 3)})
    last, first = sites("module:cell.output.step2", "module:cell.output.step0")
    read = [network.read(inputs, [last, first]) for network in (hooks, traces)]
    assert all(torch.equal(read[0][site], read[1][site]) for site in (last, first))
    edits = [(last, torch.neg), (first, lambda base: base + 1)]
    assert torch.equal(hooks.edit(inputs, edits), traces.edit(inputs, edits))
    for site, message in {
        "module:cell.output": "several times",
        "module:cell.output.step7": "called 3 times",
        "module:unused.output": "was not called",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            traces.read(inputs, sites(site))
        with pytest.raises(RuntimeError, match=message):
            traces.edit(inputs, [(Site.parse(site), torch.neg)])


def test_the_model_is_left_as_it_was_found():
    model = tiny_model("gpt2")
    before = {module: dict(module.__dict__) for module in model.modules()}
    network, (site,) = NNsightNetwork(model), sites("layer0.block_output@last")
    network.edit(ragged(), [(site, torch.neg)])
    with pytest.raises(ZeroDivisionError):
        network.edit(ragged(), [(site, lambda base: base / (1 // 0))])
    network.generate(ragged(), [(site, torch.neg)], max_new_tokens=2)
    assert hook_count(model) == 0
    for module, attributes in before.items():
        assert module.__dict__.keys() == attributes.keys()


def test_modules_that_take_the_place_of_others_are_traced():
    model = tiny_model("gpt2")
    hooks, traces = networks(model)
    (site,) = sites("layer0.mlp_output@last")
    traces.read(ragged(), [site])
    model.transformer.h[0].mlp.c_proj = nn.Linear(model.config.n_inner, HIDDEN)
    assert torch.equal(traces.read(ragged(), [site])[site], hooks.read(ragged(), [site])[site])


def test_what_a_trace_cannot_do_is_refused():
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    (site,) = sites("layer0.block_output@last")
    with pytest.raises(ValueError, match="gradient checkpointing"):
        NNsightNetwork(model, trainable=True).edit(ragged(), [(site, torch.neg)])
    model = tiny_model("llama").eval()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attention weights"):
        NNsightNetwork(model).read(ragged(), sites("layer0.attention_weights@last"))


def test_without_nnsight_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("itrain.networks.nnsight.library.find_spec", lambda name: None)
    with pytest.raises(LibraryError, match=r"nnsight is not installed; pip install 'itrain\[nnsight\]'"):
        NNsightNetwork(tiny_model("gpt2"))
