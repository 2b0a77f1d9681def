"""Shards: tensors that are divided among processes, gathered and divided again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is divided among processes, or laid out for that."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def has_shards(module: nn.Module) -> bool:
    """Whether weights of a module are divided among processes, also while they are gathered for a run."""
    gathered_at_times = any(own_class(each) is not type(each) for each in module.modules())
    return gathered_at_times or any(map(is_sharded, module.parameters()))


def is_first() -> bool:
    """Whether this is the first process of its group, or has no group."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def end_together() -> None:
    """Wait for all processes at the end of what they do together.

    One that leaves at once may close a connection from which a slower one has not read its last message yet.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    if distributed.get_backend() == "gloo":
        # The first process answers when it has heard all others, and needs nothing from them any more.
        distributed.monitored_barrier()
    else:
        distributed.barrier()


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, of which FSDP2 has made one of its own where it divides the module."""
    kind, *others = type(module).__mro__
    return others[1] if others[0].__name__ == "FSDPModule" else kind


def whole(tensor: Any) -> Any:
    """The tensor in one piece; all processes must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Any) -> Tensor:
    """What this process holds of the tensor, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def divided(tensor: Any, like: Tensor) -> Any:
    """The tensor, which every process has whole, divided as ``like`` is; each takes its part without asking others."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed: Any = like
    return distribute_tensor(tensor.to(placed.device), placed.device_mesh, placed.placements, src_data_rank=None)


def part_of(value: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> Tensor:
    """The part of a whole tensor that this process holds under a layout, in the same memory.

    The last dimension of the mesh divides first: a model is split within its blocks before it is sharded.
    """
    coordinates = mesh.get_coordinate() or ()
    for size, place, placement in reversed(list(zip(mesh.shape, coordinates, placements, strict=True))):
        if (dim := getattr(placement, "dim", None)) is not None:
            parts = value.chunk(size, dim)
            value = parts[place] if place < len(parts) else value.narrow(dim, 0, 0)
    return value


def held(tensor: Any) -> list[Tensor]:
    """The indices along each dimension that this process holds of a divided tensor; all are empty where one is."""
    shape, found = tensor.shape, []
    for dim, size in enumerate(shape):
        places = torch.arange(size).view([size if each == dim else 1 for each in range(len(shape))]).expand(shape)
        part = part_of(places, tensor.device_mesh, tensor.placements)
        found.append(
            part[tuple(slice(None) if each == dim else 0 for each in range(len(shape)))]
            if part.numel()
            else part.flatten()
        )
    return found


def add_over_shards(numbers: Tensor, tensor: Any) -> None:
    """Add numbers of the processes that hold different parts of a divided tensor, in place."""
    for dim, placement in enumerate(tensor.placements):
        if hasattr(placement, "dim"):
            distributed.all_reduce(numbers, group=tensor.device_mesh.get_group(dim))


def assembled(part: Tensor, like: Tensor) -> Tensor:
    """A tensor laid out as ``like`` is, of which this process holds the part."""
    from torch.distributed.tensor import DTensor

    placed: Any = like
    return DTensor.from_local(
        part, placed.device_mesh, placed.placements, run_check=False, shape=placed.shape, stride=placed.stride()
    )


def gathered(state: Any) -> Any:
    """A nested state with its tensors in one piece on the CPU, where this is the first process; empty elsewhere.

    All processes must ask for it, and only one tensor at a time is whole in the others.
    """
    found = _gathered(state, keep=is_first())
    return found if is_first() else {}


def _gathered(state: Any, *, keep: bool) -> Any:
    if isinstance(state, Tensor):
        value = whole(state)
        return value.detach().cpu() if keep else None
    if isinstance(state, Mapping):
        return {name: _gathered(value, keep=keep) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_gathered(value, keep=keep) for value in state)
    return state


@contextmanager
def only_shapes(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within, divided weights of the modules themselves are whole in shape and without values.

    Libraries that look at shapes would take a process's part for all.
    """
    held: list[tuple[nn.Module, str, Any, nn.Parameter]] = []
    for each in modules:
        for name, weight in each.named_parameters(recurse=False):
            if is_sharded(weight):
                shape = local(weight).new_empty(1).expand(weight.shape)
                held.append((each, name, weight, nn.Parameter(shape, requires_grad=weight.requires_grad)))
    for each, name, _, shape in held:
        each._parameters[name] = shape
    try:
        yield
    finally:
        for each, name, weight, shape in held:
            # Whoever was given the shape may have frozen it.
            each._parameters[name] = weight.requires_grad_(shape.requires_grad)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of weights that each process has whole; one that has none anywhere is left without.

    Gradients that were averaged already stay as they are, so that accumulated ones may be averaged with each part.
    """
    for alike in _alike(parameters):
        parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in alike]
        has = parts[0].new_tensor([each.grad is not None for each in alike])
        total = torch.cat([*(part.reshape(-1) for part in parts), has])
        distributed.all_reduce(total)
        *means, counts = total.split([*(part.numel() for part in parts), len(alike)])
        size = distributed.get_world_size()
        # Read only where this process lacks a gradient, since an accelerator is waited for.
        known = [True] * len(alike) if all(each.grad is not None for each in alike) else counts.bool().tolist()
        for each, mean, exists in zip(alike, means, known, strict=True):
            if exists:
                each.grad = (mean / size).view_as(each)


def _alike(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """The weights that can share a message."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for each in parameters:
        groups.setdefault((each.device, each.dtype), []).append(each)
    return groups.values()


def tied(value: Tensor, other: Tensor) -> Tensor:
    """The value, from which gradients of 0 flow to another tensor too."""
    return value + other.nan_to_num(0.0, 0.0, 0.0).sum() * 0


def equalise(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values of what each has whole."""
    with torch.no_grad():
        for each in tensors:
            distributed.broadcast(each.detach(), src=0)


def clip_norm(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Scale gradients of whole and divided weights together, so that their common norm is ``most`` at most."""
    gradients = [each.grad for each in parameters if each.grad is not None]
    if not gradients:
        return
    kinds = [[each for each in gradients if is_sharded(each) == sharded] for sharded in (False, True)]
    norms = [whole(torch.nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    total = torch.linalg.vector_norm(torch.stack(norms))
    # As torch does it: not a gradient is multiplied by more than 1.
    scale = (most / (total + 1e-6)).clamp(max=1.0)
    for each in gradients:
        local(each).mul_(scale.to(each.device))


def clip_value(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Bring each value of the gradients between -most and most."""
    for each in parameters:
        if each.grad is not None:
            local(each.grad).clamp_(-most, most)
