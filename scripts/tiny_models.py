"""A tiny model with random weights for each row of the table of architectures: for tests and for the table in docs/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from itrain.architectures import ARCHITECTURES
from itrain.models.skeleton import auto_class

VOCABULARY, HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, NEURONS = 40, 16, 2, 4, 2, 20
"""Sizes that no two meanings share, where the model type leaves the choice."""

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Larger than the usual 0.02, under which so small a model hardly depends on its inputs.
    "initializer_range": 0.3,
}
GROUPED = {"intermediate_size": NEURONS, "num_key_value_heads": KEY_VALUE_HEADS}
WIDE_HEADS = GROUPED | {"head_dim": 6}

EXPERTS = 3
MIXED = GROUPED | {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LOCAL = GROUPED | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
LATENT = {
    **{"intermediate_size": NEURONS, "moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": HEADS},
    **{
        "n_shared_experts": 1,
        "q_lora_rank": 9,
        "kv_lora_rank": 7,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 6,
    },
}
DELTA_NET = WIDE_HEADS | {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 3, "linear_value_head_dim": 5},
    **{"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
}
DELTA_MIXED = DELTA_NET | {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
DELTA_MIXED |= {"shared_expert_intermediate_size": 10}
MAMBA = {"state_size": 5, "intermediate_size": 32, "conv_kernel": 3, "time_step_rank": 3}
PER_LAYER = WIDE_HEADS | {"hidden_size_per_layer_input": 3, "vocab_size_per_layer_input": 40, "num_kv_shared_layers": 0}
SEVERAL = {"d_model": HIDDEN, "decoder_start_token_id": 0}
T5 = SEVERAL | {"d_kv": 6, "d_ff": NEURONS, "num_layers": LAYERS, "num_decoder_layers": LAYERS + 1, "num_heads": HEADS}
BART = SEVERAL | {
    **{"encoder_layers": LAYERS, "decoder_layers": LAYERS + 1, "encoder_ffn_dim": NEURONS, "decoder_ffn_dim": NEURONS},
    **{"encoder_attention_heads": HEADS, "decoder_attention_heads": 2, "init_std": 0.3, "forced_eos_token_id": None},
}

FIRST: Mapping[str, Mapping[str, Any]] = {
    "bert": {"intermediate_size": NEURONS},
    "bloom": {},
    "gemma": WIDE_HEADS,
    "gemma2": WIDE_HEADS,
    "gemma3_text": WIDE_HEADS,
    "gpt2": {"n_inner": NEURONS},
    "gpt_neo": {"intermediate_size": NEURONS, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {"intermediate_size": NEURONS},
    "gptj": {"n_inner": NEURONS, "rotary_dim": 4},
    "llama": GROUPED,
    "mistral": WIDE_HEADS,
    "mixtral": GROUPED | {"num_local_experts": 3},
    "olmo2": GROUPED,
    "opt": {"ffn_dim": NEURONS, "word_embed_proj_dim": HIDDEN},
    "phi": GROUPED,
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen3": WIDE_HEADS,
    "roberta": {"intermediate_size": NEURONS},
}
"""The first rows, which every test of all models takes."""
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "apertus": GROUPED,
    "arcee": GROUPED,
    "bart": BART,
    "camembert": {"intermediate_size": NEURONS},
    "cohere": GROUPED,
    "cohere2": WIDE_HEADS,
    "deberta-v2": {"intermediate_size": NEURONS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deepseek_v2": LATENT | {"kv_lora_rank": 8, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "distilbert": {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": NEURONS},
    "dots1": LATENT | GROUPED,
    "electra": {"intermediate_size": NEURONS, "embedding_size": 8},
    "ernie4_5": WIDE_HEADS,
    "ernie4_5_moe": GROUPED
    | {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": 12, "moe_layer_start_index": 1},
    "exaone4": GROUPED,
    "falcon": {"ffn_hidden_size": NEURONS, "new_decoder_architecture": True, "num_kv_heads": KEY_VALUE_HEADS},
    "falcon_mamba": MAMBA,
    "gemma4_text": PER_LAYER,
    "glm": WIDE_HEADS,
    "glm4": WIDE_HEADS,
    "glm4_moe": LATENT | GROUPED,
    "gpt_bigcode": {"n_inner": NEURONS, "multi_query": True},
    "gpt_oss": WIDE_HEADS | LOCAL,
    "granite": GROUPED,
    "granitemoe": LOCAL,
    "helium": GROUPED | {"head_dim": 4},
    "hunyuan_v1_dense": WIDE_HEADS,
    "llama4_text": LOCAL | {"head_dim": 6, "interleave_moe_layer_step": 2, "intermediate_size_mlp": NEURONS},
    "mamba": MAMBA,
    "mamba2": {"state_size": 5, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4, "conv_kernel": 3},
    "marian": BART,
    "mbart": BART,
    "ministral": WIDE_HEADS,
    "ministral3": WIDE_HEADS,
    "modernbert": {"intermediate_size": NEURONS},
    "mt5": T5,
    "nemotron": GROUPED,
    "olmo": GROUPED,
    "olmo3": GROUPED,
    "olmoe": MIXED,
    "pegasus": BART,
    "phimoe": LOCAL,
    "qwen2_moe": MIXED | {"shared_expert_intermediate_size": 10, "mlp_only_layers": [1]},
    "qwen3_5": DELTA_NET,
    "qwen3_5_moe_text": DELTA_MIXED,
    "qwen3_5_text": DELTA_NET,
    "qwen3_moe": MIXED | {"head_dim": 6, "mlp_only_layers": [1]},
    "qwen3_next": DELTA_MIXED | {"mlp_only_layers": [1]},
    "seed_oss": WIDE_HEADS,
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "t5": T5,
    "xlm-roberta": {"intermediate_size": NEURONS},
}
INSIDE = {
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
"""Models of text and images, and the configuration of their text's part."""

