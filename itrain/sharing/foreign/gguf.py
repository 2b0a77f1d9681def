"""GGUF, llama.cpp's files of keys and tensors, as far as control vectors need it.

A reader of strangers' files must end: no count in the file is believed beyond the bytes that are there.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.files import replacing
from itrain.sharing.foreign.parts import ForeignError
from itrain.trust import shown

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
STRING, ARRAY, UINT32 = 8, 9, 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The kinds of a key's value, as struct names them."""
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""The kinds of tensors that hold their values as they are; others are quantised."""
MOST = 10_000
"""Keys and tensors of a file; a model of 200 layers has a tenth of it."""


class Contents(NamedTuple):
    """Keys with single values, and vectors by name."""

    keys: Mapping[str, Any]
    vectors: Mapping[str, Float[Tensor, " size"]]


class _Cursor:
    """Reads values one after another, within the bytes that there are."""

    def __init__(self, data: mmap.mmap, place: str) -> None:
        self.data, self.place, self.at = data, place, 0

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise ForeignError(f"{self.place} is damaged: it ends before its header says")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self) -> int:
        """A number of keys or tensors."""
        found = self.number("Q")
        if found > MOST:
            raise ForeignError(f"{self.place} is damaged, or no control vector: it has {found} keys or tensors")
        return found

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise ForeignError(f"{self.place} is damaged: a name in it is no text") from error

    def value(self) -> Any:
        """A key's value; None for those of an array, which control vectors have not."""
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        inside, count = self.number("I"), self.number("Q")
        if kind != ARRAY or inside not in (STRING, *SCALARS):
            raise ForeignError(f"{self.place} is damaged: it has a key of the kind {kind}")
        if inside in SCALARS:
            self.take(count * struct.calcsize(f"<{SCALARS[inside]}"))
            return None
        for _ in range(count):
            self.take(self.number("Q"))
        return None


def read(file: Path) -> Contents:
    """The keys and the vectors of a file.

    Raises:
        ForeignError: it is damaged or no GGUF, or has a tensor that is no vector of floats.
    """
    place = f"'{file}'"
    if not file.is_file():
        raise ForeignError(f"there is no file {place}")
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise ForeignError(f"{place} is no GGUF file")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _contents(_Cursor(data, place))


def _contents(cursor: _Cursor) -> Contents:
    place = cursor.place
    cursor.take(len(MAGIC))
    if (version := cursor.number("I")) not in (2, VERSION):
        raise ForeignError(f"{place} is of GGUF's version {version}; itrain reads 2 and {VERSION}")
    tensors, keys = cursor.count(), cursor.count()
    found = {}
    for _ in range(keys):
        name = cursor.text()
        found[name] = cursor.value()
    listed = [_listed(cursor) for _ in range(tensors)]
    alignment = found.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ForeignError(f"{place} is damaged: its alignment is {shown(alignment)}")
    start = -(-cursor.at // alignment) * alignment
    vectors: dict[str, Tensor] = {}
    if sum(size * dtype.itemsize for _, size, dtype, _ in listed) > len(cursor.data):
        raise ForeignError(f"{place} is damaged: its tensors overlap, or are larger than the file")
    for name, size, dtype, offset in listed:
        if name in vectors:
            raise ForeignError(f"{place} has the tensor {shown(name)} twice")
        cursor.at = start + offset
        values = bytearray(cursor.take(size * dtype.itemsize))
        vectors[name] = torch.frombuffer(values, dtype=dtype).float() if values else torch.empty(0)
    return Contents(found, vectors)


def _listed(cursor: _Cursor) -> tuple[str, int, torch.dtype, int]:
    """A tensor's name, size, precision, and where it begins."""
    name, dimensions = cursor.text(), cursor.number("I")
    if dimensions != 1:
        raise ForeignError(f"{cursor.place}: {shown(name)} is no vector, as those of control vectors are")
    size, kind, offset = cursor.number("Q"), cursor.number("I"), cursor.number("Q")
    if kind not in FLOATS:
        raise ForeignError(f"{cursor.place}: {shown(name)} is quantised (kind {kind}); convert the file to F32")
    return name, size, FLOATS[kind], offset


def write(file: Path, keys: Mapping[str, str | int], vectors: Mapping[str, Float[Tensor, " size"]]) -> None:
    """Write keys and vectors, these in fp32."""
    header = MAGIC + struct.pack("<IQQ", VERSION, len(vectors), len(keys))
    for name, value in keys.items():
        kind, packed = (UINT32, struct.pack("<I", value)) if isinstance(value, int) else (STRING, _text(value))
        header += _text(name) + struct.pack("<I", kind) + packed
    data = b""
    for name, vector in vectors.items():
        header += _text(name) + struct.pack("<IQIQ", 1, len(vector), 0, len(data))
        data += _padded(vector.float().numpy().astype("<f4").tobytes())
    with replacing(file) as beside:
        beside.write_bytes(_padded(header) + data)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)
