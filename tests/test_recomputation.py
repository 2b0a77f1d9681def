"""Compiled and checkpointed models run code that our hooks could miss in silence; they must not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from itrain.architectures import blocks
from itrain.networks.hooks import HookedNetwork
from tests.models import HIDDEN, hook_count, sites, tiny_inputs, tiny_model

RAGGED = {"name": torch.tensor([[1, 2], [2, 5]])}


@torch.no_grad()
def test_a_compiled_model_that_already_ran_is_read_and_edited():
    torch._dynamo.reset()
    compiled, inputs = torch.compile(tiny_model("llama"), backend="eager"), tiny_inputs()
    compiled(**inputs.arguments, use_cache=False)
    check_edits_like_uncompiled(HookedNetwork(compiled))


@torch.no_grad()
@pytest.mark.parametrize("inplace", [True, False])
def test_compiled_blocks_that_already_ran_are_read_and_edited(inplace):
    torch._dynamo.reset()
    model, inputs = tiny_model("llama"), tiny_inputs()
    for place, block in enumerate(blocks(model)):
        if inplace:
            block.compile(backend="eager")
        else:
            blocks(model)[place] = torch.compile(block, backend="eager")
    model(**inputs.arguments, use_cache=False)
    check_edits_like_uncompiled(HookedNetwork(model))


def check_edits_like_uncompiled(network: HookedNetwork) -> None:
    inputs, plain = tiny_inputs(), HookedNetwork(tiny_model("llama"))
    for site in sites(
        "layer0.block_output@last", "layer1.block_input@1", "layer0.mlp_activation@last", "layer1.query_output.head1"
    ):
        assert torch.equal(network.read(inputs, [site])[site], plain.read(inputs, [site])[site])
        edit = [(site, torch.zeros_like)]
        assert torch.equal(network.edit(inputs, edit), plain.edit(inputs, edit))
        assert torch.equal(network(inputs), plain(inputs))


def enable_checkpointing(model: nn.Module, *, reentrant: bool) -> None:
    # transformers renamed the method within its version 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


INTERCHANGES = [
    ("layer0.block_output@last", "layer0.block_output@last"),
    ("layer1.block_input@1", "layer0.block_output@last"),
    ("layer0.mlp_output@last", "layer0.block_output@last"),
    ("layer1.query_output.head1@all", None),
    ("layer0.mlp_activation@name", None),
]


def gradients(model: nn.Module, at: str, source_at: str | None) -> dict[str, Tensor]:
    """Of every weight and of the edit, after a step that interchanges at one site what was read at another."""
    network, inputs = HookedNetwork(model, trainable=True), tiny_inputs(spans=RAGGED)
    (site,) = sites(at)
    torch.manual_seed(0)
    vector = torch.randn(network.hidden_size(site), requires_grad=True)
    if source_at is None:
        edit = lambda base: base * vector  # noqa: E731
    else:
        (source_site,) = sites(source_at)
        source = network.read(tiny_inputs(seed=1), [source_site])[source_site]
        edit = lambda base: base + source * vector  # noqa: E731
    network.edit(inputs, [(site, edit)]).square().sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters()} | {"edit": vector.grad}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("at", "source_at"), INTERCHANGES)
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama", "bloom"])
def test_gradient_checkpointing_changes_no_gradient(model_type, at, source_at, reentrant):
    expected = gradients(tiny_model(model_type).train(), at, source_at)
    model = tiny_model(model_type).train()
    enable_checkpointing(model, reentrant=reentrant)
    functions, hooks = [block._gradient_checkpointing_func for block in blocks(model)], hook_count(model)
    within = type(blocks(model)[0]).__call__ is not nn.Module.__call__
    if within and reentrant and source_at is not None:
        # Earlier releases recompute a block with its hooks, so that what is read at its end would have no gradient.
        with pytest.raises(RuntimeError, match="reentrant gradient checkpointing"):
            gradients(model, at, source_at)
        return
    found = gradients(model, at, source_at)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-4, rtol=1e-4), name
    assert [block._gradient_checkpointing_func for block in blocks(model)] == functions
    assert hook_count(model) == hooks


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reading_inside_a_block_is_refused_where_its_gradient_would_be_lost():
    model, (site,) = tiny_model("llama").train(), sites("layer0.mlp_output@last")
    enable_checkpointing(model, reentrant=True)
    network = HookedNetwork(model, trainable=True)
    with pytest.raises(RuntimeError, match=r"layer0.mlp_output@last.*reentrant"):
        network.read(tiny_inputs(), [site])
    with torch.no_grad():
        assert network.read(tiny_inputs(), [site])[site].shape == (2, 1, HIDDEN)


@pytest.mark.parametrize("stop_early", [False, True])
def test_reading_inside_a_checkpointed_block_carries_its_gradient(stop_early):
    site, later = sites("layer0.attention_output@last", "layer1.block_input@last")
    found = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if checkpointing:
            enable_checkpointing(model, reentrant=False)
        network = HookedNetwork(model, trainable=True)
        read = network.read(tiny_inputs(), [site, later], stop_early=stop_early)
        kept = read[site]
        kept.square().sum().backward()
        assert read[site] is kept
        found.append(model.model.layers[0].self_attn.o_proj.weight.grad)
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_modules_in_checkpointed_blocks_are_recomputed_with_the_edit():
    torch._dynamo.reset()
    model = tiny_model("llama").train()
    enable_checkpointing(model, reentrant=False)
    for block in blocks(model):
        block.mlp.compile(backend="eager")
    model(**tiny_inputs().arguments, use_cache=False).logits.sum().backward()
    model.zero_grad()
    found = gradients(model, "layer0.mlp_activation@name", None)
    for name, gradient in gradients(tiny_model("llama").train(), "layer0.mlp_activation@name", None).items():
        assert torch.allclose(found[name], gradient, atol=1e-4, rtol=1e-4), name
