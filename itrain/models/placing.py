"""Placing: on which devices a model's weights go, and in how many bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from itrain.models.base import ModelError
from itrain.quantized import quantized_weights
from itrain.signatures import nearest
from itrain.trust import printable

DeviceMap: TypeAlias = str | Mapping[str, str | int]
"""``auto``, or the device of each module by its path: a device's name or number, ``cpu`` or ``disk``."""
Quantization = Literal["int8", "8bit", "4bit"]
"""``int8`` is torchao's, on any device; ``8bit`` (LLM.int8) and ``4bit`` (NF4) are bitsandbytes'."""
WAYS = ("auto", "balanced", "balanced_low_0", "sequential")
"""The device maps that accelerate works out."""


@dataclass(frozen=True, kw_only=True)
class Placing:
    """How a model is placed in memory.

    Args:
        device_map: see :data:`DeviceMap`; None: whole on the CPU, from where a trainer moves it.
        quantization: see :data:`Quantization`; None: as in its files.
    """

    device_map: DeviceMap | None = None
    quantization: Quantization | None = None

    def arguments(self, config: Any, *, dtype: torch.dtype | Literal["auto"], name: str) -> dict[str, Any]:
        """What transformers is told of it.

        Raises:
            ModelError: a package is not installed, the model is quantised already, or a setting is none of those known.
        """
        found: dict[str, Any] = {}
        if self.device_map is not None:
            found["device_map"] = self._map(name)
        if self.quantization is None:
            return found
        if not isinstance(self.quantization, str) or self.quantization not in MAKERS:
            raise ModelError(
                f"model '{name}': quantization={printable(str(self.quantization))} is unknown; use "
                f"{', '.join(get_args(Quantization))}"
            )
        if (saved := getattr(config, "quantization_config", None)) is not None:
            how = saved.get("quant_method") if isinstance(saved, Mapping) else getattr(saved, "quant_method", None)
            how = getattr(how, "value", how)
            raise ModelError(f"model '{name}': its files are quantised already ({how}); leave quantization out")
        package, make = MAKERS[self.quantization]
        if find_spec(package) is None:
            raise ModelError(
                f"model '{name}': quantization={self.quantization} needs {package}: pip install 'itrain[quantization]'"
            )
        own = getattr(config, "dtype", None)
        computed = dtype if isinstance(dtype, torch.dtype) else own if isinstance(own, torch.dtype) else torch.float32
        return found | {"quantization_config": make(computed)}

    def _map(self, name: str) -> str | dict[str, str | int]:
        if isinstance(self.device_map, Mapping):
            for path, device in self.device_map.items():
                _require_device(device, f"model '{name}': device_map['{printable(str(path))}']={device}")
            return {str(path): device for path, device in self.device_map.items()}
        if self.device_map not in WAYS:
            raise ModelError(
                f"model '{name}': device_map={printable(str(self.device_map))} is none of {', '.join(WAYS)}; for a "
                "map of your own give the device of each module: {<path>: <device, cpu or disk>}"
            )
        return self.device_map

    def require_places(self, skeleton: nn.Module, name: str) -> None:
        """Refuse a map of modules that the model lacks, or that leaves out a weight: transformers may pass over both.

        Raises:
            ModelError: naming the module or the weight.
        """
        if not isinstance(self.device_map, Mapping):
            return
        places = {str(path) for path in self.device_map}
        weights = list(skeleton.state_dict())
        known = {path for path, _ in skeleton.named_modules()} | set(weights)
        for path in sorted(places - known):
            alike = sorted(each for each in known if each and each.count(".") == path.count("."))
            said = nearest(path, alike)
            if len(alike) > FEW:
                said = said.partition(";")[0]
            raise ModelError(f"model '{name}': device_map: there is no module '{printable(path)}'{said}")
        for path in sorted(places - {""}):
            parts = path.split(".")
            for outer in sorted(places & {".".join(parts[:length]) for length in range(len(parts))}):
                holder = f"'{outer}'" if outer else "the whole model"
                raise ModelError(
                    f"model '{name}': device_map places '{path}', and {holder}, which holds it; give the devices of "
                    "the other modules in it one by one"
                )
        for weight in weights:
            parts = weight.split(".")
            if not any(".".join(parts[:length]) in places for length in range(len(parts) + 1)):
                raise ModelError(
                    f"model '{name}': device_map gives no device for '{weight}'; add it, or a module of it"
                )


def _require_device(device: object, place: str) -> None:
    if device == "disk" or (isinstance(device, int) and not isinstance(device, bool)):
        return
    try:
        known = torch.device(str(device)).type != "meta"
    except RuntimeError:
        known = False
    if not known:
        raise ModelError(f"{place} is no device for weights{nearest(printable(str(device)), DEVICES)}")


DEVICES = ("cpu", "disk", "cuda", "cuda:0", "mps", "xpu")
"""What is often meant by a device."""
FEW = 8
"""The number of modules that a message can name."""
PACKS = "support_avx512bf16_for_cpu"
"""The attribute of bitsandbytes' modules of 4 bits that lets them repack their weights."""
WHOLE = Placing()
"""On the CPU, as in the files."""


def _int8(dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _8bit(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _4bit(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


MAKERS: Mapping[str, tuple[str, Callable[[torch.dtype], Any]]] = {
    "int8": ("torchao", _int8),
    "8bit": ("bitsandbytes", _8bit),
    "4bit": ("bitsandbytes", _4bit),
}
"""The package that each quantisation needs, and what tells transformers of it, for the precision computed in."""


def otherwise_quantized(saved: object, model: nn.Module) -> str | None:
    """How a model differs from one whose quantisation was saved, where one of both is quantised; else None."""
    here = bool(quantized_weights(model))
    if here == (saved is not None):
        return None
    if here:
        return "its weights are quantised, and those were not; load it without quantization"
    return f"its weights are in full, and those were quantised; load it with quantization={printable(str(saved))}"


def compute_alike(model: nn.Module) -> None:
    """Have modules of 4 bits compute with gradients as without.

    On some CPUs they repack their weights for a kernel that has no gradient, in the first run that needs none.
    """
    for module in model.modules():
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)
