"""Positions: which tokens of which example a site reads and edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from itrain.inputs import ModelInputs, PositionError
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from tests.models import CAUSAL_TYPES, HIDDEN, sites, tiny_inputs, tiny_model

RAGGED = {"name": torch.tensor([[1, 2], [2, 5]])}


def edited_activation(
    network: HookedNetwork, inputs: ModelInputs, site: Site, edit: Callable[[Tensor], Tensor]
) -> Tensor:
    """The whole activation at the site after the edit, seen by a second edit that changes nothing."""
    seen: list[Tensor] = []
    network.edit(inputs, [(site, edit), (site.at(None), lambda base: seen.append(base) or base)])
    return seen[0]


@pytest.fixture
def network() -> HookedNetwork:
    return HookedNetwork(tiny_model("llama"))


def test_per_example_positions_after_a_call_with_an_integer_position(network):
    inputs = tiny_inputs(spans={"name": torch.tensor([[1, 2], [4, 5]])})
    whole, integer, named = sites("layer0.block_output", "layer0.block_output@2", "layer0.block_output@name")
    full = network.read(inputs, [whole])[whole]
    network.edit(inputs, [(integer, torch.zeros_like)])
    assert torch.equal(network.read(inputs, [named])[named][:, 0], full[[0, 1], [1, 4]])
    full[[0, 1], [1, 4]] = 0
    assert torch.equal(edited_activation(network, inputs, named, torch.zeros_like), full)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("1+3", [[1, 3], [1, 3]]),
        ("first", [[0], [0]]),
        ("first2", [[0, 1], [0, 1]]),
        ("last", [[5], [3]]),
        ("last2", [[4, 5], [2, 3]]),
        ("-1", [[5], [3]]),
        ("-3", [[3], [1]]),
        ("all", [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3]]),
        ("name", [[1], [1, 2, 3]]),
        ("name.first", [[1], [1]]),
        ("name.last+0", [[1, 0], [3, 0]]),
    ],
)
@pytest.mark.parametrize("left", [False, True])
def test_positions_name_these_tokens_of_the_text(position, expected, left, network):
    shift = torch.tensor([0, 2 if left else 0])
    spans = {"name": torch.tensor([[1, 2], [1, 4]]) + shift[:, None]}
    inputs, site = (
        tiny_inputs((6, 4), left=left, spans=spans),
        Site(layer=0, component="block_output", position=position),
    )
    seen: list[Tensor] = []
    network.model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = network.read(inputs, [site])[site]
    network.edit(inputs, [(site, lambda base: base + 1)])
    full, after = seen
    for example, tokens in enumerate(expected):
        places = [token + int(shift[example]) for token in tokens]
        assert torch.equal(found[example, : len(places)], full[example, places])
        changed = (after[example] != full[example]).any(-1).nonzero().flatten().tolist()
        assert changed == sorted(places)


def test_tokens_that_a_ragged_span_lacks_are_left_alone_and_get_no_gradient(network):
    inputs, (site,) = tiny_inputs(spans=RAGGED), sites("layer0.block_output@name")
    new = torch.randn(2, 3, HIDDEN, requires_grad=True)
    network.edit(inputs, [(site, lambda _: new)]).square().sum().backward()
    assert (new.grad[0, 0] != 0).all()
    assert (new.grad[0, 1:] == 0).all()
    assert (new.grad[1] != 0).all()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_padding_on_either_side_does_not_change_answers(model_type, left):
    network, padded = HookedNetwork(tiny_model(model_type)), tiny_inputs((6, 4, 3), left=left, answer=True)
    site = Site(layer=0, component="block_output", position="-2")
    together = [network(padded), network.edit(padded, [(site, lambda base: base * 2)])]
    for example in range(3):
        alone = padded.take(torch.tensor([example]))
        assert alone.arguments["attention_mask"].all()
        apart = [network(alone), network.edit(alone, [(site, lambda base: base * 2)])]
        for one, other in zip(together, apart, strict=True):
            assert torch.allclose(one[example], other[0], atol=1e-5)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ("4", r"position '4' does not exist in example 1 \('short'\), which has 4 tokens"),
        ("-5", "position '-5' does not exist in example 1"),
        ("last5", "position 'last5' does not exist in example 1"),
        ("nam", r"the task names no span 'nam' \(it names: name\)"),
    ],
)
def test_a_position_that_does_not_exist_names_the_example(position, message, network):
    inputs = replace(tiny_inputs((6, 4), spans=RAGGED), texts=["long", "short"])
    with pytest.raises(PositionError, match=message):
        network.read(inputs, [Site(layer=0, component="block_output", position=position)])


def test_replaced_spans_are_looked_up_afresh(network):
    (site,) = sites("layer0.block_input@name")
    inputs = tiny_inputs(spans={"name": torch.tensor([[0, 1], [0, 1]])})
    first = network.read(inputs, [site])[site]
    moved = replace(inputs, spans={"name": torch.tensor([[1, 2], [1, 2]])})
    assert not torch.equal(network.read(moved, [site])[site], first)


@pytest.mark.parametrize(
    ("model_type", "site"),
    [("opt", "module:model.decoder.layers.0.fc1.output@last"), ("gpt2", "module:transformer.wpe.output@last")],
)
def test_a_position_in_an_activation_without_tokens_is_refused(model_type, site):
    inputs = tiny_inputs()
    if model_type == "gpt2":
        inputs = replace(inputs, arguments={"input_ids": inputs.arguments["input_ids"]})
    with pytest.raises(ValueError, match=r"the activation there has shape \((12, 20|1, 6, 16)\)"):
        HookedNetwork(tiny_model(model_type)).read(inputs, sites(site))


def test_a_position_among_answer_rows_is_refused(network):
    with pytest.raises(PositionError, match="has 1 tokens, fewer than the inputs"):
        network.read(tiny_inputs(answer=True), sites("module:lm_head.output@first"))


def test_terms_that_name_one_token_twice_are_refused(network):
    inputs = replace(tiny_inputs((6, 4)), texts=["long", "short"])
    with pytest.raises(PositionError, match=r"'first3' and 'last2' name the same token of example 1 \('short'\)"):
        network.read(inputs, sites("layer0.block_output@first3+last2"))
    assert network.read(inputs, sites("layer0.block_output@first2+last2"))


def test_ragged_spans_say_which_tokens_an_example_has():
    inputs = tiny_inputs(spans={"name": torch.tensor([[1, 2], [2, 5]])})
    present = inputs.present(Site(layer=0, component="block_output", position="name+0"))
    assert present.tolist() == [[True, False, False, True], [True, True, True, True]]


@pytest.mark.parametrize("site", ["module:encoder.block.0.output@last", "module:decoder.block.0.output@last"])
def test_positions_that_two_texts_could_have_are_refused(site: str) -> None:
    """Padding is known of the encoder's text, and a decoder's may have as many tokens."""
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=20, num_layers=1, num_heads=4)
    network, place = HookedNetwork(T5ForConditionalGeneration(config).eval()), Site.parse(site)
    texts = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])}
    both = ModelInputs(arguments={**texts, "decoder_input_ids": torch.ones(2, 5).long()}, answer=torch.tensor([4, 4]))
    with pytest.raises(PositionError, match="the encoder's and the decoder's texts both have 5 tokens"):
        network.read(both, [place])
    if "encoder" in site:
        shorter = {**texts, "decoder_input_ids": torch.ones(2, 2).long()}
        found = network.read(ModelInputs(arguments=shorter, answer=torch.tensor([1, 1])), [place])[place]
        assert found.shape == (2, 1, 16)
