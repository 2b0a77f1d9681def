"""Trained weights: which weights of a model a co-training trains, and the modes that go with them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from itrain.adapters import add_lora
from itrain.architectures import unwrap
from itrain.networks.base import Network
from itrain.quantized import is_quantized, quantized_weights

ALPHA = 16.0
"""The scale of adapters, where nothing else is said."""


def choose_weights(
    network: Network,
    *,
    parts: Sequence[str] | None,
    lora_rank: int | None,
    lora_alpha: float,
    lora_targets: Sequence[str],
) -> None:
    """Have the model train the parts that are named and adapters of its own, or all that is not frozen.

    Raises:
        ValueError: a part or target does not exist, is quantised or shares its weights, nothing is trained, or targets
            or a scale are given and no rank.
    """
    if lora_rank is None and (lora_targets or lora_alpha != ALPHA):
        idle = "lora_targets" if lora_targets else f"lora_alpha={lora_alpha}"
        raise ValueError(f"{idle} has no effect without adapters; add lora_rank=8, or leave it out")
    if lora_rank is not None:
        add_lora(network.model, rank=lora_rank, alpha=lora_alpha, targets=lora_targets)
    if lora_rank is None and parts is None:
        _require_full_weights(network.model)
    if parts is not None:
        _train_parts(network.model, parts, others=lora_rank is not None)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError("nothing of the model is trained; give network=make_network(model, trainable=True)")


def frozen_to_eval(module: nn.Module, *, whole: bool, some: bool = True, every: bool = True) -> None:
    """Put what is not trained into eval mode, in which running statistics stay and dropout is off.

    Args:
        whole: a module counts as trained if all of its weights are, else if some are.
        some, every: whether some or all weights of the module around this one are trained, which decides for modules
            without weights of their own; statistics are kept unless all are.
    """
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained:
        some, every = any(trained), all(trained)
    keeps = whole or (not trained and bool(list(module.buffers())))
    module.training = every if keeps else some
    for child in module.children():
        frozen_to_eval(child, whole=whole, some=some, every=every)


def _require_full_weights(model: nn.Module) -> None:
    """Refuse to train a model of whose weights only those would be trained that are not quantised.

    Raises:
        ValueError: some are quantised.
    """
    if quantized := quantized_weights(model):
        raise ValueError(
            f"'{quantized[0]}' and {len(quantized) - 1} more weights of {type(unwrap(model)).__name__} are quantised "
            "and cannot be trained; train adapters over them (lora_rank=8 and lora_targets), or load the model without "
            "quantization"
        )


def _train_parts(model: nn.Module, parts: Sequence[str], *, others: bool) -> None:
    """Train the weights at and inside the paths; freeze all others, unless ``others`` stay as they are."""
    model = unwrap(model)
    # Tied weights under each of their names.
    named = dict(model.named_parameters(remove_duplicate=False))
    paths = [path for path, _ in model.named_modules() if path] + list(named)
    if not others:
        model.requires_grad_(False)
    trained: dict[str, str] = {}
    for part in parts:
        inside = [name for name in named if fnmatchcase(name, part) or fnmatchcase(name, f"{part}.*")]
        if not inside:
            near = difflib.get_close_matches(part, paths, n=1, cutoff=0.0)[0]
            raise ValueError(f"parts: {type(model).__name__} has no weights at '{part}'; did you mean '{near}'?")
        trained |= dict.fromkeys(inside, part)
    for name, part in trained.items():
        if is_quantized(named[name]):
            raise ValueError(f"parts: '{part}' holds '{name}', which is quantised and cannot be trained; leave it out")
        tied = next((each for each in named if named[each] is named[name] and each not in trained), None)
        if tied is not None:
            raise ValueError(
                f"parts: '{part}' shares its weight '{name}' with '{tied}', which would be trained too; name both, or "
                "load the model with untied weights"
            )
        named[name].requires_grad_(True)
