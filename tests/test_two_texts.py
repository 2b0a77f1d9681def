"""Models of an encoder and a decoder: sites name the stack, and positions count the tokens of its text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import itrain
from itrain.architectures import ARCHITECTURES, blocks, locate
from itrain.inputs import PositionError, TwoTexts, with_decoder
from itrain.interventions.das import DAS
from itrain.models import load_pretrained
from itrain.networks.attached import AttachedEdits
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.networks.replay.eligible import obstacle
from itrain.sites import Site
from itrain.training.interchange import Interchange
from scripts.tiny_models import ROWS, row_model
from tests.models import HEADS, HIDDEN, LAYERS, VOCABULARY, hook_count, pairs, sites, tiny_inputs, tiny_model

TYPES = [name for name in ROWS if ARCHITECTURES[name].stacks]
ENCODED, DECODED = (6, 4, 5), (3, 4, 2)


def both(encoded: tuple[int, ...] = ENCODED, decoded: tuple[int, ...] = DECODED, **settings: Any) -> TwoTexts:
    """Texts of other lengths; the decoder's last token answers."""
    decoder = tiny_inputs(decoded, answer=True, seed=7, **settings)
    return TwoTexts.of(tiny_inputs(encoded, **settings), decoder)


def every(model: nn.Module, model_type: str, layer: int = 0) -> list[Site]:
    return [Site(layer=layer, component=name, position="all") for name in ARCHITECTURES[model_type].components]


@pytest.mark.parametrize("model_type", TYPES)
def test_blocks_equal_the_hidden_states_of_transformers(model_type: str, network_of: Any) -> None:
    network, inputs = network_of(model_type), both((6, 6), (4, 4))
    output = network.model(**inputs.arguments, output_hidden_states=True, use_cache=False)
    for stack, count in (("encoder", LAYERS), ("decoder", LAYERS + 1)):
        hidden = getattr(output, f"{stack}_hidden_states")
        assert len(blocks(network.model, stack)) == count
        for layer in range(count - 1):
            ends = [Site(layer=layer, component=f"{stack}.block_{end}") for end in ("input", "output")]
            found = network.read(inputs, ends)
            assert torch.equal(found[ends[0]], hidden[layer]) and torch.equal(found[ends[1]], hidden[layer + 1])
    assert len(blocks(network.model)) == 2 * LAYERS + 1


@pytest.mark.parametrize("model_type", TYPES)
def test_every_component_reads_and_edits(model_type: str, network_of: Any) -> None:
    network, inputs = network_of(model_type), both((6, 6), (4, 4))
    before, hooks = network(inputs), hook_count(network.model)  # transformers leaves some of its own
    assert before.shape == (2, VOCABULARY)
    for site in every(network.model, model_type):
        crossing = site.component.endswith(("cross_key_output", "cross_value_output"))
        length = 6 if site.stack == "encoder" or crossing else 4
        found = network.read(inputs, [site])[site]
        assert found.shape == (2, length, network.hidden_size(site)), site
        assert torch.equal(network.edit(inputs, [(site, lambda base: base)]), before), site
        torch.manual_seed(0)
        noise = network.edit(inputs, [(site, lambda base: base + 10 * torch.randn_like(base))])
        assert (noise - before).abs().max() > 1e-4, site
    assert hook_count(network.model) == hooks


@pytest.mark.parametrize("model_type", TYPES)
def test_heads_lie_side_by_side(model_type: str, network_of: Any) -> None:
    network, inputs = network_of(model_type), both((6, 6), (4, 4))
    for site in every(network.model, model_type):
        if ARCHITECTURES[model_type].components[site.component].heads is None:
            continue
        count = getattr(network.model.config, f"{site.stack}_attention_heads", HEADS)
        heads = [Site(layer=0, component=site.component, position="all", head=head) for head in range(count)]
        found = network.read(inputs, [site, *heads])
        assert torch.equal(torch.cat([found[head] for head in heads], -1), found[site])
        with pytest.raises(ValueError, match=f"head {count} does not exist"):
            locate(network.model, Site(layer=0, component=site.component, head=count))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_padded_batch_equals_each_pair_alone(model_type: str, left: bool, network_of: Any) -> None:
    network, whole = network_of(model_type), both(left=left)
    places = sites(
        "encoder.layer0.block_output@-2", "decoder.layer1.block_output@last", "decoder.layer0.cross_value_output@last"
    )
    vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3))
    edits = [(places[0], lambda base: base + vector), (places[1], lambda base: base * 2)]
    together, read = network.edit(whole, edits), network.read(whole, places)
    assert not torch.allclose(together, network(whole), atol=1e-3)
    for row in range(3):
        alone = whole.take(torch.tensor([row]))
        assert (alone.encoder.length, alone.decoder.length) == (ENCODED[row], DECODED[row])
        torch.testing.assert_close(network.edit(alone, edits)[0], together[row], atol=1e-5, rtol=1e-4)
        for place, found in network.read(alone, places).items():
            torch.testing.assert_close(found[0], read[place][row], atol=1e-5, rtol=1e-4)


