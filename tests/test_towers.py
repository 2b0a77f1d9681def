"""Models that read images or sound: rows of one tower, of two, and of an encoder before a decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import itrain
from itrain.architectures import ARCHITECTURES, blocks, has, heads_of, locate
from itrain.inputs import ModelInputs, PositionError, TextsAndImages, TwoTexts
from itrain.models import BaseModel, load_pretrained
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.sites import Site
from tests.models import HEADS, HIDDEN, LAYERS, hook_count, sites

NEURONS, WORDS, CLASSES = 20, 40, 3
TOWER = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": NEURONS}
IMAGE = TOWER | {"image_size": 8, "patch_size": 2, "num_channels": 3, "num_labels": CLASSES, "initializer_range": 0.3}
SOUND = TOWER | {
    **{"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_labels": CLASSES},
}
VISION = IMAGE | {"hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": LAYERS + 1}
PAIR = {
    "text_config": TOWER | {"vocab_size": WORDS, "max_position_embeddings": 16, "eos_token_id": 2},
    "vision_config": VISION,
    "projection_dim": 8,
    "num_labels": CLASSES,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": TOWER
    | {"patch_size": 2, "frequency_stride": 2, "time_stride": 2, "max_length": 8, "num_mel_bins": 4},
    "beit": IMAGE | {"layer_scale_init_value": 0.5, "use_relative_position_bias": True},
    "clip": PAIR,
    "clip_vision_model": IMAGE,
    "deit": IMAGE,
    "dinov2": IMAGE | {"mlp_ratio": 2},
    "dinov2_with_registers": IMAGE | {"mlp_ratio": 2, "use_swiglu_ffn": True},
    "dinov3_vit": IMAGE,
    "hubert": SOUND,
    "siglip": PAIR,
    "siglip_vision_model": IMAGE,
    "vit": IMAGE,
    "wav2vec2": SOUND,
    "whisper": {
        **{"d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS + 1, "vocab_size": WORDS},
        **{"encoder_attention_heads": HEADS, "decoder_attention_heads": 2, "num_mel_bins": 4, "init_std": 0.3},
        **{"encoder_ffn_dim": NEURONS, "decoder_ffn_dim": NEURONS, "max_source_positions": 6},
        **{"max_target_positions": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        **{"decoder_start_token_id": 1, "begin_suppress_tokens": None, "suppress_tokens": None},
    },
}
TYPES = [name for name in CONFIGS if name in CONFIG_MAPPING_NAMES]
HEAD = {
    **dict.fromkeys(("vit", "deit", "beit", "dinov2", "dinov2_with_registers"), "AutoModelForImageClassification"),
    **dict.fromkeys(("wav2vec2", "hubert"), "AutoModelForCTC"),
    "audio-spectrogram-transformer": "AutoModelForAudioClassification",
    "whisper": "AutoModelForSpeechSeq2Seq",
}


def tower(model_type: str, *, head: str | None = None, attention: str | None = None, **settings: Any) -> Any:
    """A two-layer model in eval mode, with the head that such models are mostly given."""
    auto: Any = getattr(transformers, head or HEAD.get(model_type, "AutoModel"))
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type] | settings)
    return auto.from_config(config, attn_implementation=attention).eval()


def arguments(model_type: str, seed: int = 0) -> dict[str, Tensor]:
    """Two examples."""
    draw = torch.Generator().manual_seed(seed)
    shape = {"hubert": (2, 40), "wav2vec2": (2, 40), "whisper": (2, 4, 12), "audio-spectrogram-transformer": (2, 8, 4)}
    media = torch.randn(shape.get(model_type, (2, 3, 8, 8)), generator=draw)
    given = {ARCHITECTURES[model_type].media or "": media}
    text = torch.randint(3, WORDS, (2, 5), generator=draw)
    if model_type == "whisper":
        return given | {"decoder_input_ids": text}
    return given | ({"input_ids": text} if model_type in ("clip", "siglip") else {})


def inputs_for(model_type: str, seed: int = 0) -> ModelInputs:
    given = arguments(model_type, seed)
    kind = TwoTexts if model_type == "whisper" else TextsAndImages if len(given) > 1 else ModelInputs
    return kind(arguments=given)


def stacks(model_type: str) -> list[str]:
    return [f"{stack}." for stack in ARCHITECTURES[model_type].stacks] or [""]


def answer_of(output: Tensor) -> Tensor:
    return output.flatten()


@pytest.fixture(scope="module")
def network_of() -> Any:
    built: dict[str, HookedNetwork] = {}

    def network_of(model_type: str) -> HookedNetwork:
        if model_type not in built:
            built[model_type] = HookedNetwork(tower(model_type))
        return built[model_type]

    return network_of


def hidden_states(model: nn.Module, given: dict[str, Tensor], stack: str) -> tuple[Tensor, ...]:
    output: Any = model(**given, output_hidden_states=True)
    if stack in ("encoder.", "decoder."):
        return getattr(output, f"{stack[:-1]}_hidden_states")
    return (getattr(output, f"{stack[:-1]}_model_output") if stack else output).hidden_states


def test_every_row_of_images_and_sound_is_tried() -> None:
    assert sorted(CONFIGS) == sorted(name for name, row in ARCHITECTURES.items() if row.media is not None)
    assert set(TYPES) >= {"vit", "clip", "whisper"}


@pytest.mark.parametrize("model_type", TYPES)
def test_blocks_equal_the_hidden_states_of_transformers(model_type: str, network_of: Any) -> None:
    network, inputs = network_of(model_type), inputs_for(model_type)
    for stack in stacks(model_type):
        hidden, count = hidden_states(network.model, arguments(model_type), stack), len(blocks(network.model, stack[:-1] or None))
        assert count in (LAYERS, LAYERS + 1)
        for layer in range(count):
            ends = [Site(layer=layer, component=f"{stack}block_{end}") for end in ("input", "output")]
            found = network.read(inputs, ends)
            assert torch.equal(found[ends[0]], hidden[layer]), ends[0]
            # transformers counts a last norm in with some models' last state.
            if layer < count - 1:
                assert torch.equal(found[ends[1]], hidden[layer + 1]), ends[1]


@pytest.mark.parametrize("model_type", TYPES)
def test_every_component_reads_and_edits_at_each_place(model_type: str, network_of: Any) -> None:
    network, inputs = network_of(model_type), inputs_for(model_type)
    before, hooks = network(inputs), hook_count(network.model)
    assert bool(before.isfinite().all())
    for component in ARCHITECTURES[model_type].components:
        site = Site(layer=0, component=component, position="all")
        found = network.read(inputs, [site, site.at("2")])
        assert found[site].shape[2] == network.hidden_size(site) and found[site].shape[1] > 4, site
        assert torch.equal(found[site.at("2")][:, 0], found[site][:, 2])
        assert torch.equal(network.edit(inputs, [(site, lambda base: base)]), before), site
        torch.manual_seed(0)
        noise = network.edit(inputs, [(site, lambda base: base + 10 * torch.randn_like(base))])
        assert (noise - before).abs().max() > 1e-5, site
        if not component.endswith(("query_output", "key_output")):  # whose one place may count for little
            (at, untouched) = (site.at("2"), network.read(inputs, [site])[site])
            moved = network.read(inputs, [site], [(at, lambda base: base + 1)])[site]
            assert torch.equal(moved[:, :2], untouched[:, :2]) and not torch.equal(moved[:, 2], untouched[:, 2]), site
    assert hook_count(network.model) == hooks


@pytest.mark.parametrize("model_type", TYPES)
def test_sublayers_add_up(model_type: str, network_of: Any) -> None:
    """With both sublayers' outputs at zero a block hands on its input, or its norms of it."""
    network, inputs = network_of(model_type), inputs_for(model_type)
    for stack in stacks(model_type):
        if stack == "decoder.":
            continue
        layer = [Site(layer=0, component=f"{stack}{name}") for name in ("attention_output", "mlp_output")]
        ends = [Site(layer=0, component=f"{stack}block_{end}") for end in ("input", "output")]
        found = network.read(inputs, ends, [(site, torch.zeros_like) for site in layer])
        expected = found[ends[0]]
        if model_type in ("wav2vec2", "hubert"):
            block: Any = blocks(network.model)[0]
            expected = block.final_layer_norm(block.layer_norm(expected))
        torch.testing.assert_close(found[ends[1]], expected)
        whole = network.read(inputs, [*layer, *ends])
        sizes = {network.hidden_size(each) for each in (*layer, *ends)}
        assert sizes == {whole[ends[0]].shape[-1]}


