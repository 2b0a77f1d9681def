"""What can be replayed: which models, in which state, on which inputs."""

from __future__ import annotations

import torch
from torch import nn

from itrain.architectures import blocks
from itrain.inputs import ModelInputs

TEXT = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
"""Arguments of a model's forward that say no more than which tokens an example has."""


def obstacle(model: nn.Module) -> str | None:
    """Why runs of the model cannot be resumed with the same result; None where they can."""
    try:
        blocks(model)
    except ValueError as unknown:
        return str(unknown).partition(". ")[0]
    if any(parameter.requires_grad for parameter in model.parameters()):
        return "the model's weights are trained"
    if any(module.training for module in model.modules()):
        return "the model is not in eval mode"
    if len({parameter.device for parameter in model.parameters()}) > 1 or _is_split(model):
        return "the model's weights are spread over several devices"
    if hooked := next((name for name, module in model.named_modules() if _hooks_of_others(module)), None):
        return f"other code has hooks on the model's module '{hooked}'"
    return None


def unfit(inputs: ModelInputs, *, causal: bool, all_tokens: bool = False) -> str | None:
    """Why the inputs cannot be replayed; None where they can.

    Args:
        inputs: what the model is given.
        causal: whether a token sees only itself and those before it.
        all_tokens: whether edits or the answer take in all tokens, padding among them.
    """
    if others := inputs.arguments.keys() - TEXT:
        return f"the model is given '{min(others)}' besides tokens"
    left, right = inputs.padding
    if not (left or right):
        return None
    if "attention_mask" not in inputs.arguments:
        return "there is padding and no attention mask"
    if left and not causal:
        return "an encoder counts padding on the left as tokens"
    if all_tokens:
        return "the answer or an edit takes in padding"
    return None


def inexact(reason: str) -> ValueError:
    """The error where replay is insisted on."""
    return ValueError(f"replay would not be exact: {reason}")


def state(model: nn.Module) -> tuple[object, ...]:
    """What differs after the model's weights, precision, mode, modules or hooks have changed.

    It is compared in every step, so it looks at no values. Weights changed in place through ``.data`` go unnoticed.
    """
    modules = modules_of(model)
    named = [owned for module in modules for owned in (module._parameters, module._buffers) if owned]
    tensors = [tensor for owned in named for tensor in owned.values() if tensor is not None]
    weights = [
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.requires_grad) for tensor in tensors
    ]
    modes = [(id(each), each.training, len(each._forward_hooks), len(each._forward_pre_hooks)) for each in modules]
    return precision(model), weights, modes


def precision(model: nn.Module) -> torch.dtype:
    """What the model computes in: its weights' type, or autocast's."""
    weight = next(model.parameters())
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def modules_of(model: nn.Module) -> list[nn.Module]:
    """What ``model.modules()`` gives, in another order and a quarter of the time, which every step takes."""
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def _is_split(model: nn.Module) -> bool:
    return isinstance(model, nn.DataParallel) or any(hasattr(weight, "device_mesh") for weight in model.parameters())


def _hooks_of_others(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # transformers leaves hooks behind that collect hidden states when asked for them, and else do nothing.
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)
