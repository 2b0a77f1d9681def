"""Rows of decoders with mixtures of experts in some or all of their blocks."""

from __future__ import annotations

from collections.abc import Mapping

from itrain.architectures.decoders import LLAMA_BLOCK
from itrain.architectures.parts import Architecture, Component, latent, mixture

# Blocks without a mixture have neurons.
_NEURONS = {"mlp_activation": Component("mlp.down_proj", "input")}
_GATE = LLAMA_BLOCK | _NEURONS | mixture("mlp", router="gate", experts="experts")
_SHARED = LLAMA_BLOCK | _NEURONS | mixture("mlp", router="gate", experts="experts", shared="shared_experts")
_ONE_SHARED = LLAMA_BLOCK | _NEURONS | mixture("mlp", router="gate", experts="experts", shared="shared_expert")
_MIXTRAL = LLAMA_BLOCK | mixture("mlp", router="gate", experts="experts")
_ROUTER = LLAMA_BLOCK | mixture("mlp", router="router", experts="experts")
_GRANITE = LLAMA_BLOCK | mixture("block_sparse_moe", router="router.layer|router")
# No expert_output: the experts see each token once for every expert, whether it is chosen or not.
_LLAMA4_MIXTURE = mixture("feed_forward", router="router", shared="shared_expert", flat=True)
_LLAMA4 = LLAMA_BLOCK | {"mlp_activation": Component("feed_forward.down_proj", "input")} | _LLAMA4_MIXTURE
# No key_output and value_output: they are made of the latents of all tokens so far, at every step of a generation anew.
_DEEPSEEK = {
    **{name: each for name, each in _SHARED.items() if name not in ("key_output", "value_output")},
    "query_output": Component("self_attn.q_b_proj|self_attn.q_proj", "output", latent),
    "query_latent": Component("self_attn.q_a_layernorm", "input"),
    "key_value_latent": Component("self_attn.kv_a_layernorm", "input"),
}

# No router_output: some releases have the router's weight and call no router.
_DEEPSEEK2 = {name: each for name, each in _DEEPSEEK.items() if name != "router_output"}

MIXTURES: Mapping[str, Architecture] = {
    "deepseek_v2": Architecture(blocks="layers", components=_DEEPSEEK2),
    "deepseek_v3": Architecture(blocks="layers", components=_DEEPSEEK),
    "dots1": Architecture(blocks="layers", components=_SHARED),
    "ernie4_5_moe": Architecture(blocks="layers", components=_SHARED),
    "glm4_moe": Architecture(blocks="layers", components=_SHARED),
    # Each head has a sink beside the tokens in its softmax.
    "gpt_oss": Architecture(blocks="layers", weights=False, components=_ROUTER),
    "granitemoe": Architecture(blocks="layers", components=_GRANITE),
    "llama4": Architecture(blocks="language_model.model.layers|model.layers|layers", components=_LLAMA4),
    "llama4_text": Architecture(blocks="model.layers|layers", components=_LLAMA4),
    "mixtral": Architecture(blocks="layers", components=_MIXTRAL),
    "olmoe": Architecture(blocks="layers", components=_MIXTRAL),
    "phimoe": Architecture(blocks="layers", components=_ROUTER),
    "qwen2_moe": Architecture(blocks="layers", components=_ONE_SHARED),
    "qwen3_moe": Architecture(blocks="layers", components=_GATE),
}