def test_sites_without_a_position_hold_no_padding(network_of: Any) -> None:
    network = network_of("t5")
    (site,) = sites("decoder.layer0.block_output")
    inputs = both((6, 6), (2, 1))
    inputs.answer = torch.tensor([[0, 1], [0, 0]])  # as many answers as the decoder's text has tokens
    found = network.read(inputs, [site])[site]
    assert torch.equal(found[1, 0], found[1, 1]), "what an example lacks repeats its first token"


def test_an_encoders_tokens_reach_the_answer_through_the_crossing_attention_alone(network_of: Any) -> None:
    network, inputs = network_of("bart"), both((6, 6), (4, 4))
    crossing = [
        (site, torch.zeros_like) for site in sites(*(f"decoder.layer{n}.cross_attention_output" for n in range(3)))
    ]
    (last,) = sites("encoder.layer1.block_output")
    noise = [(last, lambda base: base + torch.randn_like(base))]
    assert torch.equal(network.edit(inputs, [*crossing, *noise]), network.edit(inputs, crossing))
    assert not torch.allclose(network.edit(inputs, noise), network(inputs), atol=1e-3)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_decoder_is_causal_and_the_encoder_is_not(model_type: str, network_of: Any) -> None:
    network, inputs = network_of(model_type), both((6, 6), (5, 5))
    inputs.answer = torch.arange(5).expand(2, -1)
    plain = network(inputs)
    for place, unchanged in (("decoder.layer0.block_input@3", 3), ("encoder.layer0.block_input@3", 0)):
        (site,) = sites(place)
        moved = (network.edit(inputs, [(site, torch.zeros_like)]) - plain).abs().amax((0, 2))
        assert (moved[:unchanged] < 1e-6).all() and (moved[unchanged:] > 1e-4).all()


def test_gradients_flow_to_edits_of_both_stacks(network_of: Any) -> None:
    network, inputs = network_of("t5"), both()
    shift = torch.zeros(2, HIDDEN, requires_grad=True)
    places = sites("encoder.layer0.block_output@first", "decoder.layer0.block_output@last")
    edits = [(site, lambda base, row=row: base + shift[row]) for row, site in enumerate(places)]
    network.edit(inputs, edits).square().sum().backward()
    assert shift.grad is not None and (shift.grad.norm(dim=1) > 0).all()


def test_members_share_a_run(network_of: Any) -> None:
    network, inputs = network_of("t5"), both()
    members = [[(site, torch.neg)] for site in sites("encoder.layer0.block_output@2", "decoder.layer1.mlp_output@-2")]
    for found, edits in zip(network.edit_each(inputs, members), members, strict=True):
        torch.testing.assert_close(found, network.edit(inputs, edits), atol=1e-5, rtol=1e-4)


def test_they_are_not_replayed_and_the_reason_is_told() -> None:
    model, inputs = row_model("t5"), both()
    network, (site,) = make_network(model, replay="auto"), sites("encoder.layer0.block_output@last")
    assert not isinstance(network, ReplayNetwork) and "several stacks" in (obstacle(model) or "")
    with pytest.raises(ValueError, match="replay would not be exact: the model has several stacks"):
        make_network(model, replay="on")
    assert torch.equal(
        network.edit(inputs, [(site, torch.neg)]), HookedNetwork(model).edit(inputs, [(site, torch.neg)])
    )


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("layer0.block_output", "t5 has several stacks of blocks; write 'encoder.layer0.block_output' or 'decoder."),
        ("encoder.layer2.block_output", "layer 2 does not exist: t5 has layers 0-1"),
        ("encoder.layer0.cross_attention_output", "has no component 'encoder.cross_attention_output'; did you mean"),
    ],
)
def test_sites_that_a_model_of_two_stacks_lacks_are_refused(site: str, message: str, network_of: Any) -> None:
    with pytest.raises(ValueError, match=message):
        locate(network_of("t5").model, Site.parse(site))


