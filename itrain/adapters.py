"""Low-rank adapters: a few trained weights inside a frozen model, through PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import cast

from torch import nn

from itrain.architectures import WHOLE_ENDS, unwrap
from itrain.bounds import require_at_least
from itrain.precision import FullPrecision
from itrain.shards import only_shapes


def add_lora(model: nn.Module, *, rank: int, alpha: float, targets: Sequence[str]) -> dict[str, nn.Module]:
    """Freeze the model and add a trained low-rank map to some of its linear modules: W x + alpha / rank * B A x.

    A (rank, in) starts at random and B (out, rank) at 0, so that at first nothing changes; both are in fp32. The
    modules, and so all sites, keep their paths; their own weights move to ``base_layer``. Hu et al. 2022,
    "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3.

    Args:
        model: changed in place.
        rank: of the added maps.
        alpha: their scale.
        targets: ends of the modules' paths, with ``*`` for any text: ``query_key_value`` of all layers,
            ``layers.2.mlp.dense_h_to_4h``, or of one of two towers ``text_model.*.q_proj``.

    Returns:
        The modules that now hold adapters, by path.

    Raises:
        ValueError: no targets are given, a target is not a linear module or is split by tensor parallelism, alpha is
            0, or the model has adapters already.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    model = unwrap(model)
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has LoRA adapters already; load the model without them")
    linear = {path: module for path, module in model.named_modules() if _is_linear(module)}
    known = f"{type(model).__name__}; it has {', '.join(sorted({path.rpartition('.')[2] for path in linear}))}"
    require_at_least(1, rank=rank)
    if not alpha:
        raise ValueError("LoRA: alpha=0 scales what adapters add to nothing; give another number")
    if not targets:
        raise ValueError(f"LoRA: no targets are given; choose linear modules of {known}")
    for target in targets:
        if not any(_ends_in(path, target) for path in linear):
            raise ValueError(f"LoRA: '{target}' is no linear module of {known}")
    paths = [path for path in linear if any(_ends_in(path, target) for target in targets)]
    if split := next((path for path in paths if hasattr(linear[path], WHOLE_ENDS)), None):
        raise ValueError(
            f"LoRA: tensor parallelism leaves each process a part of '{split}', to which no adapter can be added; use "
            "trainer=fsdp"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=paths,
        fan_in_fan_out=all(hasattr(linear[path], "nx") for path in paths),
    )
    with warnings.catch_warnings(), only_shapes([linear[path] for path in paths]):
        # PEFT asks transformers under an old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        inject_adapter_in_model(config, model)
    adapted = {path: model.get_submodule(path) for path in paths}
    for module in adapted.values():
        for name in ("lora_A", "lora_B"):
            setattr(module, name, FullPrecision(dict(getattr(module, name).float().items())))
    return adapted


def merge_lora(model: nn.Module) -> list[str]:
    """Add the adapters' maps to the weights that they adapt, and take the adapters out; return the modules' paths."""
    from peft.tuners.lora import LoraLayer

    found = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    for path, module in found.items():
        module.merge(safe_merge=True)  # type: ignore[operator]
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module.get_base_layer())
    return list(found)


def maps_of(adapted: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A and B of a module's adapter."""
    down, up = (next(cast(nn.Module, getattr(adapted, name)).children()) for name in ("lora_A", "lora_B"))
    return down, up


@contextmanager
def scaled(adapted: Iterable[nn.Module], strength: float) -> Iterator[None]:
    """Have the adapters of modules act, scaled by ``strength``; afterwards they are as they were."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in adapted if isinstance(module, LoraLayer)]
    off = [module for module in layers if module.disable_adapters]
    scaling = [dict(module.scaling) for module in layers]
    for module in layers:
        module.scaling.update({name: strength * value for name, value in module.scaling.items()})
    for module in off:
        module.enable_adapters(True)
    try:
        yield
    finally:
        for module in off:
            module.enable_adapters(False)
        for module, own in zip(layers, scaling, strict=True):
            module.scaling.update(own)


def _ends_in(path: str, target: str) -> bool:
    return fnmatchcase(f".{path}", f"*.{target}")


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D, of GPT-2, is a linear module that calls its sizes nx and nf.
    return isinstance(module, nn.Linear) or hasattr(module, "nx")
