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
from itrain.architectures import ARCHITECTURES, blocks, heads_of, locate
from itrain.inputs import ModelInputs, PositionError, TextsAndImages, TwoTexts
from itrain.models import BaseModel, load_pretrained
from itrain.models.skeleton import skeleton
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.networks.replay.eligible import obstacle
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
    "text_config": TOWER
    | {"vocab_size": WORDS, "max_position_embeddings": 16, "eos_token_id": 2, "projection_size": 12},
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
    "deit": IMAGE | {"architectures": ["DeiTForImageClassification"]},
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


QUICK = ["vit", "dinov2", "clip", "whisper", "wav2vec2"]
"""Rows that differ most from one another; the others' are slow."""
TRIED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TYPES]


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


@pytest.mark.parametrize("model_type", TRIED)
def test_blocks_equal_the_hidden_states_of_transformers(model_type: str, network_of: Any) -> None:
    network, inputs = network_of(model_type), inputs_for(model_type)
    for stack in stacks(model_type):
        hidden, count = (
            hidden_states(network.model, arguments(model_type), stack),
            len(blocks(network.model, stack[:-1] or None)),
        )
        assert count in (LAYERS, LAYERS + 1)
        for layer in range(count):
            ends = [Site(layer=layer, component=f"{stack}block_{end}") for end in ("input", "output")]
            found = network.read(inputs, ends)
            assert torch.equal(found[ends[0]], hidden[layer]), ends[0]
            # transformers counts a last norm in with some models' last state.
            if layer < count - 1:
                assert torch.equal(found[ends[1]], hidden[layer + 1]), ends[1]


@pytest.mark.parametrize("model_type", TRIED)
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


@pytest.mark.parametrize("model_type", TRIED)
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


@pytest.mark.parametrize("model_type", TRIED)
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
        value, output = (
            Site(layer=0, component=f"{stack}{name}value_output", position="all", head=1) for name in ("", "attention_")
        )
        every = Site(layer=0, component=f"{stack}attention_value_output", position="all")
        plain = network.read(inputs, [every])[every]
        moved = (network.read(inputs, [every], [(value, torch.zeros_like)])[every] - plain).unflatten(2, (count, -1))
        assert (moved.abs().amax((0, 1, 3)) > 1e-6).tolist() == [head == 1 for head in range(count)]
        assert network.read(inputs, [output])[output].shape[-1] == plain.shape[-1] // count


@pytest.mark.parametrize("model_type", ["vit", "clip", "whisper", pytest.param("beit", marks=pytest.mark.slow)])
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
        locate(
            tower(model_type, attention="sdpa"), Site(layer=1, component=f"{stacks(model_type)[0]}attention_weights")
        )


@pytest.mark.parametrize(
    "model_type",
    ["vit", "whisper", pytest.param("wav2vec2", marks=pytest.mark.slow), pytest.param("deit", marks=pytest.mark.slow)],
)
def test_they_are_loaded_with_the_head_that_was_saved(model_type: str, tmp_path: Any) -> None:
    made = tower(model_type)
    made.save_pretrained(tmp_path)
    model = load_pretrained(str(tmp_path))
    assert type(model.model) is type(made) and model.tokenizer is None
    assert type(skeleton(str(tmp_path))) is type(made)
    given = arguments(model_type)
    stack = stacks(model_type)[0]
    site = Site.parse(f"{stack}layer1.block_output@2")
    read = model.read(given, site)[site]
    assert torch.equal(read, HookedNetwork(made).read(inputs_for(model_type), [site])[site])
    edited = model.run(given, site, itrain.Zero).read(site)
    assert not edited.any() and bool(read.any())


