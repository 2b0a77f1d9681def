"""Rows of models that read images or sound: one tower, one each for texts and images, or an encoder before a decoder.

Positions at their sites count patches, the class token and others before them included, or frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from itrain.architectures.parts import Architecture, block, mlp, separate
from itrain.architectures.two_stacks import TWO_STACKS, of_stack

# The first of the alternatives is the name in transformers' newer releases.
_VIT_QKV = separate(
    "attention.q_proj|attention.attention.query",
    "attention.k_proj|attention.attention.key",
    "attention.v_proj|attention.attention.value",
)
_VIT_ATTENTION = block("attention", _VIT_QKV, "attention.o_proj|attention.output.dense")
_VIT = Architecture(
    blocks="layers|encoder.layer",
    causal=False,
    media="pixel_values",
    components=_VIT_ATTENTION | mlp("mlp|intermediate", "mlp.fc2|output.dense"),
)
_DINOV2 = replace(
    _VIT, blocks="encoder.layer", components=_VIT_ATTENTION | mlp("mlp", "mlp.fc2|mlp.weights_out|mlp.down_proj")
)
_DINOV3 = replace(_VIT, blocks="layer|model.layer", components=_VIT_ATTENTION | mlp("mlp", "mlp.down_proj"))

_CLIP_QKV = separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_CLIP_BLOCK = block("self_attn", _CLIP_QKV, "self_attn.out_proj") | mlp("mlp", "mlp.fc2")
_CLIP = Architecture(
    causal=False,
    media="pixel_values",
    stacks={"text": "text_model.encoder.layers", "vision": "vision_model.encoder.layers"},
    components={**of_stack("text", _CLIP_BLOCK), **of_stack("vision", _CLIP_BLOCK)},
)
_CLIP_VISION = replace(_VIT, blocks="encoder.layers", components=_CLIP_BLOCK)

_WAV2VEC2_QKV = separate("attention.q_proj", "attention.k_proj", "attention.v_proj")
_WAV2VEC2 = Architecture(
    blocks="encoder.layers",
    causal=False,
    media="input_values",
    components=block("attention", _WAV2VEC2_QKV, "attention.out_proj")
    | mlp("feed_forward", "feed_forward.output_dense"),
)

TOWERS: Mapping[str, Architecture] = {
    "audio-spectrogram-transformer": replace(_VIT, media="input_values"),
    "beit": _VIT,
    "clip": _CLIP,
    "clip_vision_model": _CLIP_VISION,
    "deit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": _DINOV3,
    "hubert": _WAV2VEC2,
    "siglip": _CLIP,
    "siglip_vision_model": _CLIP_VISION,
    "vit": _VIT,
    "wav2vec2": _WAV2VEC2,
    "whisper": replace(TWO_STACKS["bart"], media="input_features"),
}
