"""A picture that a run left, as a notebook shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Picture:
    """A PNG in the folder of a run, which Jupyter draws where a cell ends in it.

    Args:
        path: the file; there is an SVG of the same name beside it.
    """

    path: Path

    def __repr__(self) -> str:
        return f"<picture {self.path}>"

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()
