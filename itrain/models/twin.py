"""The randomly initialised twin of a base model, on which no result can be due to what it has learned."""

from __future__ import annotations

from copy import deepcopy
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from itrain.architectures import architecture, bind_row, unwrap
from itrain.devices import is_dispatched
from itrain.models.base import BaseModel, ModelError
from itrain.models.loading import load_pretrained, without_pooler
from itrain.models.pooled import PooledClassifier
from itrain.quantized import quantized_weights
from itrain.shards import has_shards, own_class
from itrain.weights import served_by


def with_random_weights(base_model: BaseModel, *, seed: int) -> BaseModel:
    """The same architecture and tokenizer with fresh weights, drawn by the model's own initialisation.

    Results on it cannot be due to what the model has learned. Zhang and Bowman 2018, "Language Modeling Teaches You
    More Syntax than Translation Does", section 3.

    Raises:
        ModelError: a module does not say how it is initialised, or the weights do not match the architecture.
    """
    model = unwrap(base_model.model)
    remedy = "set sweep.random_model=false to go without"
    if served_by(model) is not None:
        raise ModelError(
            f"model '{base_model.name}': it is on a server, and would have its randomly initialised twin here; {remedy}"
        )
    if is_dispatched(model) or quantized_weights(model):
        return _placed_alike(base_model, seed=seed, remedy=remedy)
    base = model.encoder if isinstance(model, PooledClassifier) else model
    with torch.random.fork_rng(devices=[]):
        # The CPU's alone: an accelerator's draws go on where they were.
        torch.default_generator.manual_seed(seed)
        # Transformers' models are initialised as they are made, from a configuration that they might change.
        made = getattr(type(base), "config_class", None) is not None
        if has_shards(model) and not made:
            raise ModelError(f"model '{base_model.name}': it is sharded and not a model of transformers; {remedy}")
        fresh = _drawn(model) if made else deepcopy(model).cpu()
        for name, part in () if made else fresh.named_modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
            elif list(part.parameters(recurse=False)):
                raise ModelError(
                    f"model '{base_model.name}': {type(part).__name__} at '{name}' has weights and no "
                    f"reset_parameters() that draws them anew; give it one, or {remedy}"
                )
    new, old = list(fresh.parameters()), list(model.parameters())
    if [p.shape for p in new] != [p.shape for p in old] or not all(p.is_floating_point() for p in old):
        raise ModelError(
            f"model '{base_model.name}': its weights are not those of its architecture (adapters?), so "
            f"it has no randomly initialised twin; {remedy}"
        )
    for drawn, given in zip(new, old, strict=True):
        drawn.data = drawn.data.to(given.dtype)
    bind_row(fresh, architecture(model))
    fresh.to(old[0].device).train(model.training)
    return BaseModel(model=fresh, tokenizer=base_model.tokenizer, name=f"{base_model.name}, randomly initialised")


def _drawn(model: Any) -> nn.Module:
    """A model of transformers made from its configuration, with a pooler or a head of ours where it has one."""
    if isinstance(model, PooledClassifier):
        return model.around(_drawn(model.encoder))
    made = own_class(model)
    bare = getattr(model, "pooler", model) is None
    return made(deepcopy(model.config), **(without_pooler(made) if bare else {}))


def _placed_alike(base_model: BaseModel, *, seed: int, remedy: str) -> BaseModel:
    """The twin of a model that is quantised or placed by a device map: drawn in full, then loaded in the same way."""
    model: Any = unwrap(base_model.model)
    placed = getattr(model, "hf_device_map", None) or {}
    known = base_model.quantization is not None or not quantized_weights(model)
    if not known or getattr(type(model), "config_class", None) is None or "disk" in placed.values():
        raise ModelError(
            f"model '{base_model.name}': it was not quantised by itrain, or lies on the disk in part, so it has no "
            f"randomly initialised twin; {remedy}"
        )
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as folder:
        torch.default_generator.manual_seed(seed)
        fresh: Any = type(model)(config)
        fresh.to(model.dtype).save_pretrained(folder)
        attention = getattr(model.config, "_attn_implementation", None)
        twin = load_pretrained(
            folder,
            attn_implementation=attention,
            device_map=placed or _whole_on(model),
            quantization=base_model.quantization,  # type: ignore[arg-type]
        )
    bind_row(twin.model, architecture(model))
    twin.model.train(model.training)
    return BaseModel(
        model=twin.model,
        tokenizer=base_model.tokenizer,
        name=f"{base_model.name}, randomly initialised",
        quantization=base_model.quantization,
    )


def _whole_on(model: nn.Module) -> dict[str, str] | None:
    """The device map of a model that is whole on an accelerator; None on the CPU."""
    device = next(model.parameters()).device
    return None if device.type == "cpu" else {"": str(device)}
