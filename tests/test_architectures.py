"""The table against transformers: every component of every row is where its name says, and can be read and edited."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from itrain.architectures import ARCHITECTURES, architecture, blocks, locate, unwrap
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from tests.models import (
    ALL_TYPES,
    CAUSAL_TYPES,
    HEADS,
    HIDDEN,
    KEY_VALUE_HEADS,
    LAYERS,
    NEURONS,
    VOCABULARY,
    tiny_inputs,
    tiny_model,
)

COMPONENTS = [(name, component) for name in ALL_TYPES for component in ARCHITECTURES[name].components]
GROUPED_TYPES = sorted(set(ALL_TYPES) - {"bert", "bloom", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "roberta"})
NORMED_TYPES = {"bert", "roberta", "gemma2", "gemma3", "gemma3_text", "olmo2"}
"""Here a norm follows the sublayers."""
FUSED_TYPES = ["gpt2", "gpt_neox", "bloom", "phi3"]


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def network_of():
    built: dict[str, HookedNetwork] = {}

    def network_of(model_type: str) -> HookedNetwork:
        if model_type not in built:
            built[model_type] = HookedNetwork(tiny_model(model_type))
        return built[model_type]

    return network_of


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_blocks_equal_the_hidden_states_of_transformers(model_type, network_of):
    network, inputs = network_of(model_type), tiny_inputs()
    sites = [Site(layer=layer, component=f"block_{end}") for layer in range(LAYERS) for end in ("input", "output")]
    found = network.read(inputs, sites)
    hidden = network.model(**inputs.arguments, output_hidden_states=True).hidden_states
    for layer in range(LAYERS):
        assert torch.equal(found[Site(layer=layer, component="block_input")], hidden[layer])
    # The last hidden state has passed the final norm, so the last block's output is compared through the next module.
    for layer in range(LAYERS - 1):
        assert torch.equal(found[Site(layer=layer, component="block_output")], hidden[layer + 1])
    assert not ARCHITECTURES[model_type].causal or not torch.equal(hidden[-1], hidden[-2])


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_the_last_blocks_output_is_all_that_the_answer_depends_on(model_type, network_of):
    network, base, source = network_of(model_type), tiny_inputs(seed=0), tiny_inputs(seed=1)
    site = Site(layer=LAYERS - 1, component="block_output")
    value = network.read(source, [site])[site]
    assert close(network.edit(base, [(site, lambda _: value)]), network(source))


@pytest.mark.parametrize(("model_type", "component"), COMPONENTS)
def test_component_reads_and_edits(model_type, component, network_of):
    network, inputs = network_of(model_type), tiny_inputs()
    site = Site(layer=0, component=component, position="all")
    found = network.read(inputs, [site])[site]
    assert found.shape == (2, 6, network.hidden_size(site))
    before = network(inputs)
    assert before.shape == (2, 6, VOCABULARY)
    assert torch.allclose(network.edit(inputs, [(site, lambda base: base)]), before, atol=1e-6)
    assert not torch.allclose(
        network.edit(inputs, [(site, lambda base: base + torch.randn_like(base))]), before, atol=1e-3
    )


@pytest.mark.parametrize(("model_type", "component"), COMPONENTS)
def test_component_has_the_size_of_the_configuration(model_type, component, network_of):
    network = network_of(model_type)
    config = network.model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or HIDDEN // HEADS
    key_value_heads = KEY_VALUE_HEADS if model_type in GROUPED_TYPES else HEADS
    expected = {
        "query_output": HEADS * head_size,
        "attention_value_output": HEADS * head_size,
        "key_output": key_value_heads * head_size,
        "value_output": key_value_heads * head_size,
        "mlp_activation": 4 * HIDDEN if model_type == "bloom" else NEURONS,
        "router_output": getattr(config, "num_local_experts", None),
    }.get(component, HIDDEN)
    assert network.hidden_size(Site(layer=1, component=component)) == expected


@pytest.mark.parametrize("model_type", sorted(set(ALL_TYPES) - NORMED_TYPES))
def test_sublayers_add_up_to_the_block(model_type, network_of):
    """attention_output and mlp_output are what joins the residual stream, where no norm stands between."""
    names = ["block_input", "attention_output", "mlp_output", "block_output"]
    found = network_of(model_type).read(tiny_inputs(), [Site(layer=0, component=name) for name in names])
    start, attention, mlp, end = found.values()
    assert torch.allclose(start + attention + mlp, end, atol=1e-5)


def projections(model_type: str, model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """Query, key and value per head, (B, S, heads, size), as the attention of transformers splits them."""
    attention = {"gpt2": "attn.c_attn", "gpt_neox": "attention.query_key_value", "phi3": "self_attn.qkv_proj"}
    fused = blocks(model)[0].get_submodule(attention.get(model_type, "self_attention.query_key_value"))(hidden)
    size = HIDDEN // HEADS
    if model_type == "gpt2":
        parts = [part.unflatten(-1, (HEADS, size)) for part in fused.chunk(3, -1)]
    elif model_type == "phi3":
        parts = [part.unflatten(-1, (-1, size)) for part in fused.split([16, 8, 8], -1)]
    else:
        parts = list(fused.unflatten(-1, (HEADS, 3, size)).unbind(-2))
    return dict(zip(("query_output", "key_output", "value_output"), parts, strict=True))


@pytest.mark.parametrize("model_type", FUSED_TYPES)
def test_fused_projections_are_taken_apart_as_the_model_does(model_type, network_of):
    network, inputs = network_of(model_type), tiny_inputs()
    entry = Site(layer=0, component="attention_input")
    expected = projections(model_type, network.model, network.read(inputs, [entry])[entry])
    for component, per_head in expected.items():
        whole = Site(layer=0, component=component)
        heads = [Site(layer=0, component=component, head=head) for head in range(per_head.shape[2])]
        found = network.read(inputs, [whole, *heads])
        assert close(found[whole], per_head.flatten(-2))
        for head, site in enumerate(heads):
            assert close(found[site], per_head[:, :, head])


@pytest.mark.parametrize("component", ["query_output", "key_output", "value_output", "attention_value_output"])
@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_heads_lie_side_by_side_and_edit_only_themselves(model_type, component, network_of):
    network, inputs = network_of(model_type), tiny_inputs()
    grouped = model_type in GROUPED_TYPES and component in {"key_output", "value_output"}
    heads = [
        Site(layer=0, component=component, position="all", head=head)
        for head in range(KEY_VALUE_HEADS if grouped else HEADS)
    ]
    whole = Site(layer=0, component=component, position="all")
    found = network.read(inputs, [whole, *heads])
    assert torch.equal(torch.cat([found[site] for site in heads], -1), found[whole])
    assert all(network.hidden_size(site) == found[site].shape[-1] for site in heads)
    with pytest.raises(ValueError, match=rf"head {len(heads)} does not exist.*heads 0-{len(heads) - 1}"):
        locate(network.model, Site(layer=0, component=component, head=len(heads)))

    seen: list[Tensor] = []
    edits = [(heads[1], torch.zeros_like), (whole, lambda base: seen.append(base) or base)]
    changed = network.edit(inputs, edits)
    zeroed = torch.cat([torch.zeros_like(found[s]) if s == heads[1] else found[s] for s in heads], -1)
    assert torch.equal(seen[0], zeroed)
    assert not torch.allclose(changed, network(inputs), atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "qwen3"])
def test_a_grouped_value_head_feeds_exactly_its_query_heads(model_type, network_of):
    """At the first token attention has one place to look, so each head's output is its group's value there."""
    value = [Site(layer=0, component="value_output", position="0", head=head) for head in range(KEY_VALUE_HEADS)]
    output = [Site(layer=0, component="attention_value_output", position="0", head=head) for head in range(HEADS)]
    found = network_of(model_type).read(tiny_inputs(), [*value, *output])
    for head, site in enumerate(output):
        assert close(found[site], found[value[head * KEY_VALUE_HEADS // HEADS]])


@pytest.mark.parametrize("head", ["none", "classes"])
@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_sites_do_not_depend_on_the_models_head(model_type, head):
    network, inputs = HookedNetwork(tiny_model(model_type, head=head)), tiny_inputs()
    assert len(blocks(network.model)) == LAYERS
    sites = [Site(layer=1, component=component, position="all") for component in ARCHITECTURES[model_type].components]
    assert list(network.read(inputs, sites)) == sites
    edited = network.edit(inputs, [(sites[0], torch.zeros_like)])
    assert edited.shape == {"none": (2, 6, HIDDEN), "classes": (2, 2)}[head]
    assert not torch.allclose(edited, network(inputs))


# PEFT still asks transformers under the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("model_type", "target"), [("gpt2", "c_attn"), ("llama", "v_proj"), ("gpt_neox", "query_key_value")]
)
def test_models_wrapped_by_peft(model_type, target):
    config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False, fan_in_fan_out=target == "c_attn")
    network, inputs = HookedNetwork(get_peft_model(tiny_model(model_type), config)), tiny_inputs()
    site = Site(layer=0, component="value_output", head=1, position="last")
    assert network.hidden_size(site) == HIDDEN // HEADS
    assert type(unwrap(network.model)) is type(tiny_model(model_type))
    plain = HookedNetwork(tiny_model(model_type))
    assert not close(network.read(inputs, [site])[site], plain.read(inputs, [site])[site]), "the adapter is part of it"
    assert not torch.allclose(network.edit(inputs, [(site, torch.zeros_like)]), network(inputs), atol=1e-4)


def test_wrappers_are_seen_through():
    model = tiny_model("llama")
    assert unwrap(torch.compile(model, backend="eager")) is model
    assert unwrap(nn.DataParallel(model)) is model
    own = nn.Module()
    own.module = nn.Linear(2, 2)
    assert unwrap(own) is own, "a submodule that happens to be called module wraps nothing"
    assert architecture(torch.compile(model, backend="eager")) is ARCHITECTURES["llama"]


def test_a_subclass_of_a_known_model_has_its_sites():
    model = tiny_model("gpt2")
    model.__class__ = type("MyGPT2", (type(model),), {})
    site = Site(layer=1, component="mlp_activation")
    assert locate(model, site).hidden_size == NEURONS


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "gpt_neox", "gemma3"])
def test_bfloat16_models_read_and_edit_in_float32(model_type):
    network, inputs = HookedNetwork(tiny_model(model_type).bfloat16()), tiny_inputs()
    for component in ARCHITECTURES[model_type].components:
        site = Site(layer=0, component=component, position="last")
        assert network.read(inputs, [site])[site].dtype == torch.float32
        assert network.edit(inputs, [(site, lambda base: base.float() + 1)]).dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_causal_rows_are_causal_and_the_others_are_not(model_type, network_of):
    network = network_of(model_type)
    site = Site(layer=0, component="block_input", position="3")
    difference = (network.edit(tiny_inputs(), [(site, torch.zeros_like)]) - network(tiny_inputs())).abs().sum((0, 2))
    assert torch.equal(difference[:3], torch.zeros(3))
    assert (difference[3:] > 1e-4).all()


@pytest.mark.parametrize("model_type", sorted(set(ALL_TYPES) - set(CAUSAL_TYPES)))
def test_bidirectional_rows_look_ahead(model_type, network_of):
    network = network_of(model_type)
    site = Site(layer=0, component="block_input", position="3")
    difference = (network.edit(tiny_inputs(), [(site, torch.zeros_like)]) - network(tiny_inputs())).abs().sum((0, 2))
    assert (difference > 1e-4).all()


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("layer2.block_output", "layer 2 does not exist: gpt2 has layers 0-1"),
        (
            "layer0.block_ouput",
            r"gpt2 has no component 'block_ouput'; did you mean 'block_output'\? It has block_input,",
        ),
        ("layer0.mlp_output.head0", "mlp_output has no heads; these have: query_output, key_output"),
        ("layer0.query_output.head4", "head 4 does not exist: query_output of gpt2 has heads 0-3"),
        (
            "module:transformer.h.0.mpl.output",
            "has no module 'transformer.h.0.mpl'; did you mean 'transformer.h.0.mlp'",
        ),
        ("module:transformer.h.0.output.head1", "a module named by its path has no heads"),
    ],
)
def test_errors_name_the_fault_and_the_nearest_right_thing(site, message, network_of):
    with pytest.raises(ValueError, match=message) as caught:
        locate(network_of("gpt2").model, Site.parse(site))
    assert site in str(caught.value)


def test_a_component_that_a_row_lacks_is_refused(network_of):
    with pytest.raises(ValueError, match="mixtral has no component 'mlp_activation'"):
        locate(network_of("mixtral").model, Site(layer=0, component="mlp_activation"))


def test_models_that_the_table_lacks_are_told_the_remedy():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    with pytest.raises(ValueError, match=r"Sequential .*no config with a model_type.*module:<path>\.output"):
        blocks(model)
    model.config = type("Config", (), {"model_type": "ours"})()
    with pytest.raises(ValueError, match="model_type 'ours' is not in the table"):
        locate(model, Site(layer=0, component="block_output"))
    assert architecture(model) is None


@pytest.mark.parametrize(
    ("module", "end", "size"),
    [
        (nn.Linear(3, 5), "input", 3),
        (nn.Linear(3, 5), "output", 5),
        (nn.LayerNorm(4), "output", 4),
        (nn.Embedding(7, 4), "output", 4),
        (nn.GRUCell(3, 6), "output", 6),
        (nn.GRUCell(3, 6), "input", 3),
        (nn.ReLU(), "output", None),
        (nn.Conv2d(3, 5, 2), "output", 5),
        (nn.Conv2d(3, 5, 2), "input", 3),
        (nn.BatchNorm2d(4), "output", 4),
        (nn.MaxPool2d(2), "output", None),
    ],
)
def test_modules_tell_their_size_or_nothing(module, end, size):
    location = locate(nn.ModuleDict({"part": module}), Site(component=f"module:part.{end}"))
    assert location.module is module
    assert location.hidden_size == size
