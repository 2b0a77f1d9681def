"""Budget: how much memory and disk the caches may take, and where they lie."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.weights import without_values

GIB = 1 << 30
RESERVE = GIB
"""The bytes of a disk that caches leave for checkpoints and results, or a tenth of a smaller disk."""


class BudgetError(RuntimeError):
    """A cache exceeds its limit."""


class Budget:
    """The room for caches: on the model's device, then in host memory, then in files.

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
            raise BudgetError(f"a cache of {in_words(size)} exceeds the limit of {in_words(self.bytes)}")
        if freed is not None:
            self.give_back(freed)
        if place == "disk":
            return self._file(rows * features, dtype).view(rows, features)
        try:
            # A tensor of inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                tensor = torch.empty(rows, features, dtype=dtype, device=place)
        except torch.OutOfMemoryError as error:
            raise BudgetError(f"{place} has no memory left for a cache of {in_words(size)}") from error
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
        size = max(1, numel * dtype.itemsize)
        if without_values():  # such a file takes no room
            return self._mapped(Path(tempfile.gettempdir()), size, numel, dtype)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            disk = shutil.disk_usage(self.folder)
            reserve = min(RESERVE, disk.total // 10)
            if disk.free < size + reserve:
                raise BudgetError(
                    f"a cache of {in_words(size)} would leave less than {in_words(reserve)} of the disk of "
                    f"'{self.folder}' for checkpoint and results"
                )
            return self._mapped(self.folder, size, numel, dtype)
        except OSError as error:
            raise BudgetError(f"cannot write a cache to the folder '{self.folder}': {error}") from error

    def _mapped(self, folder: Path, size: int, numel: int, dtype: torch.dtype) -> Tensor:
        handle, name = tempfile.mkstemp(prefix="kept-", suffix=".bin", dir=folder)
        try:
            # Room that is not there must be an error now: a write to the mapping would kill the process.
            if not without_values():
                os.posix_fallocate(handle, 0, size)
            with torch.inference_mode(False):
                return torch.from_file(name, shared=True, size=numel, dtype=dtype)
        finally:
            os.close(handle)
            os.unlink(name)


def in_words(size: int) -> str:
    """So many bytes as a message says them."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size * 1024 / GIB:.2g} MiB"