LATER = sorted(name for name in set(ARCHITECTURES) - set(FIRST) - {"gemma3"} if ARCHITECTURES[name].media is None)
"""Those of texts; tests/test_towers.py has those of images and sound."""


def tiny_config(model_type: str) -> Any:
    """The configuration of a two-layer model."""
    if model_type == "gemma3":
        vision = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
        }
        text = tiny_config("gemma3_text").to_dict()
        return AutoConfig.for_model(
            "gemma3", text_config=text, vision_config=vision | {"patch_size": 14}, mm_tokens_per_image=4
        )
    return AutoConfig.for_model(model_type, **COMMON, **FIRST[model_type])


def row_config(model_type: str, **settings: Any) -> Any:
    """The configuration of a two-layer model."""
    if model_type not in CONFIGS and model_type not in INSIDE:
        return tiny_config(model_type)
    if model_type in INSIDE:
        text = row_config(INSIDE[model_type], **settings).to_dict()
        vision = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            **{"depth": 1, "num_heads": 2, "out_hidden_size": HIDDEN},
        }
        return AutoConfig.for_model(model_type, text_config=text, vision_config=vision)
    return AutoConfig.for_model(model_type, **{**COMMON, **CONFIGS[model_type], **settings})


def row_model(model_type: str, *, seed: int = 0, attention: str | None = None, **settings: Any) -> nn.Module:
    """A two-layer model in eval mode whose every parameter is drawn, so that no router or scale is the same for all."""
    config = row_config(model_type, **settings)
    head: Any = AutoModelForImageTextToText if model_type in INSIDE else auto_class(config)
    torch.manual_seed(seed)
    model = head.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool((parameter != parameter.flatten()[0]).any()) or not bool(parameter.isfinite().all()):
                parameter.copy_(torch.rand_like(parameter) * 0.3 + 0.7 * bool(parameter.ndim == 1))
    return model


def _runs(model_type: str) -> bool:
    """Whether the installed transformers can run the model on text, as 5.24 could not its Llama 4 with images."""
    try:
        row_model(model_type)(input_ids=torch.ones(1, 2, dtype=torch.long))
    except AttributeError:
        return False
    return True


_MIXED = {"enable_moe_block": True, "num_experts": 3, "top_k_experts": 2, "moe_intermediate_size": 12}
MORE: Mapping[str, Mapping[str, Any]] = {"gemma4": _MIXED, "gemma4_text": _MIXED}
"""Settings of a second model, with components that the first one lacks."""

ROWS = [name for name in LATER if name in CONFIG_MAPPING_NAMES and (name != "llama4" or _runs(name))]
"""The rows that the installed transformers has."""
