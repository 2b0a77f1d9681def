"""Resumes a run of a transformers model in its middle: above some blocks, and after some tokens.

The model's own forward runs, so that masks, rotary embeddings and the head are its own. Only the blocks below are
replaced, and earlier tokens take part through their keys and values. Tensor letters: B batch, S sequence, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from itrain.architectures import blocks
from itrain.networks.hooks import modules_of

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


class Watched:
    """What a block put out: the residual stream, and of how many outputs it was the first (0: the only one)."""

    hidden: Float[Tensor, "batch sequence hidden"]
    outputs: int


@contextmanager
def watched(block: nn.Module | None) -> Iterator[Watched]:
    """Note what the block puts out, before any hook changes it."""
    seen = Watched()
    if block is None:
        yield seen
        return
    forward = block.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.outputs = 0 if isinstance(output, Tensor) else len(output)
        seen.hidden = (output if isinstance(output, Tensor) else output[0]).detach()
        return output

    with forwards({block: watch}):
        yield seen


@contextmanager
def resumed(below: Sequence[nn.Module], hidden: Float[Tensor, "batch sequence hidden"], outputs: int) -> Iterator[None]:
    """Have the last of the blocks put out ``hidden``, one of so many ``outputs``, and those before it do nothing."""

    def shaped(value: Any) -> Any:
        return (value, *[None] * (outputs - 1)) if outputs else value

    def passed(*args: Any, **kwargs: Any) -> Any:
        return shaped(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    # Not the list of blocks is cut: models choose masks and rotary embeddings by a block's place in it.
    with forwards({**dict.fromkeys(below[:-1], passed), below[-1]: lambda *args, **kwargs: shaped(hidden)}):
        yield


@contextmanager
def only_at(at: tuple[Int[Tensor, "rows 1"], Int[Tensor, "rows 1"]], module: nn.Module) -> Iterator[None]:
    """Have a module that treats each token by itself run on some tokens only; elsewhere it puts out 0."""
    forward, owner = unbound(module.forward)

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Some take the residual stream besides, and some see all examples' tokens in a row.
        if args or kwargs or hidden.ndim != 3 or hidden.shape[1] == 1:
            return forward(*owner, hidden, *args, **kwargs)
        output = forward(*owner, hidden[at])
        if not isinstance(output, Tensor):
            return forward(*owner, hidden)
        return output.new_zeros(*hidden.shape[:2], output.shape[-1]).index_put(at, output)

    with forwards({module: run}):
        yield


KeysValues = tuple[Float[Tensor, "batch heads tokens size"], Float[Tensor, "batch heads tokens size"]]

Shapes = tuple[tuple[int, int], tuple[int, int]]
"""Heads and their size, of a block's keys and of its values."""


class _KeyValues:
    """What transformers' models ask of a cache. Windows are left to the masks: all layers hold all tokens."""

    is_compileable = False
    is_sliding = is_linear = is_dummy = (False,)

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0


class Recorder(_KeyValues):
    """An empty cache that notes the keys and values of the blocks from ``first`` on."""

    def __init__(self, first: int) -> None:
        super().__init__(0)
        self.first, self.noted = first, dict[int, KeysValues]()

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *rest: Any, **others: Any) -> KeysValues:
        if layer_idx >= self.first:
            self.noted[layer_idx] = keys.detach(), values.detach()
        return keys, values

    def of_all(self, blocks: int) -> list[KeysValues]:
        """Those of all the blocks from ``first`` on.

        Raises:
            RuntimeError: the model has given some of them to no cache.
        """
        if missing := sorted({*range(self.first, blocks)} - {*self.noted}):
            raise RuntimeError(f"the model puts no keys and values of block {missing[0]} into its cache")
        return list(self.noted.values())


class Before(_KeyValues):
    """A cache of earlier tokens' keys and values by block, which a run reads and does not change.

    The run may have several rows for each of the examples, one batch after the other.
    """

    def __init__(self, length: int, kept: Mapping[int, KeysValues]) -> None:
        super().__init__(length)
        self.kept = kept

    def of(self, block: int) -> BeforeBlock:
        """One block's part."""
        return BeforeBlock(self.length, self.kept[block])

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *rest: Any, **others: Any) -> KeysValues:
        return self.of(layer_idx).update(keys, values)


class BeforeBlock(_KeyValues):
    """The same for one block, whose place in the model it need not know."""

    def __init__(self, length: int, kept: KeysValues) -> None:
        super().__init__(length)
        self.kept = kept

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **others: Any) -> KeysValues:
        earlier_keys, earlier_values = self.kept
        return _joined(earlier_keys, keys), _joined(earlier_values, values)


def _joined(earlier: Tensor, new: Tensor) -> Tensor:
    rows = new.unflatten(0, (-1, len(earlier)))
    return torch.cat([earlier.expand(len(rows), *earlier.shape), rows], 3).flatten(0, 1)


def flat(keys_values: KeysValues) -> tuple[Float[Tensor, "batch tokens features"], Shapes]:
    """A block's keys and values side by side, and what tells them apart again."""
    rows = torch.cat([each.transpose(1, 2).flatten(2) for each in keys_values], 2)
    shapes = [(each.shape[1], each.shape[3]) for each in keys_values]
    return rows, (shapes[0], shapes[1])


def unflat(rows: Float[Tensor, "batch tokens features"], shapes: Shapes) -> KeysValues:
    """What :func:`flat` was given."""
    parts = rows.split([heads * size for heads, size in shapes], -1)
    keys, values = (part.unflatten(-1, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True))
    return keys, values


def unbound(forward: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[object, ...]]:
    """A method's function and what it is of.

    A bound method is another object at each look-up, for which earlier releases of torch would compile anew.
    """
    return (forward.__func__, (forward.__self__,)) if isinstance(forward, MethodType) else (forward, ())


@contextmanager
def forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another forward, on the instance, where hooks and wrappers of the class still find it."""
    own = {module: module.__dict__["forward"] for module in replacements if "forward" in module.__dict__}
    for module, forward in replacements.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in replacements:
            if module in own:
                module.__dict__["forward"] = own[module]
            else:
                module.__dict__.pop("forward", None)


def _is_split(model: nn.Module) -> bool:
    return isinstance(model, nn.DataParallel) or any(hasattr(weight, "device_mesh") for weight in model.parameters())


def _hooks_of_others(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # transformers leaves hooks behind that collect hidden states when asked for them, and else do nothing.
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)
