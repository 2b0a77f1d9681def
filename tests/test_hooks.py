"""HookedNetwork: reads and edits land where the site says, and the model is left as it was found."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from itrain.inputs import PositionError
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay.eligible import modules_of
from itrain.sites import Site
from tests.models import HIDDEN, LAYERS, VOCABULARY, hook_count, sites, tiny_inputs, tiny_model


@pytest.fixture
def network() -> HookedNetwork:
    return HookedNetwork(tiny_model("llama"))


# Left as it was found


def test_users_hooks_survive_and_fire_once_a_run(network):
    fired: Counter[str] = Counter()
    block, mlp = network.model.model.layers[0], network.model.model.layers[0].mlp
    block.register_forward_hook(lambda *_: fired.update(["block"]))
    mlp.register_forward_pre_hook(lambda *_: fired.update(["mlp"]))
    inputs, (site, inner) = tiny_inputs(), sites("layer0.block_output@last", "layer0.mlp_input@last")
    for runs, run in enumerate(
        [
            lambda: network(inputs),
            lambda: network.read(inputs, [site, inner]),
            lambda: network.edit(inputs, [(site, torch.zeros_like), (inner, torch.zeros_like)]),
            lambda: network.model(**inputs.arguments),
        ],
        start=1,
    ):
        run()
        assert fired == {"block": runs, "mlp": runs}


def test_a_users_hook_registered_earlier_may_change_what_is_read(network):
    network.model.model.layers[0].register_forward_hook(lambda module, args, output: torch.ones_like(output))
    (site,) = sites("layer0.block_output@last")
    assert torch.equal(network.read(tiny_inputs(), [site])[site], torch.ones(2, 1, HIDDEN))


def test_output_hidden_states_works_before_during_and_after(network):
    inputs, (site,) = tiny_inputs(), sites("layer0.block_output@last")
    plain = lambda: network.model(**inputs.arguments, output_hidden_states=True).hidden_states  # noqa: E731
    before, during = plain(), []
    network.model.register_forward_hook(lambda module, args, output: during.append(output.hidden_states))
    network.model.config.output_hidden_states = True
    network.edit(inputs, [(site, torch.zeros_like)])
    network.model.config.output_hidden_states = False
    assert len(during[0]) == LAYERS + 1
    assert not torch.equal(during[0][-1], before[-1])
    assert all(torch.equal(one, other) for one, other in zip(before, plain(), strict=True))


@pytest.mark.parametrize("fault", ["edit", "position", "model"])
def test_nothing_is_left_behind_by_an_exception(network, fault):
    inputs = tiny_inputs(answer=True)
    first, second = sites(
        "layer0.block_output@last", "layer1.mlp_input@9" if fault == "position" else "layer1.mlp_input"
    )

    def explode(base: Tensor) -> Tensor:
        raise ZeroDivisionError

    if fault == "model":
        network.model.lm_head.register_forward_hook(lambda module, args, output: explode(output))
    before, answer = hook_count(network.model), None if fault == "model" else network(inputs)
    with pytest.raises((ZeroDivisionError, PositionError)):
        network.edit(inputs, [(first, torch.zeros_like), (second, explode if fault == "edit" else torch.zeros_like)])
    assert hook_count(network.model) == before
    assert answer is None or torch.equal(network(inputs), answer)


def test_activations_and_sources_are_not_modified_in_place():
    network, inputs = HookedNetwork(tiny_model("gpt2")), tiny_inputs()
    kept: list[tuple[Tensor, Tensor]] = []
    network.model.transformer.h[0].register_forward_hook(
        lambda module, args, output: kept.append((output, output.clone())) if isinstance(output, Tensor) else None
    )
    source = torch.randn(2, 1, HIDDEN)
    before = source.clone()
    network.edit(
        inputs, [(site, lambda _: source) for site in sites("layer0.block_output@1", "layer0.block_output@last")]
    )
    network.edit(inputs, [(Site(layer=0, component="block_output"), lambda base: base + 1)])
    assert kept
    assert all(torch.equal(output, copied) for output, copied in kept)
    assert torch.equal(source, before)


def test_frozen_and_trainable_models():
    frozen = HookedNetwork(tiny_model("llama").train())
    assert not frozen.model.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    trainable = HookedNetwork(tiny_model("llama").train(), trainable=True)
    assert trainable.model.training
    assert all(parameter.requires_grad for parameter in trainable.parameters())
    assert set(trainable.state_dict()) == {f"model.{name}" for name in trainable.model.state_dict()}


# Checkpoints


class Search(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.intervention = nn.Linear(2, 2)
        self.network = HookedNetwork(tiny_model("llama"))


def test_checkpoints_hold_no_frozen_weights_and_the_models_own_state_dict_stays_complete():
    search = Search()
    complete = set(tiny_model("llama").state_dict())
    assert set(search.state_dict()) == {"intervention.weight", "intervention.bias"}
    assert set(search.network.state_dict()) == set()
    assert set(search.network.model.state_dict()) == complete
    tiny_model("llama").load_state_dict(search.network.model.state_dict())


def test_strict_loading_forgives_frozen_weights_and_nothing_else():
    search = Search()
    search.load_state_dict({name: torch.ones_like(value) for name, value in search.state_dict().items()})
    assert torch.equal(search.intervention.weight, torch.ones(2, 2))
    for state in ({}, {"intervention.weight": torch.ones(2, 2)}):
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*intervention.bias"):
            search.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        search.load_state_dict(search.state_dict() | {"stray": torch.ones(1)})


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copies_and_pickles_behave_like_the_original(twin_of, network):
    twin, inputs, (site,) = twin_of(network), tiny_inputs(), sites("layer0.block_output@last")
    assert twin.state_dict() == {}
    twin.load_state_dict({})
    assert torch.equal(twin.read(inputs, [site])[site], network.read(inputs, [site])[site])


# Reading and editing


def test_sites_are_read_together_in_the_order_asked_for(network):
    wanted = sites("layer1.mlp_output@last", "layer0.block_output@1", "layer0.block_output@last", "layer0.query_output")
    inputs = tiny_inputs()
    found = network.read(inputs, [*wanted, wanted[0]])
    assert list(found) == wanted
    assert all(torch.equal(found[site], network.read(inputs, [site])[site]) for site in wanted)


def test_a_module_that_takes_anothers_place_is_found(network):
    """The one of before may still be called, within it."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * self.inner(hidden)

    inputs, (site,) = tiny_inputs(), sites("module:model.layers.0.mlp.output@last")
    before = network.read(inputs, [site])[site]
    block = network.model.model.layers[0]
    block.mlp = Doubled(block.mlp)
    assert torch.equal(network.read(inputs, [site])[site], 2 * before)
    block.mlp = block.mlp.inner
    assert torch.equal(network.read(inputs, [site])[site], before)


