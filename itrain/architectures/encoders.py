"""Rows of encoders, whose tokens see all others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from itrain.architectures.parts import Architecture, block, fused, mlp, separate


def _thirds(columns: Tensor, num_heads: int, head_size: int, *, part: int) -> Tensor:
    return columns.view(3, num_heads, head_size)[part]


_BERT_QKV = separate("attention.self.query", "attention.self.key", "attention.self.value")
_BERT = block("attention.self", _BERT_QKV, "attention.output.dense") | mlp("intermediate", "output.dense")

_DISTILBERT_QKV = separate("attention.q_lin", "attention.k_lin", "attention.v_lin")
_DISTILBERT = block("attention", _DISTILBERT_QKV, "attention.out_lin") | mlp("ffn", "ffn.lin2")
_DEBERTA2_QKV = separate("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj")
_DEBERTA2 = block("attention.self", _DEBERTA2_QKV, "attention.output.dense") | mlp("intermediate", "output.dense")
_MODERNBERT = block("attn", fused("attn.Wqkv", _thirds), "attn.Wo") | mlp("mlp", "mlp.Wo")

ENCODERS: Mapping[str, Architecture] = {
    "bert": Architecture(blocks="encoder.layer", causal=False, components=_BERT),
    "camembert": Architecture(blocks="encoder.layer", causal=False, components=_BERT),
    "deberta-v2": Architecture(blocks="encoder.layer", causal=False, components=_DEBERTA2),
    "distilbert": Architecture(blocks="transformer.layer", causal=False, components=_DISTILBERT),
    "electra": Architecture(blocks="encoder.layer", causal=False, components=_BERT),
    "modernbert": Architecture(blocks="layers", causal=False, components=_MODERNBERT),
    "roberta": Architecture(blocks="encoder.layer", causal=False, components=_BERT),
    "xlm-roberta": Architecture(blocks="encoder.layer", causal=False, components=_BERT),
}
