"""Rows of decoders whose every token has an MLP of its own: paths from the block."""

from __future__ import annotations

from collections.abc import Mapping

from itrain.architectures.parts import (
    Architecture,
    Component,
    block,
    fused,
    grouped,
    interleaved,
    mlp,
    separate,
    side_by_side,
)
from itrain.layouts import OneRow

QKV = separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA_BLOCK = block("self_attn", QKV, "self_attn.o_proj")
LLAMA = LLAMA_BLOCK | mlp("mlp", "mlp.down_proj")
# Some of the models have a mixture beside the MLP, and blocks that take their keys and values from an earlier one.
_GEMMA4 = LLAMA | {
    "router_output": Component("router.proj", "output", layout=OneRow()),
    "expert_output": Component("experts", "output", layout=OneRow()),
}
_PHI = block("self_attn", QKV, "self_attn.dense") | mlp("mlp", "mlp.fc2")
_PHI3_QKV = fused("self_attn.qkv_proj", side_by_side)
_PHI3 = block("self_attn", _PHI3_QKV, "self_attn.o_proj") | mlp("mlp", "mlp.down_proj")
_FALCON_QKV = fused("self_attention.query_key_value", grouped)
_FALCON = block("self_attention", _FALCON_QKV, "self_attention.dense") | mlp("mlp", "mlp.dense_4h_to_h")
# OPT's MLP sees the tokens of all examples in one row.
_OPT = block("self_attn", QKV, "self_attn.out_proj") | {
    "mlp_input": Component("fc1", "input", layout=OneRow()),
    "mlp_activation": Component("fc2", "input", layout=OneRow()),
    "mlp_output": Component("fc2", "output", layout=OneRow()),
}
_STARCODER2 = LLAMA_BLOCK | mlp("mlp", "mlp.c_proj")
_BIGCODE = block("attn", fused("attn.c_attn", grouped), "attn.c_proj") | mlp("mlp", "mlp.c_proj")
_GPT2 = block("attn", fused("attn.c_attn", side_by_side), "attn.c_proj") | mlp("mlp", "mlp.c_proj")
_GPT_NEO_QKV = separate("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")
_GPT_NEO = block("attn", _GPT_NEO_QKV, "attn.attention.out_proj") | mlp("mlp", "mlp.c_proj")
_GPTJ_QKV = separate("attn.q_proj", "attn.k_proj", "attn.v_proj")
_GPTJ = block("attn", _GPTJ_QKV, "attn.out_proj") | mlp("mlp", "mlp.fc_out")
_NEOX_QKV = fused("attention.query_key_value", interleaved)
_NEOX = block("attention", _NEOX_QKV, "attention.dense") | mlp("mlp", "mlp.dense_4h_to_h")
_BLOOM_QKV = fused("self_attention.query_key_value", interleaved)
_BLOOM = block("self_attention", _BLOOM_QKV, "self_attention.dense") | mlp("mlp", "mlp.dense_4h_to_h")

DECODERS: Mapping[str, Architecture] = {
    "apertus": Architecture(blocks="layers", components=LLAMA),
    "arcee": Architecture(blocks="layers", components=LLAMA),
    "bloom": Architecture(blocks="h", components=_BLOOM),
    "cohere": Architecture(blocks="layers", components=LLAMA),
    "cohere2": Architecture(blocks="layers", components=LLAMA),
    "ernie4_5": Architecture(blocks="layers", components=LLAMA),
    "exaone4": Architecture(blocks="layers", components=LLAMA),
    "falcon": Architecture(blocks="h", components=_FALCON),
    "gemma": Architecture(blocks="layers", components=LLAMA),
    "gemma2": Architecture(blocks="layers", components=LLAMA),
    "gemma3": Architecture(blocks="language_model.layers", components=LLAMA),
    "gemma3_text": Architecture(blocks="layers", components=LLAMA),
    "gemma4": Architecture(blocks="language_model.layers", components=_GEMMA4),
    "gemma4_text": Architecture(blocks="layers", components=_GEMMA4),
    "glm": Architecture(blocks="layers", components=LLAMA),
    "glm4": Architecture(blocks="layers", components=LLAMA),
    "gpt2": Architecture(blocks="h", components=_GPT2),
    "gpt_bigcode": Architecture(blocks="h", components=_BIGCODE),
    "gpt_neo": Architecture(blocks="h", components=_GPT_NEO),
    "gpt_neox": Architecture(blocks="layers", components=_NEOX),
    "gptj": Architecture(blocks="h", components=_GPTJ),
    "granite": Architecture(blocks="layers", components=LLAMA),
    "helium": Architecture(blocks="layers", components=LLAMA),
    "hunyuan_v1_dense": Architecture(blocks="layers", components=LLAMA),
    "llama": Architecture(blocks="layers", components=LLAMA),
    "ministral": Architecture(blocks="layers", components=LLAMA),
    "ministral3": Architecture(blocks="layers", components=LLAMA),
    "mistral": Architecture(blocks="layers", components=LLAMA),
    "nemotron": Architecture(blocks="layers", components=LLAMA),
    "olmo": Architecture(blocks="layers", components=LLAMA),
    "olmo2": Architecture(blocks="layers", components=LLAMA),
    "olmo3": Architecture(blocks="layers", components=LLAMA),
    "opt": Architecture(blocks="decoder.layers", components=_OPT),
    "phi": Architecture(blocks="layers", components=_PHI),
    "phi3": Architecture(blocks="layers", components=_PHI3),
    "qwen2": Architecture(blocks="layers", components=LLAMA),
    "qwen3": Architecture(blocks="layers", components=LLAMA),
    "seed_oss": Architecture(blocks="layers", components=LLAMA),
    "smollm3": Architecture(blocks="layers", components=LLAMA),
    "stablelm": Architecture(blocks="layers", components=LLAMA),
    "starcoder2": Architecture(blocks="layers", components=_STARCODER2),
}