@pytest.mark.parametrize("model_type", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_a_classifier_of_images_has_the_one_tower(model_type: str, tmp_path: Any) -> None:
    made = tower(model_type, head="AutoModelForImageClassification")
    made.save_pretrained(tmp_path / "one")
    model = load_pretrained(str(tmp_path / "one"))
    assert type(model.model) is type(made) and len(blocks(model.model)) == LAYERS + 1
    pixels = {"pixel_values": arguments(model_type)["pixel_values"]}
    site = Site.parse("vision.layer2.block_output@all")
    assert model.read(pixels, site)[site].shape == (2, 16 + (model_type == "clip"), 12)
    assert model.run(pixels, site, itrain.Zero).logits.shape == (2, CLASSES)
    with pytest.raises(ValueError, match="ForImageClassification has no text stack"):
        locate(model.model, Site.parse("text.layer0.block_output"))
    tower(model_type).save_pretrained(tmp_path / "two")
    assert set(stacks(model_type)) == {"text.", "vision."}
    assert len(blocks(load_pretrained(str(tmp_path / "two")).model)) == 2 * LAYERS + 1


def test_positions_count_tokens_in_one_tower_and_patches_in_the_other() -> None:
    """Also where a text is padded to as many tokens as there are patches."""
    given = arguments("clip")
    text, image = sites("text.layer0.block_output@last", "vision.layer0.block_output@last")
    padded = torch.zeros(2, 17, dtype=torch.long)
    padded[:, :5] = given["input_ids"]
    mask = (torch.arange(17) < 5).long().expand(2, 17)
    wide: Any = tower("clip", text_config=PAIR["text_config"] | {"max_position_embeddings": 17})
    network = HookedNetwork(wide)
    inputs = TextsAndImages(
        arguments={"pixel_values": given["pixel_values"], "input_ids": padded, "attention_mask": mask}
    )
    found = network.read(inputs, [text, image, text.at("all"), image.at("all")])
    assert torch.equal(found[text][:, 0], found[text.at("all")][:, 4]) and found[text.at("all")].shape[1] == 5
    assert torch.equal(found[image][:, 0], found[image.at("all")][:, 16])
    alone = inputs.take(torch.tensor([1]))
    assert alone.arguments["input_ids"].shape == (1, 5) and alone.arguments["pixel_values"].shape == (1, 3, 8, 8)
    torch.testing.assert_close(network.read(alone, [text])[text][0], found[text][1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network.read(alone, [image])[image][0], found[image][1])
    assert torch.equal(alone.keys, inputs.keys[1:]) and len(inputs.keys.unique()) == 2


def test_each_tower_reaches_the_likeness_of_texts_and_images(network_of: Any) -> None:
    network, inputs = network_of("clip"), inputs_for("clip")
    before = network(inputs)
    assert before.shape == (2, 2)
    for place, towards in (("text.layer1.block_output@all", 0), ("vision.layer2.block_output@all", 1)):
        (site,) = sites(place)
        shift = torch.randn(1, network.hidden_size(site), generator=torch.Generator().manual_seed(0))
        one = torch.tensor([[[1.0]], [[0.0]]])
        moved = (network.edit(inputs, [(site, lambda base: base + shift * one)]) - before).abs()  # noqa: B023
        row, other = (moved[:, 0], moved[:, 1]) if towards == 0 else (moved[0], moved[1])
        assert (row > 1e-5).all() and not other.any(), "a text is a column, an image a row"


def test_members_do_not_share_a_run_that_compares_its_examples(network_of: Any) -> None:
    network, inputs = network_of("clip"), inputs_for("clip")
    members = [[(site, torch.neg)] for site in sites("text.layer0.block_output@2", "vision.layer0.block_output@2")]
    with pytest.raises(ValueError, match="compares each image of a run with all its texts"):
        network.edit_each(inputs, members)
    network = network_of("vit")
    members = [[(site, torch.neg)] for site in sites("layer0.block_output@2", "layer1.mlp_output@0")]
    inputs = inputs_for("vit")
    for found, edits in zip(network.edit_each(inputs, members), members, strict=True):
        torch.testing.assert_close(found, network.edit(inputs, edits), atol=1e-5, rtol=1e-4)


def test_texts_and_images_of_different_numbers_are_refused() -> None:
    given = arguments("clip")
    with pytest.raises(ValueError, match="give as many of one as of the other: there are 1 of input_ids, 2 of pixel"):
        TextsAndImages(arguments=given | {"input_ids": given["input_ids"][:1]})
    with pytest.raises(ValueError, match="texts and images are needed, and there are input_ids alone"):
        TextsAndImages(arguments={"input_ids": given["input_ids"]})


def test_an_encoder_of_sound_and_its_decoder_have_positions_of_their_own(network_of: Any) -> None:
    network, sound = network_of("whisper"), arguments("whisper")
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = TwoTexts(arguments=sound | {"decoder_attention_mask": mask})
    text, frame = sites("decoder.layer0.block_output@last", "encoder.layer0.block_output@last")
    found = network.read(inputs, [text, frame, text.at("2"), frame.at("5")])
    assert torch.equal(found[text][0], found[text.at("2")][0]), "padding is no token"
    assert torch.equal(found[frame], found[frame.at("5")])
    model = BaseModel(model=network.model)
    assert model.run(sound).logits.shape == (2, WORDS)


def test_they_run_under_hooks_and_the_reason_is_told() -> None:
    for model_type, reason in (("vit", "pixel_values"), ("clip", "several stacks"), ("whisper", "several stacks")):
        model, inputs = tower(model_type).requires_grad_(False), inputs_for(model_type)
        stack = stacks(model_type)[-1]
        (site,) = sites(f"{stack}layer0.block_output@2")
        network = make_network(model, replay="auto")
        told = network.prepare([[site]], [inputs]) if isinstance(network, ReplayNetwork) else obstacle(model)
        assert reason in (told or ""), told
        edits = [(site, torch.neg)]
        assert torch.equal(network.edit(inputs, edits), HookedNetwork(model).edit(inputs, edits))


def test_frames_of_padded_sound_are_refused(network_of: Any) -> None:
    """Which frames are padding is the model's own count, so that the last one could be."""
    network, given = network_of("wav2vec2"), arguments("wav2vec2")
    (site,) = sites("layer0.block_output@last")
    mask = torch.ones(2, 40, dtype=torch.long)
    assert network.read(ModelInputs(arguments=given | {"attention_mask": mask}), [site])[site].shape == (2, 1, HIDDEN)
    mask = mask.clone()
    mask[0, 20:] = 0
    with pytest.raises(PositionError, match=r"the attention_mask hides padding .* take inputs of equal length"):
        network.read(ModelInputs(arguments=given | {"attention_mask": mask}), [site])