def test_edits_of_one_activation_compose_in_the_order_given(network):
    inputs, (site,) = tiny_inputs(), sites("layer0.mlp_output@last")
    double, add = (site, lambda base: base * 2), (site, lambda base: base + 1)
    assert torch.equal(network.edit(inputs, [double, add]), network.edit(inputs, [(site, lambda base: base * 2 + 1)]))
    assert torch.equal(network.edit(inputs, [add, double]), network.edit(inputs, [(site, lambda base: (base + 1) * 2)]))


def test_an_edit_is_seen_by_later_sites_of_the_same_run(network):
    inputs, (site, next_input) = tiny_inputs(), sites("layer0.block_output@all", "layer1.block_input@all")
    seen: list[Tensor] = []
    network.edit(inputs, [(next_input, lambda base: seen.append(base) or base), (site, torch.ones_like)])
    assert torch.equal(seen[0], torch.ones(2, 6, HIDDEN))


def test_an_edit_of_another_shape_is_refused(network):
    (site,) = sites("layer0.block_output@1+2")
    with pytest.raises(ValueError, match=r"made shape \(1, 2, 16\) of shape \(2, 2, 16\)"):
        network.edit(tiny_inputs(), [(site, lambda base: base[:1])])


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_only_answer_rows_reach_the_head(model_type):
    network, inputs = HookedNetwork(tiny_model(model_type)), tiny_inputs((6, 4), answer=True)
    rows: list[torch.Size] = []
    network.model.get_output_embeddings().register_forward_hook(lambda module, args, output: rows.append(output.shape))
    whole = network.model(**inputs.arguments).logits
    one = network(inputs)
    several = network(replace(inputs, answer=torch.tensor([[2, 5], [1, 3]])))
    assert rows == [(2, 6, VOCABULARY), (2, 1, VOCABULARY), (2, 2, VOCABULARY)]
    assert torch.allclose(one, whole[[0, 1], [5, 3]], atol=1e-6)
    assert torch.allclose(several, whole[[[0], [1]], [[2, 5], [1, 3]]], atol=1e-6)


def test_an_answer_asked_of_a_model_without_a_language_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        HookedNetwork(tiny_model("llama", head="none"))(tiny_inputs(answer=True))


@pytest.mark.parametrize(
    ("model_dtype", "edit_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_edits_compute_in_at_least_float32(model_dtype, edit_dtype):
    network, inputs, (site,) = (
        HookedNetwork(tiny_model("llama").to(model_dtype)),
        tiny_inputs(),
        sites("layer0.block_output@last"),
    )
    seen: list[torch.dtype] = []
    weight = torch.randn(HIDDEN, HIDDEN, dtype=edit_dtype, requires_grad=True)
    answer = network.edit(inputs, [(site, lambda base: seen.append(base.dtype) or base @ weight)])
    assert seen == [edit_dtype]
    assert answer.dtype == model_dtype
    answer.float().sum().backward()
    assert weight.grad.dtype == edit_dtype
    assert network.read(inputs, [site])[site].dtype == edit_dtype


def test_edits_stay_in_float32_under_autocast(network):
    inputs, (site,) = tiny_inputs(), sites("layer0.mlp_output@last")
    seen: list[torch.dtype] = []

    def rotate(base: Tensor) -> Tensor:
        new = base @ torch.eye(HIDDEN)
        seen.append(new.dtype)
        return new

    with torch.autocast("cpu", torch.bfloat16):
        network.edit(inputs, [(site, rotate)])
    assert seen == [torch.float32]


def test_gradients_flow_through_what_is_read():
    """The last block's output is all that the answer depends on, so the step is the source's own."""
    network = HookedNetwork(tiny_model("llama"), trainable=True)
    base, source, (site,) = tiny_inputs(), tiny_inputs(seed=1), sites("layer1.block_output")
    value = network.read(source, [site])[site]
    network.edit(base, [(site, lambda _: value)]).square().sum().backward()
    expected = tiny_model("llama")
    expected(**source.arguments).logits.square().sum().backward()
    for weight, other in zip(network.model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(weight.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_all_modules_are_found_once_even_those_that_are_shared_or_refer_to_each_other():
    model = tiny_model("gpt_neox")
    model.again = model.get_output_embeddings()
    found = modules_of(model)
    assert len(found) == len(set(found)) and set(found) == set(model.modules())
    model.again = nn.ModuleList([model])
    assert set(modules_of(model)) == set(model.modules())
