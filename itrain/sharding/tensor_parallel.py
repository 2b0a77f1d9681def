"""Tensor parallelism: splits the weights of each block among processes, by the plan that a transformers model ships."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from itrain.architectures import WHOLE_ENDS, unwrap
from itrain.models import ModelError
from itrain.shards import own_class

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

REMEDY = "use trainer=fsdp, which divides any model"
GIVES_WHOLE = {"rowwise", "rowwise_split_input", "colwise_gather_output"}
"""Styles of modules that give every process the whole output."""


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the weights of each block among the processes of a mesh of one dimension, in place.

    Each process computes some of the heads and some of the neurons. Blocks, attentions and MLPs take and give whole
    activations; what lies outside of the blocks is whole in each process. Sites of which a process has but a part
    cannot be located afterwards.

    Raises:
        ModelError: the model has no plan, or one that cannot be carried out.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    model, styles = unwrap(model), _styles()
    plan = _plan(model, styles)
    _require_divisible(model, plan, mesh.size())
    for path, style in plan.items():
        parallelize_module(model.get_submodule(path), mesh, styles[style])
    # Outer modules first, since those inside have the last word.
    for parent in sorted({path.rpartition(".")[0] for path in plan}, key=len):
        for path, module in model.get_submodule(parent).named_modules(prefix=parent):
            ends = {"output"} if plan.get(path) in GIVES_WHOLE else {"input", "output"} if path == parent else ()
            setattr(module, WHOLE_ENDS, frozenset(ends))


def _styles() -> Mapping[str, ParallelStyle]:
    """What transformers' names of styles stand for."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    return {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(),
        "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
        "rowwise_split_input": RowwiseParallel(input_layouts=Replicate()),
        # A norm of each head: its weights are whole in each process, which has some of the heads.
        "replicated_with_grad_allreduce": SequenceParallel(sequence_dim=2, use_local_output=True),
    }


def _plan(model: nn.Module, styles: Mapping[str, ParallelStyle]) -> dict[str, str]:
    """The styles of the modules within blocks, by their paths.

    Raises:
        ModelError: there is none, or one of an unknown kind.
    """
    kind, rules = own_class(model).__name__, getattr(model, "tp_plan", None) or {}
    rules = {pattern: style for pattern, style in rules.items() if ".*." in pattern}
    if not rules:
        raise ModelError(f"{kind} ships no plan for tensor parallelism; {REMEDY}")
    if unknown := next((pattern for pattern, style in rules.items() if style not in styles), None):
        raise ModelError(
            f"{kind}: its plan for tensor parallelism splits '{unknown}' as '{rules[unknown]}', which is not among "
            f"{', '.join(styles)}; {REMEDY}"
        )
    patterns = {path: re.sub(r"\d+", "*", path) for path, _ in model.named_modules()}
    return {path: rules[pattern] for path, pattern in patterns.items() if pattern in rules}


def _require_divisible(model: nn.Module, plan: Mapping[str, str], size: int) -> None:
    """Refuse what would give processes heads or features of different numbers.

    Raises:
        ModelError: naming what cannot be divided.
    """
    config: Any = model.config
    config = config.get_text_config()
    counts = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    for path, style in plan.items():
        module: Any = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            counts[path] = module.out_features if style.startswith("colwise") else module.in_features
    for name, count in counts.items():
        if count is not None and count % size:
            raise ModelError(
                f"{own_class(model).__name__}: {name}={count} cannot be divided by tensor_parallel_size={size}; give "
                f"one that divides it, or {REMEDY}"
            )
