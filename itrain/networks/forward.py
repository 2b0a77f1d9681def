"""What is asked by a name that releases of transformers change: of a model's forward, its output and configuration.

The names stand here alone, and each is looked up in what is at hand, never told from a version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from itrain.architectures import architecture, layers, unwrap
from itrain.devices import home_of
from itrain.inputs import PositionError
from itrain.inputs.layout import SECOND

CACHE = ("cache", "past_key_values", "cache_params")
"""What is kept of earlier tokens, among a forward's arguments and its outputs; the latest name first."""
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
"""How many tokens some layers look back over, in a configuration."""
POSITIONS = "max_position_embeddings"
"""How many tokens a text may have, in a configuration."""
SHARED = "num_kv_shared_layers"
"""How many of the last layers take the keys and values of an earlier one, in a configuration."""
CHECKPOINT = "_gradient_checkpointing_func"
"""A block's attribute: what recomputes it."""
TAKE_MASKS = ("eager", "sdpa")
"""The ways of computing attention that take any mask."""


@dataclass(frozen=True, eq=False)
class Forward:
    """How a model's forward is called, looked up once for many runs.

    Args:
        wrapped: the model as it is run.
        model: the same without wrappers.
        names: the arguments of its forward.
        caches: whether it keeps keys and values unless told otherwise.
        counts: whether it numbers its tokens, padding among them unless told otherwise.
        home: where its inputs and edits lie, if accelerate moves its weights; else None.
        limit: how many tokens a text may have; None: any number, or the model does not tell.
        start: the token with which the decoder of a model that has one starts; None: it has none, or does not tell.
        right: whether padding is put on the right, since on the left it may be counted as tokens all the same.
    """

    wrapped: nn.Module
    model: nn.Module
    names: frozenset[str]
    caches: bool
    counts: bool
    right: bool
    home: torch.device | None
    limit: int | None = None
    start: int | None = None

    @classmethod
    def of(cls, wrapped: nn.Module) -> Forward:
        """The forward of a model.

        Raises:
            ValueError: the model is wrapped in soft prompts.
        """
        _refuse_soft_prompts(wrapped)
        model = unwrap(wrapped)
        row, names = architecture(model), _accepted(type(model))
        caches = row is not None and "use_cache" in names
        counts = row is not None and row.causal and "position_ids" in names
        # What models of other types make of padding on the left is known of none of them, and encoders count it.
        right = hasattr(getattr(model, "config", None), "model_type") and not (row is not None and row.causal)
        config: Any = getattr(model, "config", None)
        decodes = getattr(config, "is_encoder_decoder", False) and SECOND[0] in names
        start = getattr(config, "decoder_start_token_id", None) if decodes else None
        return cls(wrapped, model, names, caches, counts, right, home_of(model), positions_of(model), start)

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments given and those that transformers would get wrong."""
        arguments = dict(given)
        if torch.is_grad_enabled():
            # Tensors that were made in inference mode could not be saved for the backward pass.
            made = {name for name, each in given.items() if isinstance(each, Tensor) and each.is_inference()}
            arguments |= {name: given[name].clone() for name in made}
        if self.caches:
            arguments.setdefault("use_cache", False)
        if self.counts and "attention_mask" in arguments and "position_ids" not in arguments:
            # GPT-2 and its kin number padding too unless told where the text starts.
            arguments["position_ids"] = (arguments["attention_mask"].cumsum(-1) - 1).clamp(min=0).long()
        return arguments

    def too_long(self, ids: Int[Tensor, "batch sequence"]) -> PositionError:
        """The error about texts for which the model has no positions."""
        return PositionError(
            f"a text has {ids.shape[1]} tokens, and {type(self.model).__name__} has positions for {self.limit}; "
            "shorten it, or take a model of longer texts: nothing is cut"
        )


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a text may have, by the model's configuration; None where it does not tell."""
    config: Any = getattr(model, "config", None)
    own = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(own, POSITIONS, None)
    if not isinstance(limit, int) or _stretches(getattr(own, "rope_parameters", None)):
        return None
    tables = (part for path, part in model.named_modules() if path.endswith("position_embeddings"))
    # RoBERTa and its kin count from the one after padding's.
    unused = [
        part.padding_idx + 1 for part in tables if isinstance(part, nn.Embedding) and part.padding_idx is not None
    ]
    return limit - max(unused, default=0)


def _stretches(rotary: object) -> bool:
    """Whether a rotary embedding grows with the text, beyond the number of its configuration."""
    found = rotary if isinstance(rotary, Mapping) else {}
    return found.get("rope_type") == "dynamic" or any(map(_stretches, found.values()))


def cache_arguments(model: nn.Module, cache: object) -> dict[str, Any]:
    """The arguments by which the model's forward reads and fills the cache.

    Raises:
        ValueError: the forward names no argument for it; passed on as another one, the cache could go unnoticed.
    """
    names = _accepted(type(model))
    name = next((name for name in CACHE if name in names), None)
    if name is None:
        raise ValueError(f"{type(model).__name__}'s forward names no argument for a cache: none of {', '.join(CACHE)}")
    return {name: cache, "use_cache": True}


def takes_cache(model: nn.Module) -> bool:
    """Whether the model's forward names an argument for a cache."""
    return not _accepted(type(model)).isdisjoint(CACHE)


def cache_of(output: object) -> Any:
    """The cache that a forward has filled; None where it keeps none."""
    return next((getattr(output, name) for name in CACHE if hasattr(output, name)), None)


def held_by(cache: Any) -> int | None:
    """How many tokens a cache holds; None where it holds a state, which does not tell."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        # transformers refuses to count where no layer keeps keys and values.
        return None if cache.has_previous_state() else 0


def takes_any_mask(model: nn.Module, tokens: int) -> bool:
    """Whether the model lets each of so many tokens see those that a mask names.

    Windows, which some layers have and others not, could not be told apart.
    """
    config: Any = unwrap(model).config
    own = config.get_text_config()
    windows = (getattr(own, name, None) for name in WINDOWS)
    return getattr(own, "_attn_implementation", None) in TAKE_MASKS and all(
        not window or window >= tokens for window in windows
    )


def shares_keys(model: nn.Module) -> bool:
    """Whether some blocks take their keys and values from an earlier one."""
    config: Any = getattr(unwrap(model), "config", None)
    return hasattr(config, "get_text_config") and bool(getattr(config.get_text_config(), SHARED, 0))


def checkpoint_of(block: nn.Module) -> Callable[..., Any] | None:
    """What runs the block now and again in the backward pass, where gradient checkpointing is on."""
    if not block.training or not getattr(block, "gradient_checkpointing", False):
        return None
    return getattr(block, CHECKPOINT, None)


def _refuse_soft_prompts(wrapped: nn.Module) -> None:
    """Refuse virtual tokens before the text, by which positions and answers would move."""
    for wrapper in layers(wrapped):
        config: Any = getattr(wrapper, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"{type(wrapper).__name__}: its adapter ({kind}) puts {config.num_virtual_tokens} virtual tokens "
                "before the text, by which every position and answer would move; take the model without it, or an "
                "adapter of weights such as LoRA"
            )


@cache
def _accepted(model: type[nn.Module]) -> frozenset[str]:
    """The names of the forward's arguments; looking them up takes longer than a small model's block."""
    # Through decorators, which take old names too and pass the latest on.
    return frozenset(inspect.signature(model.forward).parameters)
