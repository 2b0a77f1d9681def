"""Weights: the values of a model's state, wherever they lie, and what is looked at of them.

Tensor letters: R rows, C columns, K rows or columns that are looked at, N indices, M of them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from itrain.architectures import unwrap
from itrain.devices import kept_weights
from itrain.quantized import is_part_of, packed_weights, values
from itrain.shards import add_over_shards, held, is_sharded, local, own_class, whole

LINES = 16
"""Rows and columns of a weight that are looked at, evenly spaced; more of small ones."""
VALUES = 1 << 16
"""A weight is looked at whole if it has no more values than this."""
SAMPLED = 256
"""Values of each weight that entered a fingerprint of itrain 0.1."""
HALVES = (torch.float16, torch.bfloat16)


class WeightError(ValueError):
    """A weight has no values that could be looked at."""


class Lines(NamedTuple):
    """What is looked at of a weight: evenly spaced rows and columns, which together see every row and every column."""

    rows: Shaped[Tensor, "K C"]
    columns: Shaped[Tensor, "R K"]


class Weight(NamedTuple):
    """A tensor of a model's state, by its name. It may be divided among processes."""

    name: str
    value: Tensor

    def lines(self, length: int | None = None) -> Lines:
        """The lines of the weight, or of as much as ``length`` of its first dimension.

        Of a divided weight, all processes must ask for them. Each gives what it holds of the lines, and none has more
        of the others' values.
        """
        shape = (*self.value.shape,) if length is None else (length, *self.value.shape[1:])
        columns = shape[-1] if shape else 1
        rows = math.prod(shape) // max(1, columns)
        taken, across = max(LINES, VALUES // max(1, columns)), min(LINES, columns)
        picked = torch.arange(min(rows, taken)) * rows // min(rows, taken) if rows > taken else torch.arange(rows)
        crossed = torch.arange(across) * columns // across
        if is_sharded(self.value):
            return _lines_of_shards(self.value, picked, crossed, rows)
        matrix = self.value[: len(self.value) if length is None else length] if shape else self.value
        matrix = matrix.reshape(-1, columns)
        return Lines(
            matrix if rows <= taken else matrix[picked.to(matrix.device)], matrix[:, crossed.to(matrix.device)]
        )


def _lines_of_shards(
    value: Shaped[Tensor, ...], picked: Int64[Tensor, " K"], crossed: Int64[Tensor, " K2"], rows: int
) -> Lines:
    """The lines, put together from what each process holds of them."""
    *leading, columns = held(value) or [torch.arange(1)]
    own = torch.arange(1)
    for size, places in zip(value.shape, leading, strict=False):
        own = (own[:, None] * size + places).flatten()
    part = local(value).detach()
    part = part.reshape(len(own), len(columns))
    found = part.new_zeros(len(picked) * value.shape[-1] + rows * len(crossed))
    taken, across = found.split([len(picked) * value.shape[-1], rows * len(crossed)])
    here, there = _matches(own, picked)
    taken.view(len(picked), -1)[there[:, None], columns] = part[here]
    own_rows, own_columns = own[own < rows], _matches(columns, crossed)
    across.view(rows, -1)[own_rows[:, None], own_columns[1]] = part[: len(own_rows), own_columns[0]]
    # As bytes, of which each is other than zero in one process: a sum of numbers would lose the sign of zero.
    add_over_shards(found.view(torch.uint8), value)
    return Lines(taken.view(len(picked), -1), across.view(rows, -1))


def _matches(own: Int64[Tensor, " N"], wanted: Int64[Tensor, " K"]) -> tuple[Int64[Tensor, " M"], Int64[Tensor, " M"]]:
    """Where wanted indices are among one's own, and which of the wanted these are; both are sorted."""
    if not len(own):
        return own, own
    places = torch.searchsorted(own, wanted).clamp(max=len(own) - 1)
    present = (own[places] == wanted).nonzero().flatten()
    return places[present], present


class Digest:
    """The fingerprint of weights that are added one after another, or of what serves a model."""

    def __init__(self, served: Any = None) -> None:
        self._hash = hashlib.sha256()
        if served is not None:
            self._hash.update(f"served {served.repo_id} {served.revision}".encode())

    def add(self, weight: Weight, lines: Lines) -> None:
        self._hash.update(f"{tuple(weight.value.shape)} ".encode())
        for sample in lines:
            bits = sample.to(torch.bfloat16).contiguous().view(torch.uint8)
            self._hash.update(bits.cpu().numpy().tobytes())

    @property
    def name(self) -> str:
        return self._hash.hexdigest()[:16]


def served_by(model: nn.Module) -> Any:
    """What runs a model whose weights are on a server; None: it runs here.

    Its ``repo_id`` and ``revision`` say which model of the hub it is.
    """
    return unwrap(model).__dict__.get("served")


_shapes_alone = False


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Within it, models have shapes and no values, as where a run is planned: each value that is looked at counts 0."""
    global _shapes_alone
    before, _shapes_alone = _shapes_alone, True
    try:
        yield
    finally:
        _shapes_alone = before


def without_values() -> bool:
    """Whether models have shapes alone just now."""
    return _shapes_alone


def fingerprint(model: nn.Module) -> str:
    """A short name for the model's weights: a hash of their shapes and of values of every row and column.

    The values enter in bfloat16, so that a model has one fingerprint whether loaded in fp32 or bf16. Neither weights'
    names nor the configuration enter, which releases of transformers rename: :mod:`itrain.identity` compares more.
    All processes that share a divided model must ask for it. Of a model on a server, it is a hash of its name and
    revision.

    Raises:
        WeightError: a weight has no values here.
    """
    served = served_by(model)
    digest = Digest(served)
    for weight in () if served is not None else weights(model):
        digest.add(weight, weight.lines())
    return digest.name


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
    flat = whole(weight).detach().flatten()
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
    with torch.inference_mode(False):  # torchao's tensors cannot be detached in it
        state = model.state_dict()
    for name, value in state.items():
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
    """The weight as an ordinary tensor, wherever it lies, or as a divided one."""
    if nn.parameter.is_lazy(value):
        raise WeightError(f"{own_class(model).__name__}: the weight '{name}' is not initialised; run the model once")
    if without_values():
        return torch.zeros((), dtype=value.dtype).expand(value.shape)
    with torch.inference_mode(False):
        value = value.detach()
    if value.is_meta:
        path, _, leaf = name.rpartition(".")
        kept = kept_weights(model.get_submodule(path))
        if kept is None:
            raise WeightError(
                f"{own_class(model).__name__}: the weight '{name}' has no values (it is on the meta device), so the "
                "model cannot be told from others; load it whole"
            )
        value = kept[leaf]
    if is_sharded(value):
        return value
    if type(value) in (Tensor, nn.Parameter) and not value.is_quantized:
        return value
    try:
        return value.dequantize()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        kind = type(value).__name__
        raise WeightError(
            f"{own_class(model).__name__}: the weight '{name}' is a {kind}, which does not give its values: {error}"
        ) from error


def fits(lines: Lines) -> tuple[bool, bool]:
    """Whether float16 and whether bfloat16 hold what is looked at of a weight without rounding."""
    half, brain = (torch.equal(lines.rows.to(each).to(lines.rows.dtype), lines.rows) for each in HALVES)
    return half, brain


def were_half(fitting: Iterable[tuple[bool, bool]]) -> bool:
    """Whether all weights of a model were rounded to float16 once: it holds them, and bfloat16 does not."""
    found = list(fitting)
    return all(half for half, _ in found) and not all(brain for _, brain in found)


def projected(lines: Lines) -> list[float]:
    """Norm and projection of the rows that are looked at, and of the columns."""
    numbers = []
    for sample in lines:
        exact = sample.to(torch.bfloat16).double().nan_to_num(0, 1, -1)
        left, right = (_coefficients(size).to(exact.device) for size in exact.shape)
        numbers += [float(exact.norm()), float(left @ exact @ right)]
    return [float(f"{number:.6g}") for number in numbers]


@lru_cache(maxsize=64)
def _coefficients(size: int) -> Float[Tensor, " size"]:
    """Fixed numbers between 1/2 and 1 with signs, in no order that weights could have."""
    scattered = torch.arange(1, size + 1) * 2654435761 % (1 << 32)
    sign = 1 - 2 * (scattered >> 13 & 1)
    return sign * (0.5 + scattered.double() / (1 << 33))
