"""The contract of the rows that have no test of their own for each component: names mean what they mean in all others.

tests/test_architectures.py has the first rows, and tests/test_two_texts.py those of several stacks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from itrain.architectures import ARCHITECTURES, blocks, has, locate
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import EditAt
from itrain.networks.replay import ReplayNetwork
from itrain.sites import Site
from scripts.tiny_models import INSIDE, LATER, MORE, ROWS, row_model
from tests.models import ALL_TYPES, HEADS, HIDDEN, KEY_VALUE_HEADS, LAYERS, VOCABULARY, tiny_inputs
from tests.replaying import PADDINGS, answer_and_gradients, distance, examples, replayed
from tests.test_generation import LENGTHS, NEW, edits, slowly

TYPES = [name for name in ROWS if not ARCHITECTURES[name].stacks]
CAUSAL = [name for name in TYPES if ARCHITECTURES[name].causal]
QUICK = ["deepseek_v3", "gemma4_text", "gpt_oss", "llama4_text", "mamba2", "qwen3_next", "qwen3_moe"]
"""Rows that differ most from one another; the others' heavier tests are slow."""
FORMS = ("query_output", "key_output", "value_output", "attention_value_output")


def quickly(names: list[str]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def places(model: nn.Module, component: str, position: str | None = "all") -> list[Site]:
    """The component in each of the blocks that have it."""
    every = [Site(layer=layer, component=component, position=position) for layer in range(LAYERS)]
    return [site for site in every if has(model, site)]


def test_every_row_is_tried() -> None:
    texts = [name for name, row in ARCHITECTURES.items() if row.media is None]
    assert sorted(texts) == sorted({*ALL_TYPES, *LATER})


@pytest.mark.parametrize("model_type", TYPES)
def test_blocks_equal_the_hidden_states_of_transformers(model_type: str, network_of: Any) -> None:
    network, inputs = network_of(model_type), tiny_inputs()
    ends = [Site(layer=layer, component=f"block_{end}") for layer in range(LAYERS) for end in ("input", "output")]
    found = list(network.read(inputs, ends).values())
    hidden = network.model(**inputs.arguments, output_hidden_states=True, use_cache=False).hidden_states
    # Mamba's begin with the first block's output, the others' with its input.
    start = int("mamba" in model_type)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[start:2], hidden, strict=False))
    assert torch.equal(found[2], found[1])