def test_stacks_are_no_part_of_other_models_sites() -> None:
    with pytest.raises(ValueError, match=r"llama has no component 'encoder.block_output'; did you mean 'block_output'"):
        locate(tiny_model("llama"), Site.parse("encoder.layer0.block_output"))


def test_modules_of_either_text_are_told_by_their_length(network_of: Any) -> None:
    network, (module, named) = (
        network_of("t5"),
        sites("module:decoder.block.0.output@last", "decoder.layer0.block_output@last"),
    )
    inputs = both()
    found = network.read(inputs, [module, named])
    assert torch.equal(found[module], found[named])
    with pytest.raises(PositionError, match="texts both have 4 tokens here"):
        network.read(both((4, 3), (4, 2)), [module])


def test_inputs_without_a_decoders_text_are_refused() -> None:
    with pytest.raises(ValueError, match="the decoder's text is missing; give decoder_input_ids"):
        TwoTexts(arguments=tiny_inputs().arguments)


def test_keys_tell_pairs_apart_whatever_their_padding() -> None:
    whole = both()
    assert len(whole.keys.unique()) == 3
    assert torch.equal(both(left=True).keys, whole.keys)
    assert torch.equal(torch.cat([whole.take(torch.tensor([row])).keys for row in range(3)]), whole.keys)
    other = TwoTexts.of(whole.encoder, tiny_inputs(DECODED, answer=True, seed=8))
    assert not (other.keys == whole.keys).any()


def test_one_off_runs_take_both_texts(tmp_path: Any) -> None:
    """From the files, with the right head; a prompt alone is answered by the first token of the decoder."""
    made: Any = row_model("t5")
    made.save_pretrained(tmp_path)
    model = load_pretrained(str(tmp_path))
    assert type(model.model) is type(made)
    inputs = both((6, 6), (4, 4))
    given = {name: inputs.arguments[name] for name in ("input_ids", "decoder_input_ids")}
    run = model.run(given, "encoder.layer0.block_output@last", itrain.Zero)
    site = Site.parse("encoder.layer0.block_output@last")
    expected = HookedNetwork(made).edit(inputs, [(site, torch.zeros_like)])
    torch.testing.assert_close(run.logits, expected)
    assert run.read("decoder.layer2.cross_attention_output@last").shape == (2, 1, HIDDEN)
    alone = model.run({"input_ids": given["input_ids"]}).logits
    start = torch.zeros(2, 1, dtype=torch.long)
    torch.testing.assert_close(alone, made(input_ids=given["input_ids"], decoder_input_ids=start).logits[:, 0])


def test_prompts_alone_are_answered_by_the_decoders_first_token(network_of: Any) -> None:
    """As every task of text has them; responses are no part of the encoder's text."""
    network, prompts = network_of("t5"), tiny_inputs((6, 4), answer=True)
    (site,) = sites("encoder.layer1.block_output@last")
    started = with_decoder(prompts, 0)
    for edits in ([], [(site, torch.neg)]):
        assert torch.equal(network.edit(prompts, edits), network.edit(started, edits))
    batch = pairs(prompts, tiny_inputs((6, 4), answer=True, seed=1))
    part = Interchange(network, sites=[site], intervention=DAS)
    answer = part(batch, part.trained)
    answer.square().sum().backward()
    (weight,) = [each for each in part.parameters() if each.requires_grad]
    assert answer.shape == (2, VOCABULARY) and weight.grad is not None and bool(weight.grad.any())
    with pytest.raises(ValueError, match="responses are no part of an encoder's text"):
        network(replace(prompts, stop=torch.tensor([6, 4]), answer=torch.zeros(2, 1, dtype=torch.long)))


def test_attached_edits_count_the_tokens_of_each_text(network_of: Any) -> None:
    network, inputs = network_of("bart"), both()
    site = Site.parse("decoder.layer0.block_output@last")
    with AttachedEdits(network.model, [(site, torch.neg)]):
        logits = network.model(**inputs.arguments).logits
    rows = torch.arange(3)
    expected = network.edit(inputs, [(site, torch.neg)])
    assert inputs.answer is not None
    torch.testing.assert_close(logits[rows, inputs.answer], expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="generates with a decoder of its own"):
        network.generate(inputs, [(site, torch.neg)], max_new_tokens=2)
