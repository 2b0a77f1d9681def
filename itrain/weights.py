"""Weights: the values of a model's state, wherever they lie, and what is looked at of them.

Tensor letters: R rows, C columns, K rows or columns that are looked at.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from itrain.architectures import unwrap
from itrain.devices import kept_weights
from itrain.quantized import is_part_of, packed_weights, values

LINES = 16
"""Rows and columns of a weight that are looked at, evenly spaced; more of small ones."""
VALUES = 1 << 16
"""A weight is looked at whole if it has no more values than this."""
SAMPLED = 256
"""Values of each weight that entered a fingerprint of itrain 0.1."""


class WeightError(ValueError):
    """A weight has no values that could be looked at."""


class Weight(NamedTuple):
    """A tensor of a model's state, by its name."""

    name: str
    value: Tensor


def fingerprint(model: nn.Module) -> str:
    """A short name for the model's weights: a hash of their shapes and of values of every row and column.

    The values enter in bfloat16, so that a model has one fingerprint whether loaded in fp32 or bf16. Neither weights'
    names nor the configuration enter, which releases of transformers rename: :mod:`itrain.identity` compares more.

    Raises:
        WeightError: a weight has no values here.
    """
    digest = hashlib.sha256()
    for _, value in weights(model):
        digest.update(f"{tuple(value.shape)} ".encode())
        for sample in _samples(value):
            digest.update(sample.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def earlier_fingerprints(model: nn.Module) -> set[str]:
    """What exports of itrain 0.1 may know the model by: hashes of some values, without or with the weights' names.

    The names enter under each of those that releases have given a head.
    """
    state = unwrap(model).state_dict()
    tensors = {name: weight for name, weight in state.items() if isinstance(weight, Tensor) and not weight.is_meta}
    if len(tensors) < len(state):
        return set()
    renamed = [
        sorted((re.sub("^(lm_head|embed_out)(?=[.])", head, name), weight) for name, weight in tensors.items())
        for head in ("lm_head", "embed_out")
    ]
    found = set()
    for pairs in ([("", weight) for weight in tensors.values()], *renamed):
        digest = hashlib.sha256()
        for name, weight in pairs:
            digest.update((f"{name} " if name else "").encode() + _sample(weight))
        found.add(digest.hexdigest()[:16])
    return found


def _sample(weight: Tensor) -> bytes:
    flat = weight.detach().flatten()
    stride = max(1, flat.numel() // SAMPLED)
    sample = flat[::stride][:SAMPLED].cpu().to(torch.bfloat16).contiguous().view(torch.uint8)
    return f"{tuple(weight.shape)} ".encode() + sample.numpy().tobytes()


def weights(model: nn.Module) -> Iterator[Weight]:
    """The values of the model's state, in its order: parameters and buffers, without masks and counters.

    Raises:
        WeightError: a weight has no values here.
    """
    model = unwrap(model)
    packed = packed_weights(model)
    for name, value in model.state_dict().items():
        if name in packed:
            yield Weight(name, values(packed[name]))
            continue
        if is_part_of(name, packed):
            continue
        # Packed weights of quantised modules are a pair of weight and bias.
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Tensor) and each.dtype not in (torch.bool, torch.int64):
                yield Weight(name, _readable(model, name, each))


def _readable(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """The weight as an ordinary tensor, wherever it lies."""
    if nn.parameter.is_lazy(value):
        raise WeightError(f"{type(model).__name__}: the weight '{name}' is not initialised; run the model once")
    value = value.detach()
    if value.is_meta:
        path, _, leaf = name.rpartition(".")
        kept = kept_weights(model.get_submodule(path))
        if kept is None:
            raise WeightError(
                f"{type(model).__name__}: the weight '{name}' has no values (it is on the meta device), so the model "
                "cannot be told from others; load it whole"
            )
        value = kept[leaf]
    if hasattr(value, "full_tensor"):  # sharded
        value = value.full_tensor()  # type: ignore[operator]
    if type(value) in (Tensor, nn.Parameter) and not value.is_quantized:
        return value
    try:
        return value.dequantize()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        kind = type(value).__name__
        raise WeightError(
            f"{type(model).__name__}: the weight '{name}' is a {kind}, which does not give its values: {error}"
        ) from error


def _samples(value: Shaped[Tensor, ...]) -> tuple[Shaped[Tensor, "K C"], Shaped[Tensor, "R K"]]:
    """Evenly spaced rows and columns, which together see every row and every column, in bfloat16."""
    rows, columns = _lines(value)
    return rows.to(torch.bfloat16), columns.to(torch.bfloat16)


def _lines(value: Shaped[Tensor, ...]) -> tuple[Shaped[Tensor, "K C"], Shaped[Tensor, "R K"]]:
    matrix = value.reshape(-1, value.shape[-1] if value.ndim else 1)
    rows, columns = matrix.shape
    lines = max(LINES, VALUES // max(1, columns))
    taken = matrix if rows <= lines else matrix[torch.arange(lines, device=matrix.device) * rows // lines]
    across = matrix[:, torch.arange(min(LINES, columns), device=matrix.device) * columns // min(LINES, columns)]
    return taken, across


def fits(value: Shaped[Tensor, ...]) -> tuple[bool, bool]:
    """Whether float16 and whether bfloat16 hold what is looked at of a weight without rounding."""
    rows, _ = _lines(value)
    half, brain = (torch.equal(rows.to(dtype).to(rows.dtype), rows) for dtype in (torch.float16, torch.bfloat16))
    return half, brain


def were_half(fitting: Iterable[tuple[bool, bool]]) -> bool:
    """Whether all weights of a model were rounded to float16 once: it holds them, and bfloat16 does not."""
    found = list(fitting)
    return all(half for half, _ in found) and not all(brain for _, brain in found)


def projected(value: Shaped[Tensor, ...]) -> list[float]:
    """Norm and projection of the rows that are looked at, and of the columns."""
    numbers = []
    for sample in _samples(value):
        exact = sample.double().nan_to_num(0, 1, -1)
        left, right = (_coefficients(size).to(exact.device) for size in exact.shape)
        numbers += [float(exact.norm()), float(left @ exact @ right)]
    return [float(f"{number:.6g}") for number in numbers]


@lru_cache(maxsize=64)
def _coefficients(size: int) -> Float[Tensor, " size"]:
    """Fixed numbers between 1/2 and 1 with signs, in no order that weights could have."""
    scattered = torch.arange(1, size + 1) * 2654435761 % (1 << 32)
    sign = 1 - 2 * (scattered >> 13 & 1)
    return sign * (0.5 + scattered.double() / (1 << 33))
