"""Rows of models of an encoder and a decoder, whose sites name the stack: ``encoder.layer0.block_output``."""

from __future__ import annotations

from collections.abc import Mapping

from itrain.architectures.parts import Architecture, Component, block, mlp, separate


def _crossing(attention: str, query_key_value: list[Component], projection: str) -> dict[str, Component]:
    """The attention to the encoder's tokens, by names of its own."""
    found = block(attention, query_key_value, projection)
    return {f"cross_{name}": each for name, each in found.items() if not name.startswith("block_")}


def of_stack(stack: str, *parts: Mapping[str, Component]) -> dict[str, Component]:
    """The components of a stack's blocks, by names that begin with the stack's."""
    return {f"{stack}.{name}": each for part in parts for name, each in part.items()}


def _t5_attention(path: str) -> tuple[str, list[Component], str]:
    return path, separate(f"{path}.q", f"{path}.k", f"{path}.v"), f"{path}.o"


def _bart_attention(path: str) -> tuple[str, list[Component], str]:
    return path, separate(f"{path}.q_proj", f"{path}.k_proj", f"{path}.v_proj"), f"{path}.out_proj"


_T5_SELF = block(*_t5_attention("layer.0.SelfAttention"))
_T5_CROSS = _crossing(*_t5_attention("layer.1.EncDecAttention"))
_T5 = Architecture(
    causal=False,
    stacks={"encoder": "encoder.block", "decoder": "decoder.block"},
    components={
        **of_stack("encoder", _T5_SELF, mlp("layer.1.DenseReluDense", "layer.1.DenseReluDense.wo")),
        **of_stack("decoder", _T5_SELF, _T5_CROSS, mlp("layer.2.DenseReluDense", "layer.2.DenseReluDense.wo")),
    },
)
_BART_SELF = block(*_bart_attention("self_attn")) | mlp("fc1", "fc2")
_BART = Architecture(
    causal=False,
    stacks={"encoder": "encoder.layers", "decoder": "decoder.layers"},
    components={
        **of_stack("encoder", _BART_SELF),
        **of_stack("decoder", _BART_SELF, _crossing(*_bart_attention("encoder_attn"))),
    },
)

TWO_STACKS: Mapping[str, Architecture] = {
    "bart": _BART,
    "marian": _BART,
    "mbart": _BART,
    "mt5": _T5,
    "pegasus": _BART,
    "t5": _T5,
}
