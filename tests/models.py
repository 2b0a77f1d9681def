"""Tiny models with random weights, one for each row of the table, and inputs for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from itrain.architectures import ARCHITECTURES
from itrain.data import CounterfactualBatch
from itrain.inputs import ModelInputs
from itrain.sites import Site

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

CONFIGS: Mapping[str, Mapping[str, object]] = {
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

ALL_TYPES = sorted({*CONFIGS, "gemma3"})
"""The rows that every test of all models takes; tests/test_rows.py has the others."""
CAUSAL_TYPES = [name for name in ALL_TYPES if ARCHITECTURES[name].causal]
HEADS_OF_MODELS = {"none": AutoModel, "classes": AutoModelForSequenceClassification}


def tiny_config(model_type: str):
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
    return AutoConfig.for_model(model_type, **COMMON, **CONFIGS[model_type])


def tiny_model(model_type: str, *, head: str = "language", seed: int = 0) -> nn.Module:
    """A two-layer model in eval mode; ``head`` is "language", "classes" or "none"."""
    config = tiny_config(model_type)
    language = AutoModelForCausalLM if ARCHITECTURES[model_type].causal else AutoModelForMaskedLM
    torch.manual_seed(seed)
    return (HEADS_OF_MODELS | {"language": language})[head].from_config(config).eval()


def tiny_inputs(
    lengths: Sequence[int] = (6, 6),
    *,
    left: bool = False,
    answer: bool = False,
    spans: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> ModelInputs:
    """Random tokens, padded right or left; with ``answer`` the last token's logits are the answer."""
    batch, longest = len(lengths), max(lengths)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, VOCABULARY, (batch, longest), generator=generator)
    length = torch.tensor(lengths)
    first = longest - length if left else torch.zeros_like(length)
    tokens = torch.stack([first, first + length], 1)
    place = torch.arange(longest)
    mask = ((place >= tokens[:, :1]) & (place < tokens[:, 1:])).long()
    # The same text whichever side is padded.
    ids = text.gather(1, (place - first[:, None]).clamp(min=0)) * mask
    return ModelInputs(
        arguments={"input_ids": ids, "attention_mask": mask},
        answer=tokens[:, 1] - 1 if answer else None,
        tokens=tokens,
        spans=spans or {},
    )


def pairs(base: ModelInputs, source: ModelInputs) -> CounterfactualBatch:
    """Pairs of which one variable, x, is interchanged; their labels mean nothing."""
    zeros = torch.zeros(base.batch_size, dtype=torch.long)
    return CounterfactualBatch(
        base=base,
        sources={"x": source},
        base_label=zeros,
        counterfactual_label=zeros + 1,
        contrast_label=zeros,
        source_labels={"x": zeros},
        variables={"x": zeros},
        groups=(("x",),),
        group=zeros,
        isolates=zeros.bool(),
    )


def sites(*texts: str) -> list[Site]:
    return [Site.parse(text) for text in texts]


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
