"""Rows of decoders some or all of whose blocks hand a state from token to token.

The state itself is no module's input or output, and with it there are no keys and values of earlier tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from itrain.architectures.parts import STREAM, Architecture, Component, block, fused, gated, mixture, mlp, separate


def _half(columns: Tensor, block: nn.Module, *, part: int) -> Tensor:
    return columns.chunk(2)[part]


def _of_mamba2(columns: Tensor, block: Any, *, part: int) -> Tensor:
    """Part of the projection (gate | what is convolved | steps)."""
    mixer = block.mixer
    return columns.split([mixer.out_proj.in_features, mixer.conv1d.in_channels, mixer.A_log.numel()])[part]


def _of_delta_net(columns: Tensor, block: Any) -> Tensor:
    """The gate of a projection (query | key | values | gates) of the first key head, then of the next."""
    net = block.linear_attn
    return columns.view(net.num_k_heads, -1)[:, -(net.value_dim // net.num_k_heads) :].flatten()


def _mixer(path: str) -> dict[str, Component]:
    return STREAM | {
        "mixer_input": Component(path, "input"),
        "mixer_activation": Component(f"{path}.out_proj", "input"),
        "mixer_output": Component(f"{path}.out_proj", "output"),
    }


_MAMBA = _mixer("mixer") | {
    "conv_input": Component("mixer.in_proj", "output", part=partial(_half, part=0)),
    "mixer_gate": Component("mixer.in_proj", "output", part=partial(_half, part=1)),
    "scan_parameters": Component("mixer.x_proj", "output"),
}
_MAMBA2 = _mixer("mixer") | {
    "conv_input": Component("mixer.in_proj", "output", part=partial(_of_mamba2, part=1)),
    "mixer_gate": Component("mixer.in_proj", "output", part=partial(_of_mamba2, part=0)),
}
_KEY_VALUE = separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")[1:]
_GATED = block("self_attn", [fused("self_attn.q_proj", gated)[0], *_KEY_VALUE], "self_attn.o_proj") | {
    "attention_gate": fused("self_attn.q_proj", gated)[1]
}
_NEURONS = {"mlp_activation": Component("mlp.down_proj", "input")}
_GATED_MIXTURE = (
    _GATED | mixture("mlp", router="gate", experts="experts", shared="shared_expert") | _mixer("linear_attn")
)
# Blocks without a mixture have neurons.
_NEXT = _GATED_MIXTURE | _NEURONS | {"mixer_gate": Component("linear_attn.in_proj_qkvz", "output", part=_of_delta_net)}
_SEPARATE = {
    "conv_input": Component("linear_attn.in_proj_qkv", "output"),
    "mixer_gate": Component("linear_attn.in_proj_z", "output"),
}
_QWEN3_5 = _GATED | _mixer("linear_attn") | _SEPARATE | mlp("mlp", "mlp.down_proj")

RECURRENT: Mapping[str, Architecture] = {
    "falcon_mamba": Architecture(blocks="layers", recurrent=True, components=_MAMBA),
    "mamba": Architecture(blocks="layers", recurrent=True, components=_MAMBA),
    "mamba2": Architecture(blocks="layers", recurrent=True, components=_MAMBA2),
    "qwen3_5": Architecture(blocks="language_model.layers|layers", recurrent=True, components=_QWEN3_5),
    "qwen3_5_moe": Architecture(
        blocks="language_model.layers|layers", recurrent=True, components=_GATED_MIXTURE | _SEPARATE
    ),
    "qwen3_5_moe_text": Architecture(blocks="layers", recurrent=True, components=_GATED_MIXTURE | _SEPARATE),
    "qwen3_5_text": Architecture(blocks="layers", recurrent=True, components=_QWEN3_5),
    "qwen3_next": Architecture(blocks="layers", recurrent=True, components=_NEXT),
}
