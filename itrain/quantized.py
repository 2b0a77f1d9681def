"""Quantised weights: which they are, and the values that they stand for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_quantized(weight: Tensor) -> bool:
    """Whether a parameter holds numbers of fewer bits than it computes with."""
    packs = type(weight).dequantize is not Tensor.dequantize or hasattr(weight, "quant_state")
    return packs or not (weight.is_floating_point() or weight.is_complex())


def quantized_weights(model: nn.Module) -> list[str]:
    """The names of the model's quantised parameters."""
    return [name for name, weight in model.named_parameters(remove_duplicate=False) if is_quantized(weight)]


def count_weights(model: nn.Module) -> int:
    """How many values the model's parameters stand for, of packed ones too."""
    packed = (getattr(weight, "quant_state", None) for weight in model.parameters())
    return sum(
        weight.numel() if state is None else state.shape.numel()
        for weight, state in zip(model.parameters(), packed, strict=True)
    )


def rounds_inputs(model: nn.Module) -> bool:
    """Whether modules round their inputs together, so that a token's output depends on the others of a run."""
    return any(_scales(module) is not None or _is_dynamic(module) for module in model.modules())


def packed_weights(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose weights bitsandbytes has packed, by the weight's name."""
    return {
        f"{path}.weight": module
        for path, module in model.named_modules()
        if hasattr(module._parameters.get("weight"), "quant_state") or _scales(module) is not None
    }


def values(module: nn.Module) -> Tensor:
    """The values that a weight packed by bitsandbytes stands for."""
    weight: Any = module.weight
    scales = _scales(module)
    if scales is not None:
        return weight.data.float() * scales.float()[:, None] / 127
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    return dequantize_4bit(weight.data, weight.quant_state)


def is_part_of(name: str, packed: dict[str, nn.Module]) -> bool:
    """Whether an entry of a state dict describes a packed weight, such as its scales."""
    path, _, leaf = name.rpartition(".")
    return f"{name.rpartition('.weight.')[0]}.weight" in packed or (
        f"{path}.weight" in packed and leaf in ("SCB", "weight_format")
    )


def _scales(module: nn.Module) -> Tensor | None:
    """The scales of the rows of a module of LLM.int8, which its first run moves; None of others."""
    weight: Any = module._parameters.get("weight")
    if not hasattr(weight, "SCB"):
        return None
    own: Any = module
    return weight.SCB if weight.SCB is not None else own.state.SCB


def _is_dynamic(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.quantized.dynamic")
