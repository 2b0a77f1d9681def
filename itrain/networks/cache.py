"""What is kept of examples from step to step: rows of features for their tokens, found by the examples' keys.

Tensor letters: B batch, N examples kept, T tokens kept, P positions, F features.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

GIB = 1 << 30


class BudgetError(RuntimeError):
    """What is to be kept exceeds the budget."""


class Budget:
    """The room for what is kept: on the model's device, then in host memory, then in files.

    Args:
        gib: the most that may be taken of the device's memory, and as much again of the host's.
        folder: where memory-mapped files may lie once the memory is used up; None: nowhere. A file loses its name as
            soon as it is mapped, so that it goes when the process does and no other can take it for its own.
    """

    def __init__(self, gib: float, folder: Path | None = None) -> None:
        self.bytes, self.folder = int(gib * GIB), folder
        self._taken: dict[int, tuple[str, int]] = {}

    def place(self, size: int, device: torch.device, freed: Tensor | None = None) -> str | None:
        """Where so many bytes have room, if ``freed`` is given back for them: a device, "disk", or None for nowhere."""
        for place in dict.fromkeys((str(device), "cpu")):
            others = (each for pointer, each in self._taken.items() if freed is None or pointer != freed.data_ptr())
            if sum(taken for where, taken in others if where == place) + size <= self.bytes:
                return place
        return None if self.folder is None else "disk"

    def take(
        self, rows: int, features: int, dtype: torch.dtype, device: torch.device, freed: Tensor | None = None
    ) -> Float[Tensor, "rows features"]:
        """A tensor that counts until it is given back, on the device where it has room there.

        Raises:
            BudgetError: it has room nowhere.
        """
        size = rows * features * dtype.itemsize
        place = self.place(size, device, freed)
        if place is None:
            raise BudgetError(f"{in_words(size)} have no room in the budget of {in_words(self.bytes)}")
        if freed is not None:
            self.give_back(freed)
        if place == "disk":
            return self._file(rows * features, dtype).view(rows, features)
        try:
            # A tensor of inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                tensor = torch.empty(rows, features, dtype=dtype, device=place)
        except torch.OutOfMemoryError as error:
            raise BudgetError(f"{in_words(size)} are within the budget, but not free on {place}") from error
        self._taken[tensor.data_ptr()] = place, size
        return tensor

    def memory(self, device: torch.device) -> int:
        """The bytes of memory that may be taken."""
        return self.bytes * len({str(device), "cpu"})

    def room(self, device: torch.device) -> float:
        """All the bytes that may be taken."""
        return self.memory(device) if self.folder is None else float("inf")

    def give_back(self, tensor: Tensor) -> None:
        self._taken.pop(tensor.data_ptr(), None)

    def _file(self, numel: int, dtype: torch.dtype) -> Tensor:
        assert self.folder is not None, "the disk was chosen"
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="kept-", suffix=".bin", dir=self.folder)
        try:
            # Room that is not there must be an error now: a write to the mapping would kill the process.
            os.posix_fallocate(handle, 0, max(1, numel * dtype.itemsize))
            with torch.inference_mode(False):
                return torch.from_file(name, shared=True, size=numel, dtype=dtype)
        except OSError as error:
            raise BudgetError(f"the folder '{self.folder}' has no room: {error}") from error
        finally:
            os.close(handle)
            os.unlink(name)


class TokenStore:
    """Rows of features for the tokens of examples, one example's after the other's, without padding.

    Args:
        budget: gives the room.
        expected: tokens that are going to be kept, for which room is taken in one piece; more than that is no error.

    Features of several kinds lie in ``parts``, tensors of their own, so that some of them can be had without the rest.
    ``layout`` is for the user to note what they are.
    """

    def __init__(self, budget: Budget, expected: int = 0) -> None:
        self.budget, self.expected = budget, expected
        self.keys = torch.empty(0, dtype=torch.long)
        self.spans = torch.empty(0, 2, dtype=torch.long)
        self.parts: list[Float[Tensor, "tokens features"]] = []
        self.layout: Any = None
        self.used = 0

    def find(self, keys: Int[Tensor, " batch"]) -> Int[Tensor, "batch 2"] | None:
        """Each example's first row and how many it has; None unless all of them are kept."""
        at, known = self._find(keys)
        return self.spans[at] if bool(known.all()) else None

    def missing(self, keys: Int[Tensor, " batch"]) -> Int[Tensor, " examples"]:
        """The first of the batch's examples with each key that is not kept, in the order of the keys."""
        order = keys.argsort(stable=True)
        fresh = ~self._find(keys[order])[1]
        fresh[1:] &= keys[order].diff() != 0
        return order[fresh]

    def add(
        self,
        keys: Int[Tensor, " examples"],
        counts: Int[Tensor, " examples"],
        parts: Sequence[Float[Tensor, "tokens features"]],
    ) -> None:
        """Keep rows, ``counts`` of them for each of the examples, whose keys are new and in order.

        Raises:
            BudgetError: there is no room for them; the store has to be closed.
        """
        end = self.used + len(parts[0])
        if not self.parts or end > len(self.parts[0]):
            self._grow(end, parts)
        for kept, rows in zip(self.parts, parts, strict=True):
            kept[self.used : end] = rows
        at = torch.searchsorted(self.keys, keys) + torch.arange(len(keys))
        self.spans = _merged(self.spans, torch.stack([self.used + counts.cumsum(0) - counts, counts], 1), at)
        self.keys = _merged(self.keys, keys, at)
        self.used = end

    def gather(
        self,
        spans: Int[Tensor, "batch 2"],
        place: Int[Tensor, "batch positions"],
        device: torch.device,
        first_part: int = 0,
    ) -> list[Float[Tensor, "batch positions features"]]:
        """Rows at places counted within each example, on the device, of the parts from one on.

        A place outside of the example, which is padding, gets its nearest row, or any where it has none.
        """
        first, count = spans[:, :1], spans[:, 1:]
        index = (first + place.clamp(min=0).minimum(count - 1).clamp(min=0)).clamp(max=self.used - 1)
        flat = index.flatten().to(self.parts[0].device, non_blocking=True)
        rows = (part.index_select(0, flat.to(part.device)) for part in self.parts[first_part:])
        return [each.view(*place.shape, -1).to(device, non_blocking=True) for each in rows]

    @property
    def nbytes(self) -> int:
        """What is kept, without room that is not used yet."""
        return sum(self.used * part.shape[1] * part.element_size() for part in self.parts)

    def close(self) -> None:
        """Forget all, and give the room back."""
        for part in self.parts:
            self.budget.give_back(part)
        self.keys, self.spans, self.parts, self.used = self.keys[:0], self.spans[:0], [], 0

    def _find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        if not len(self.keys):
            return torch.zeros_like(keys), torch.zeros_like(keys, dtype=torch.bool)
        at = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return at, self.keys[at] == keys

    def _grow(self, needed: int, like: Sequence[Tensor]) -> None:
        for number, part in enumerate(like):
            old = self.parts[number] if number < len(self.parts) else None
            rows, row = max(needed, self.expected), part.shape[1] * part.element_size()
            if self.budget.place(2 * self.used * row, part.device, old) is not None:
                rows = max(rows, 2 * self.used)
            grown = self.budget.take(rows, part.shape[1], part.dtype, part.device, freed=old)
            if old is None:
                self.parts.append(grown)
            else:
                grown[: self.used] = old[: self.used]
                self.parts[number] = grown


def in_words(size: int) -> str:
    """So many bytes as a message says them."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size * 1024 / GIB:.2g} MiB"


def _merged(old: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """Both, with the new values at their places in the result."""
    others = torch.ones(len(old) + len(new), dtype=torch.bool)
    others[at] = False
    result = old.new_empty(len(others), *old.shape[1:])
    result[at], result[others] = new, old
    return result
