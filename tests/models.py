"""Tiny models with random weights, one for each row of the table, and inputs for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from itrain.architectures import ARCHITECTURES
from itrain.data import CounterfactualBatch
from itrain.inputs import ModelInputs
from itrain.sites import Site
from scripts.tiny_models import COMMON as COMMON
from scripts.tiny_models import FIRST
from scripts.tiny_models import HEADS as HEADS
from scripts.tiny_models import HIDDEN as HIDDEN
from scripts.tiny_models import KEY_VALUE_HEADS as KEY_VALUE_HEADS
from scripts.tiny_models import LAYERS as LAYERS
from scripts.tiny_models import NEURONS as NEURONS
from scripts.tiny_models import VOCABULARY as VOCABULARY
from scripts.tiny_models import tiny_config as tiny_config

ALL_TYPES = sorted({*FIRST, "gemma3"})
"""The rows that every test of all models takes; tests/test_rows.py has the others."""
CAUSAL_TYPES = [name for name in ALL_TYPES if ARCHITECTURES[name].causal]
HEADS_OF_MODELS = {"none": AutoModel, "classes": AutoModelForSequenceClassification}


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
