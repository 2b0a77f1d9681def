"""Attention weights: where attention is eager, they are read and edited; elsewhere they are refused."""

from __future__ import annotations

import pytest
import torch

from itrain.architectures import locate
from itrain.inputs import PositionError
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from tests.models import ALL_TYPES, HEADS, hook_count, sites, tiny_inputs, tiny_model

WHOLE, LAST, HEAD = sites(
    "layer1.attention_weights", "layer1.attention_weights@last", "layer1.attention_weights.head2@last"
)


def eager(model_type="llama"):
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_they_are_those_of_transformers_and_edits_of_them_act(model_type):
    model = eager(model_type)
    network, inputs = HookedNetwork(model), tiny_inputs(answer=True)
    found = network.read(inputs, [WHOLE, HEAD])
    weights = model(**inputs.arguments, output_attentions=True).attentions[1]
    assert torch.equal(found[WHOLE], weights.transpose(1, 2).flatten(2))
    assert torch.equal(found[HEAD][:, 0], weights[:, 2, -1])
    before, hooks = network(inputs), hook_count(model)  # transformers leaves some of its own
    torch.testing.assert_close(network.edit(inputs, [(WHOLE, lambda base: base)]), before)
    assert not torch.allclose(network.edit(inputs, [(HEAD, torch.zeros_like)]), before)
    assert hook_count(model) == hooks and not any("forward" in vars(module) for module in model.modules())


def test_zero_weights_of_a_head_equal_a_zero_output_of_it():
    network, inputs = HookedNetwork(eager()), tiny_inputs(answer=True)
    (value,) = sites("layer1.attention_value_output.head2@last")
    by_weights = network.edit(inputs, [(HEAD, torch.zeros_like)])
    torch.testing.assert_close(by_weights, network.edit(inputs, [(value, torch.zeros_like)]))


def test_all_heads_are_swapped_as_each_of_them_is():
    network = HookedNetwork(eager())
    base, source = tiny_inputs((6, 4), answer=True), tiny_inputs((6, 4), answer=True, seed=1)
    heads = sites(*(f"layer1.attention_weights.head{head}@last" for head in range(HEADS)))
    read = network.read(source, [LAST, *heads])
    together = network.edit(base, [(LAST, lambda _: read[LAST])])
    torch.testing.assert_close(together, network.edit(base, [(head, lambda _, h=head: read[h]) for head in heads]))


def test_other_attention_is_refused_by_name():
    with pytest.raises(ValueError, match=r'sdpa attention computes no weights .*attn_implementation="eager"'):
        locate(tiny_model("llama"), WHOLE)


def test_a_head_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="head 4 does not exist: llama has heads 0-3"):
        locate(eager(), Site.parse("layer1.attention_weights.head4"))


def test_texts_of_other_lengths_are_refused():
    with pytest.raises(PositionError, match="go over all tokens of a text, so that base and source need as many"):
        tiny_inputs((6, 4)).require_same_count(tiny_inputs((4, 6)), LAST)


def test_a_network_that_replays_does_not_replay_them():
    model = eager()
    hooked = HookedNetwork(model)
    network, inputs = make_network(model, replay="auto"), tiny_inputs((6, 4), answer=True)
    for _ in range(2):
        assert torch.equal(network.read(inputs, [LAST])[LAST], hooked.read(inputs, [LAST])[LAST])
        edits = [(LAST, torch.zeros_like)]
        assert torch.equal(network.edit(inputs, edits), hooked.edit(inputs, edits))


def test_gradients_flow_through_them_also_where_blocks_are_recomputed():
    gradients = []
    for checkpointing in (False, True):
        model = eager()
        network = HookedNetwork(model, trainable=True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        network.edit(tiny_inputs(answer=True), [(LAST, lambda base: base * 0.5)]).logsumexp(-1).sum().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients)
