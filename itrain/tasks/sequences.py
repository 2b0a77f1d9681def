"""Sequences: the outputs of a task that answers with a sequence of classes, of which there are too many to list."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, overload

from itrain.bounds import require_at_least


class Sequences(Sequence[tuple[int, ...]]):
    """All sequences of a length over some classes, in the order of numbers with these digits; each is its own label.

    Nothing walks through them: whether a value is one of them, and what its label is, can be told from the value.

    Raises:
        ValueError: there are more than can be counted.
    """

    def __init__(self, *, classes: int, length: int) -> None:
        require_at_least(2, classes=classes)
        require_at_least(1, length=length)
        if classes**length > sys.maxsize:
            raise ValueError(f"{classes} classes at {length} places are more sequences than can be counted; take fewer")
        self.classes, self.length = classes, length

    def __len__(self) -> int:
        return self.classes**self.length

    @overload
    def __getitem__(self, place: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, place: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, place: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        number = range(len(self))[place]
        if isinstance(number, range):
            return [self[each] for each in number]
        return tuple(number // self.classes**digit % self.classes for digit in reversed(range(self.length)))

    def __contains__(self, value: object) -> bool:
        return (
            isinstance(value, tuple)
            and len(value) == self.length
            and all(isinstance(each, int) and 0 <= each < self.classes for each in value)
        )

    def index(self, value: Any, start: int = 0, stop: int = sys.maxsize) -> int:
        if value in self:
            place = sum(each * self.classes**digit for digit, each in enumerate(reversed(value)))
            if start <= place < stop:
                return place
        raise ValueError(f"{value!r} is none of the sequences of {self.length} of {self.classes} classes")


def listable(outputs: Sequence[Any], *, few: int = 16) -> Sequence[Any]:
    """The outputs of a task; of sequences, of which there are too many, the first and the last ones."""
    if isinstance(outputs, Sequences) and len(outputs) > 2 * few:
        return [*outputs[:few], *outputs[-few:]]
    return outputs
