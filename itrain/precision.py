"""Weights that keep full precision when all around them is cast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from itrain.devices import execution_devices

if TYPE_CHECKING:
    from typing_extensions import Self


class FullPrecision(nn.ModuleDict):
    """Modules whose weights stay in fp32 when a trainer casts everything else to half precision."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < torch.float32.itemsize:
                return tensor.to(moved.device, torch.promote_types(tensor.dtype, torch.float32))
            return moved

        return super()._apply(keep_precision, recurse)


def match_precision(module: nn.Module, model: nn.Module) -> None:
    """Compute where the model does, and in fp64 beside a model of fp64; what its activations meet is otherwise fp32."""
    devices = execution_devices(model)[:1] or {parameter.device for parameter in model.parameters()}
    if len(devices) == 1 and not any(device.type == "meta" for device in devices):
        module.to(next(iter(devices)))
    if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        module.double()
