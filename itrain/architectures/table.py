"""Where the components of transformers' models are: one table, model_type -> component -> module path.

Only paths are tabulated; sizes are read from the modules, because tables of sizes go stale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor

End = Literal["input", "output", "weights"]
"""A module's input, its output, or the attention weights that it computes on the way."""

Heads = Callable[[Tensor, int, int], Tensor]
"""Maps a tensor's columns, the number of query heads and a head's size to the component's columns, (heads, size)."""


class Component(NamedTuple):
    """The input or output of a module of the block and, where it holds attention heads, their layout."""

    path: str
    end: End
    heads: Heads | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A row of the table.

    Args:
        blocks: path of the list of blocks, from the model without its head.
        causal: whether a token sees only itself and those before it.
        components: by name, with the same meaning in every row:

            * ``block_input``, ``block_output``: the residual stream;
            * ``attention_input``, ``mlp_input``: the sublayer's input;
            * ``query_output``, ``key_output``, ``value_output``: the projections, before any norm and rotation;
            * ``attention_value_output``: the heads' outputs side by side, the input of the output projection;
            * ``mlp_activation``: the neurons, the input of the down projection. In a gated MLP that is act(gate) * up;
              pyvene's component of this name is act(gate) there;
            * ``attention_output``, ``mlp_output``: the outputs of these two projections, before dropout, before the
              norm that follows in some models (Gemma 2, OLMo 2, BERT) and before they join the residual stream.

            Each row also has ``attention_weights``, whose position is the attending token and whose features are the
            weights of all tokens, head by head. Eager attention alone computes them.
    """

    blocks: str
    causal: bool = True
    components: Mapping[str, Component]


def _whole(columns: Tensor, num_heads: int, head_size: int) -> Tensor:
    # Grouped keys and values have fewer heads than queries: their number follows from the width.
    return columns.view(-1, head_size)


def _side_by_side(columns: Tensor, num_heads: int, head_size: int, *, part: int) -> Tensor:
    """Part of a fused projection (queries | keys | values), keys and values equally wide."""
    queries = num_heads * head_size
    keys = (len(columns) - queries) // 2
    return columns.split([queries, keys, keys])[part].view(-1, head_size)


def _interleaved(columns: Tensor, num_heads: int, head_size: int, *, part: int) -> Tensor:
    """Part of a fused projection (query | key | value) of the first head, then of the next."""
    return columns.view(-1, 3, head_size)[:, part]


def _separate(query: str, key: str, value: str) -> list[Component]:
    return [Component(path, "output", _whole) for path in (query, key, value)]


def _fused(path: str, layout: Callable[..., Tensor]) -> list[Component]:
    return [Component(path, "output", partial(layout, part=part)) for part in range(3)]


def _block(attention: str, query_key_value: list[Component], projection: str) -> dict[str, Component]:
    query, key, value = query_key_value
    return {
        "block_input": Component("", "input"),
        "block_output": Component("", "output"),
        "attention_input": Component(attention, "input"),
        "query_output": query,
        "key_output": key,
        "value_output": value,
        "attention_value_output": Component(projection, "input", _whole),
        "attention_output": Component(projection, "output"),
    }


def _mlp(path: str, down: str) -> dict[str, Component]:
    return {
        "mlp_input": Component(path, "input"),
        "mlp_activation": Component(down, "input"),
        "mlp_output": Component(down, "output"),
    }


_QKV = _separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA_BLOCK = _block("self_attn", _QKV, "self_attn.o_proj")
_LLAMA = _LLAMA_BLOCK | _mlp("mlp", "mlp.down_proj")
# No mlp_activation: the experts are one fused module, which sees the tokens regrouped by expert.
_MIXTRAL = _LLAMA_BLOCK | {"mlp_input": Component("mlp", "input"), "mlp_output": Component("mlp", "output")}
_PHI = _block("self_attn", _QKV, "self_attn.dense") | _mlp("mlp", "mlp.fc2")
_PHI3_QKV = _fused("self_attn.qkv_proj", _side_by_side)
_PHI3 = _block("self_attn", _PHI3_QKV, "self_attn.o_proj") | _mlp("mlp", "mlp.down_proj")
# No mlp_*: OPT's MLP sees the tokens of all examples in one row, where no position can be told.
_OPT = _block("self_attn", _QKV, "self_attn.out_proj")
_GPT2 = _block("attn", _fused("attn.c_attn", _side_by_side), "attn.c_proj") | _mlp("mlp", "mlp.c_proj")
_GPT_NEO_QKV = _separate("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")
_GPT_NEO = _block("attn", _GPT_NEO_QKV, "attn.attention.out_proj") | _mlp("mlp", "mlp.c_proj")
_GPTJ_QKV = _separate("attn.q_proj", "attn.k_proj", "attn.v_proj")
_GPTJ = _block("attn", _GPTJ_QKV, "attn.out_proj") | _mlp("mlp", "mlp.fc_out")
_NEOX_QKV = _fused("attention.query_key_value", _interleaved)
_NEOX = _block("attention", _NEOX_QKV, "attention.dense") | _mlp("mlp", "mlp.dense_4h_to_h")
_BLOOM_QKV = _fused("self_attention.query_key_value", _interleaved)
_BLOOM = _block("self_attention", _BLOOM_QKV, "self_attention.dense") | _mlp("mlp", "mlp.dense_4h_to_h")
_BERT_QKV = _separate("attention.self.query", "attention.self.key", "attention.self.value")
_BERT = _block("attention.self", _BERT_QKV, "attention.output.dense") | _mlp("intermediate", "output.dense")

ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": Architecture(blocks="encoder.layer", causal=False, components=_BERT),
    "bloom": Architecture(blocks="h", components=_BLOOM),
    "gemma": Architecture(blocks="layers", components=_LLAMA),
    "gemma2": Architecture(blocks="layers", components=_LLAMA),
    "gemma3": Architecture(blocks="language_model.layers", components=_LLAMA),
    "gemma3_text": Architecture(blocks="layers", components=_LLAMA),
    "gpt2": Architecture(blocks="h", components=_GPT2),
    "gpt_neo": Architecture(blocks="h", components=_GPT_NEO),
    "gpt_neox": Architecture(blocks="layers", components=_NEOX),
    "gptj": Architecture(blocks="h", components=_GPTJ),
    "llama": Architecture(blocks="layers", components=_LLAMA),
    "mistral": Architecture(blocks="layers", components=_LLAMA),
    "mixtral": Architecture(blocks="layers", components=_MIXTRAL),
    "olmo2": Architecture(blocks="layers", components=_LLAMA),
    "opt": Architecture(blocks="decoder.layers", components=_OPT),
    "phi": Architecture(blocks="layers", components=_PHI),
    "phi3": Architecture(blocks="layers", components=_PHI3),
    "qwen2": Architecture(blocks="layers", components=_LLAMA),
    "qwen3": Architecture(blocks="layers", components=_LLAMA),
    "roberta": Architecture(blocks="encoder.layer", causal=False, components=_BERT),
}
