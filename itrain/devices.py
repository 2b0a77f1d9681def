"""Where a model computes, also one that accelerate has spread over devices, memory and disk by a device map.

Between calls such a model's weights may lie on the meta device; accelerate's hooks bring them where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

HOOK = "_hf_hook"
"""The attribute by which accelerate knows the hook of a module that it moves."""


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate moves the model's weights, so that nobody else may."""
    return any(hasattr(module, HOOK) for module in model.modules())


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its inputs; the CPU where it has no weights."""
    found = next(iter(execution_devices(model)), None)
    if found is not None:
        return found
    weight = next(model.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def home_of(model: nn.Module) -> torch.device | None:
    """Where inputs and edits of a model lie whose weights accelerate moves; None of others."""
    return device_of(model) if is_dispatched(model) else None


def execution_devices(model: nn.Module) -> list[torch.device]:
    """The devices on which accelerate has the model's modules compute, that of its inputs first."""
    each = (getattr(hook, "execution_device", None) for module in model.modules() for hook in _hooks(module))
    return list(dict.fromkeys(torch.device(device) for device in each if device is not None))


def kept_weights(module: nn.Module) -> Any | None:
    """The values of the module's weights that accelerate keeps elsewhere, by name; None where it keeps none."""
    kept = (getattr(hook, "weights_map", None) for hook in _hooks(module) if getattr(hook, "offload", False))
    return next((each for each in kept if each is not None), None)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate on the module alone."""
    hook: Any = getattr(module, HOOK, None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