@pytest.mark.parametrize("model_type", TYPES)
def test_heads_lie_side_by_side_and_act_on_their_own_output(model_type: str, network_of: Any) -> None:
    network, inputs = network_of(model_type), inputs_for(model_type)
    for stack in stacks(model_type):
        count = 2 if stack in ("vision.", "decoder.") else HEADS
        for form in ("query_output", "key_output", "value_output", "attention_value_output"):
            whole = Site(layer=0, component=f"{stack}{form}", position="all")
            heads = [Site(layer=0, component=f"{stack}{form}", position="all", head=head) for head in range(count)]
            assert heads_of(network.model, whole) == count
            found = network.read(inputs, [whole, *heads])
            assert torch.equal(torch.cat([found[head] for head in heads], -1), found[whole])
            with pytest.raises(ValueError, match=f"head {count} does not exist"):
                locate(network.model, Site(layer=0, component=f"{stack}{form}", head=count))
        value, output = (Site(layer=0, component=f"{stack}{name}value_output", position="all", head=1) for name in ("", "attention_"))
        every = Site(layer=0, component=f"{stack}attention_value_output", position="all")
        plain = network.read(inputs, [every])[every]
        moved = (network.read(inputs, [every], [(value, torch.zeros_like)])[every] - plain).unflatten(2, (count, -1))
        assert (moved.abs().amax((0, 1, 3)) > 1e-6).tolist() == [head == 1 for head in range(count)]
        assert network.read(inputs, [output])[output].shape[-1] == plain.shape[-1] // count


@pytest.mark.parametrize("model_type", ["vit", "clip", "whisper", "beit"])
def test_attention_weights_are_those_of_transformers(model_type: str) -> None:
    network, inputs = HookedNetwork(tower(model_type, attention="eager")), inputs_for(model_type)
    output: Any = network.model(**arguments(model_type), output_attentions=True)
    for stack in stacks(model_type):
        site = Site(layer=1, component=f"{stack}attention_weights", position="all")
        if stack in ("encoder.", "decoder."):
            weights = getattr(output, f"{stack[:-1]}_attentions")[1]
        else:
            weights = (getattr(output, f"{stack[:-1]}_model_output") if stack else output).attentions[1]
        assert torch.equal(network.read(inputs, [site])[site], weights.transpose(1, 2).flatten(2)), site
    with pytest.raises(ValueError, match="sdpa attention computes no weights"):
        locate(tower(model_type, attention="sdpa"), site)
