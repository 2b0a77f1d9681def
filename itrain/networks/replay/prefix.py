"""Caches of earlier tokens' keys and values, as transformers' models ask for them.

One notes them in an untouched run, the other has later runs read them. What models call of a cache is no public promise
of transformers, so replay is compared with plain hooks. Tensor letters: B batch, T tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

KeysValues = tuple[Float[Tensor, "batch heads tokens size"], Float[Tensor, "batch heads tokens size"]]

Shapes = tuple[tuple[int, int], tuple[int, int]]
"""Heads and their size, of a block's keys and of its values."""


@dataclass(eq=False)
class TokenCache:
    """What transformers' models ask of a cache that holds so many tokens.

    Windows are left to the masks: all layers hold all tokens.
    """

    is_compileable = False
    is_sliding = is_linear = is_dummy = (False,)

    length: int

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0


@dataclass(eq=False)
class Recorder(TokenCache):
    """An empty cache that notes the keys and values of the blocks from ``first`` on."""

    length: int = field(default=0, init=False)
    first: int
    noted: dict[int, KeysValues] = field(default_factory=dict, init=False)

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


@dataclass(eq=False)
class Before(TokenCache):
    """A cache of earlier tokens' keys and values by block, which a run reads and does not change.

    The run may have several rows for each of the examples, one batch after the other.
    """

    kept: Mapping[int, KeysValues]

    def of(self, block: int) -> BeforeBlock:
        """One block's part."""
        return BeforeBlock(self.length, self.kept[block])

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *rest: Any, **others: Any) -> KeysValues:
        return _joined(self.kept[layer_idx], keys, values)


@dataclass(eq=False)
class BeforeBlock(TokenCache):
    """The same for one block, whose place in the model it need not know."""

    kept: KeysValues

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **others: Any) -> KeysValues:
        return _joined(self.kept, keys, values)


@dataclass(eq=False)
class Unflat(Mapping[int, KeysValues]):
    """What :func:`flat` was given of each block, by its place in the model, made of the rows when it is asked for.

    Rows that are still on their way from host memory are then waited for, block by block.
    """

    shapes: Mapping[int, Shapes]
    rows: Sequence[Float[Tensor, "batch tokens features"]]

    def __getitem__(self, block: int) -> KeysValues:
        sizes = [heads * size for heads, size in self.shapes[block]]
        parts = self.rows[block - next(iter(self.shapes))].split(sizes, -1)
        keys, values = (
            part.unflatten(-1, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes[block], strict=True)
        )
        return keys, values

    def __iter__(self) -> Iterator[int]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _joined(kept: KeysValues, keys: Tensor, values: Tensor) -> KeysValues:
    """The keys and values that are kept, before those of the run's own tokens."""
    joined = []
    for earlier, new in zip(kept, (keys, values), strict=True):
        rows = new.unflatten(0, (-1, len(earlier)))
        joined.append(torch.cat([earlier.expand(len(rows), *earlier.shape), rows], 3).flatten(0, 1))
    return joined[0], joined[1]


def flat(keys_values: KeysValues) -> tuple[Float[Tensor, "batch tokens features"], Shapes]:
    """A block's keys and values side by side, and what tells them apart again."""
    rows = torch.cat([each.transpose(1, 2).flatten(2) for each in keys_values], 2)
    shapes = [(each.shape[1], each.shape[3]) for each in keys_values]
    return rows, (shapes[0], shapes[1])
