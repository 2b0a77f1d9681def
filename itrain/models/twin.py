"""The randomly initialised twin of a base model, on which no result can be due to what it has learned."""

from __future__ import annotations

from copy import deepcopy

import torch

from itrain.architectures import unwrap
from itrain.models.base import BaseModel, ModelError
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
    with torch.random.fork_rng(devices=[]):
        # The CPU's alone: an accelerator's draws go on where they were.
        torch.default_generator.manual_seed(seed)
        # Transformers' models are initialised as they are made, from a configuration that they might change.
        made = getattr(type(model), "config_class", None) is not None
        fresh = type(model)(deepcopy(model.config)) if made else deepcopy(model).cpu()
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
            f"model '{base_model.name}': its weights are not those of its architecture (adapters or quantisation?), so "
            f"it has no randomly initialised twin; {remedy}"
        )
    for drawn, given in zip(new, old, strict=True):
        drawn.data = drawn.data.to(given.dtype)
    fresh.to(old[0].device).train(model.training)
    return BaseModel(model=fresh, tokenizer=base_model.tokenizer, name=f"{base_model.name}, randomly initialised")