@pytest.mark.parametrize("model_type", TYPES)
def test_the_last_blocks_output_is_all_that_the_answer_depends_on(model_type: str, network_of: Any) -> None:
    network, base, source = network_of(model_type), tiny_inputs(seed=0), tiny_inputs(seed=1)
    site = Site(layer=LAYERS - 1, component="block_output")
    value = network.read(source, [site])[site]
    torch.testing.assert_close(network.edit(base, [(site, lambda _: value)]), network(source), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_component_reads_and_edits(model_type: str, network_of: Any) -> None:
    network, inputs = network_of(model_type), tiny_inputs()
    before = network(inputs)
    assert before.shape == (2, 6, VOCABULARY) and bool(before.isfinite().all())
    for component in ARCHITECTURES[model_type].components:
        found = places(network.model, component)
        # Of Gemma 4 some have a mixture of experts; it has a test of its own.
        assert found or (model_type.startswith("gemma4") and component in ("router_output", "expert_output")), component
        for site in found[:1]:
            assert network.read(inputs, [site])[site].shape == (2, 6, network.hidden_size(site)), site
            torch.testing.assert_close(network.edit(inputs, [(site, lambda base: base)]), before, atol=1e-5, rtol=1e-5)
            torch.manual_seed(0)
            noise = network.edit(inputs, [(site, lambda base: base + 3 * torch.randn_like(base))])
            assert (noise - before).abs().max() > 1e-3, site


@pytest.mark.parametrize("model_type", TYPES)
def test_heads_act_on_their_own_outputs(model_type: str, network_of: Any) -> None:
    """Without its query a head gives another output, and without a key or value the heads of the group do."""
    network, inputs = network_of(model_type), tiny_inputs()
    components = ARCHITECTURES[model_type].components
    for component in FORMS:
        if component not in components:
            continue
        (whole, *_) = places(network.model, component)
        layer = whole.layer
        outputs = [
            Site(layer=layer, component="attention_value_output", position="last", head=head) for head in range(HEADS)
        ]
        before, heads = network.read(inputs, [whole, *outputs]), []
        while has(network.model, site := Site(layer=layer, component=component, position="all", head=len(heads))):
            heads.append(site)
        assert len(heads) in ((HEADS,) if component in FORMS[::3] else (1, KEY_VALUE_HEADS, HEADS))
        read = network.read(inputs, heads)
        assert torch.equal(torch.cat([read[site] for site in heads], -1), before[whole])
        if component == "attention_value_output" or model_type in ("olmo3", "olmoe"):
            continue  # whose norms of queries and keys are of all heads together
        for head, site in enumerate(heads):
            after = network.read(inputs, outputs, [(site, torch.zeros_like)])
            changed = [number for number, each in enumerate(outputs) if not torch.equal(after[each], before[each])]
            group = HEADS // len(heads)
            assert changed == list(range(head * group, (head + 1) * group)), site


PLAIN = [
    name
    for name in TYPES
    # A norm follows the sublayers, or they are scaled.
    if name not in ("camembert", "deberta-v2", "distilbert", "electra", "exaone4", "glm4", "olmo3", "xlm-roberta")
    and not name.startswith(("gemma4", "granite"))
]


@pytest.mark.parametrize("model_type", PLAIN)
def test_sublayers_add_up_to_the_block(model_type: str, network_of: Any) -> None:
    network = network_of(model_type)
    for layer in range(LAYERS):
        names = ["block_input", "block_output", "attention_output", "mixer_output", "mlp_output"]
        every = [Site(layer=layer, component=name) for name in names]
        start, end, *parts = network.read(tiny_inputs(), [site for site in every if has(network.model, site)]).values()
        torch.testing.assert_close(start + sum(parts), end, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", [name for name in TYPES if "router_output" in ARCHITECTURES[name].components])
def test_routers_are_read_before_and_edited_before_their_choice(model_type: str, network_of: Any) -> None:
    """The logits are those of the router's weight, and an expert that none has to choose is chosen by none."""
    mixed = HookedNetwork(row_model(model_type, **MORE[model_type])) if model_type in MORE else None
    network, inputs = mixed or network_of(model_type), tiny_inputs()
    (router, *_) = places(network.model, "router_output")
    location, seen = locate(network.model, router), []
    handle = location.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    read = network.read(inputs, [router])[router]
    handle.remove()
    module: Any = location.module
    expected = linear(seen[0], module.weight, getattr(module, "bias", None)).view(2, 6, -1)
    torch.testing.assert_close(read, expected)
    assert read.shape[-1] == network.hidden_size(router)
    outputs = [Site(layer=router.layer, component=name) for name in ("expert_output", "mlp_output")]
    (output, *_) = [site for site in outputs if has(network.model, site)]
    chosen = [network.read(inputs, [output], [(router, partial(preferring, expert))])[output] for expert in range(2)]
    assert not torch.allclose(chosen[0], chosen[1], atol=1e-3), "each expert gives something else"


def preferring(expert: int, logits: Tensor) -> Tensor:
    new = torch.zeros_like(logits)
    new[..., expert] = 5.0
    return new


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_experts_and_the_shared_one_add_up_to_the_mixture(model_type: str, network_of: Any) -> None:
    names = ["expert_output", "shared_expert_output", "mlp_output"]
    routed, shared, whole = (
        network_of(model_type).read(
            tiny_inputs((6, 4)), [Site(layer=1, component=name, position="first3") for name in names]
        )
    ).values()
    torch.testing.assert_close(routed + shared, whole)


def test_fused_projections_are_taken_apart_as_the_models_do(network_of: Any) -> None:
    """By hand, from what the projections put out."""
    inputs = tiny_inputs()

    def seen(network: HookedNetwork, path: str, layer: int, *names: str) -> tuple[Tensor, list[Tensor]]:
        found: list[Tensor] = []
        module = blocks(network.model)[layer].get_submodule(path)
        handle = module.register_forward_hook(lambda module, args, output: found.append(output.detach()))
        parts = network.read(inputs, [Site(layer=layer, component=name) for name in names])
        handle.remove()
        return found[0], list(parts.values())

    whole, (gate, conv) = seen(network_of("mamba2"), "mixer.in_proj", 0, "mixer_gate", "conv_input")
    mixer: Any = blocks(network_of("mamba2").model)[0].mixer
    parts = whole.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], -1)
    assert torch.equal(gate, parts[0]) and torch.equal(conv, parts[1])
    whole, (conv, gate) = seen(network_of("mamba"), "mixer.in_proj", 0, "conv_input", "mixer_gate")
    assert torch.equal(torch.cat([conv, gate], -1), whole)
    network = network_of("qwen3_next")
    whole, (gate,) = seen(network, "linear_attn.in_proj_qkvz", 0, "mixer_gate")
    net: Any = blocks(network.model)[0].linear_attn
    *_, expected, _, _ = net.fix_query_key_value_ordering(whole, whole.new_zeros(2, 6, 2 * net.num_v_heads))
    assert torch.equal(gate, expected.flatten(2))
    whole, (query, gate) = seen(network, "self_attn.q_proj", 1, "query_output", "attention_gate")
    halves = whole.view(2, 6, HEADS, -1).chunk(2, -1)
    assert torch.equal(query, halves[0].flatten(2)) and torch.equal(gate, halves[1].flatten(2))


@pytest.mark.parametrize(
    "settings",
    [
        {"new_decoder_architecture": False, "multi_query": True},
        {"new_decoder_architecture": False, "multi_query": False, "alibi": True, "num_kv_heads": HEADS},
        {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": False},
    ],
)
def test_falcons_other_layouts(settings: dict[str, Any]) -> None:
    network = HookedNetwork(row_model("falcon", **settings))
    test_heads_act_on_their_own_outputs("falcon", lambda _: network)
    test_sublayers_add_up_to_the_block("falcon", lambda _: network)


@pytest.mark.parametrize("model_type", TYPES)
def test_padding_on_either_side_changes_nothing(model_type: str, network_of: Any) -> None:
    """Also of mixtures: a token's experts do not depend on the tokens beside it."""
    network, site = network_of(model_type), Site(layer=0, component="block_output", position="-2")
    for left in (False, True):
        padded = tiny_inputs((6, 4, 3), left=left, answer=True)
        together = [network(padded), network.edit(padded, [(site, lambda base: base * 2)])]
        for example in range(3):
            alone = padded.take(torch.tensor([example]))
            apart = [network(alone), network.edit(alone, [(site, lambda base: base * 2)])]
            for one, other in zip(together, apart, strict=True):
                assert distance([one[example]], [other[0]]) < 1e-5


@pytest.mark.parametrize("model_type", TYPES)
def test_causal_rows_are_causal_and_the_others_are_not(model_type: str, network_of: Any) -> None:
    network, site = network_of(model_type), Site(layer=0, component="block_input", position="3")
    moved = (network.edit(tiny_inputs(), [(site, torch.zeros_like)]) - network(tiny_inputs())).abs().sum((0, 2))
    assert (moved[3:] > 1e-4).all()
    assert bool((moved[:3] < 1e-4).all()) == ARCHITECTURES[model_type].causal


@pytest.mark.parametrize("model_type", quickly(CAUSAL))
def test_generation_equals_running_the_growing_text_again(model_type: str, network_of: Any) -> None:
    network = network_of(model_type)
    acts = edits("layer0.block_output@first2+last2", "layer1.block_output@last")
    for left in (False, True):
        inputs = tiny_inputs(LENGTHS, left=left)
        found = network.generate(inputs, acts, max_new_tokens=NEW)
        assert torch.equal(found, slowly(network, inputs, acts, NEW))
    assert not torch.equal(found, network.generate(inputs, [], max_new_tokens=NEW)), "the edits change nothing"


def precise(model: nn.Module) -> nn.Module:
    """In double precision, so that no difference is one of rounding; torch groups experts in others alone."""
    experts = ("router_output", "expert_output")
    mixed = any(has(model, Site(layer=layer, component=name)) for layer in range(LAYERS) for name in experts)
    return model if mixed else model.double()


EDITED = {
    "last token": ["layer0.block_output@last"],
    "ragged": ["layer0.block_output@word"],
    "last block": ["layer1.block_output@last"],
    "first block": ["layer0.mlp_output@2"],
}


@pytest.mark.parametrize("edited", EDITED)
@pytest.mark.parametrize("model_type", quickly(CAUSAL))
def test_replay_equals_hooks(model_type: str, edited: str) -> None:
    """At the level that the row allows: tokens before the first edited one are skipped but for a state's sake."""
    row, sites = ARCHITECTURES[model_type], EDITED[edited]
    if "mlp_output" not in row.components:
        sites = [site.replace("mlp_output", "mixer_output") for site in sites]
    level = "suffix" if not row.recurrent else "stop" if edited == "first block" else "prefix"
    for padding in PADDINGS:
        network = make_network(precise(row_model(model_type)), replay="on")
        assert isinstance(network, ReplayNetwork)
        base, source = examples(padding), examples(padding, seed=1)
        expected = answer_and_gradients(network.hooked, sites, base, source)
        for _ in range(3):
            assert distance(answer_and_gradients(network, sites, base, source), expected) < 1e-5
        assert replayed(network, sites, level) or level == "stop"


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next"])
def test_a_state_is_named_as_the_reason_why_no_more_is_skipped(model_type: str) -> None:
    network = make_network(row_model(model_type))
    assert "blocks hand on a state" in network.prepare([[Site.parse("layer0.block_output@last")]], [examples()])


WINDOWED = {
    "cohere2": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {"attention_chunk_size": 3, "layer_types": ["chunked_attention", "full_attention"]},
    "ministral": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("model_type", [name for name in WINDOWED if name in ROWS])
def test_windows_and_chunks_are_kept(model_type: str, network_of: Any) -> None:
    sites = ["layer0.attention_output@2"]
    for padding in PADDINGS:
        base, source = examples(padding), examples(padding, seed=1)
        wide = answer_and_gradients(network_of(model_type), sites, base, source)
        network = make_network(precise(row_model(model_type, **WINDOWED[model_type])), replay="on")
        assert isinstance(network, ReplayNetwork)
        expected = answer_and_gradients(network.hooked, sites, base, source)
        assert distance(wide, expected) > 1e-3, "the window cuts something off"
        for _ in range(3):
            assert distance(answer_and_gradients(network, sites, base, source), expected) < 1e-5
        assert replayed(network, sites, "suffix")


def test_blocks_that_share_keys_and_values_are_not_replayed() -> None:
    """Gemma 4's later blocks may take them from an earlier one."""
    model = row_model("gemma4_text", num_kv_shared_layers=1, layer_types=["full_attention", "full_attention"])
    assert isinstance(make_network(model), HookedNetwork)
    with pytest.raises(ValueError, match="some blocks take their keys and values from an earlier one"):
        make_network(model, replay="on")
    with pytest.raises(ValueError, match="layer 1 has no key_output; layers 0 have it"):
        locate(model, Site(layer=1, component="key_output"))


def test_a_block_without_a_component_is_refused_with_those_that_have_it(network_of: Any) -> None:
    model = network_of("qwen3_next").model
    for site, having in (("layer0.query_output", 1), ("layer1.mixer_gate@last", 0), ("layer0.attention_weights", 1)):
        layer = 1 - having
        with pytest.raises(ValueError, match=f"layer {layer} has no .*; layers? {having} ha"):
            locate(model, Site.parse(site))


def test_edits_of_a_router_act_on_generated_tokens(network_of: Any) -> None:
    """Its tokens lie in one row, of all examples."""
    network, inputs = network_of("qwen3_moe"), tiny_inputs((5, 5))
    edit = EditAt(Site.parse("layer0.router_output@last"), lambda base: base.flip(-1) * 3, "all")
    found = network.generate(inputs, [edit], max_new_tokens=4)
    for row in range(2):
        assert torch.equal(network.generate(inputs.take(torch.tensor([row])), [edit], max_new_tokens=4)[0], found[row])
    assert not torch.equal(network.generate(inputs, [], max_new_tokens=4), found)


def test_attention_with_sinks_has_no_weights_of_the_tokens_alone(network_of: Any) -> None:
    with pytest.raises(ValueError, match="gpt_oss has no component 'attention_weights'"):
        locate(network_of("gpt_oss").model, Site(layer=0, component="attention_weights"))


@pytest.mark.parametrize("model_type", quickly([name for name in TYPES if ARCHITECTURES[name].weights]))
def test_attention_weights_are_those_of_transformers(model_type: str) -> None:
    if "attention_input" not in ARCHITECTURES[model_type].components:
        return
    model: Any = row_model(model_type, attention="eager")
    network, inputs = HookedNetwork(model), tiny_inputs(answer=True)
    (site, *_) = places(model, "attention_weights", None)
    found = network.read(inputs, [site])[site]
    weights = [each for each in model(**inputs.arguments, output_attentions=True).attentions if each is not None]
    assert torch.equal(found, weights[0 if len(weights) < LAYERS else site.layer or 0].transpose(1, 2).flatten(2))
    head = Site(layer=site.layer, component="attention_weights", position="last", head=2)
    assert not torch.allclose(network.edit(inputs, [(head, torch.zeros_like)]), network(inputs))


@pytest.mark.parametrize("model_type", sorted(INSIDE))
def test_the_text_of_a_model_of_images_has_the_texts_sites(model_type: str) -> None:
    if model_type not in ROWS:
        return
    assert ARCHITECTURES[model_type].components == ARCHITECTURES[INSIDE[model_type]].components
    assert HookedNetwork(row_model(model_type)).hidden_size(Site(layer=0, component="block_output")) == HIDDEN
