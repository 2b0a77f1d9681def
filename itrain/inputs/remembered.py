"""remembered: a property that is worked out once and survives a cast of its owner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Value = TypeVar("Value")


class remembered(Generic[Value]):
    """A property that is worked out once, as ``functools.cached_property``, which Lightning resets when it casts."""

    def __init__(self, work_out: Callable[[Any], Value]) -> None:
        self.work_out, self.__doc__ = work_out, work_out.__doc__

    @overload
    def __get__(self, inputs: None, owner: type) -> remembered[Value]: ...

    @overload
    def __get__(self, inputs: object, owner: type) -> Value: ...

    def __get__(self, inputs: object, owner: type) -> Value | remembered[Value]:
        if inputs is None:
            return self
        # Without __set__, the value that is written here is found before this method.
        value = inputs.__dict__[self.work_out.__name__] = self.work_out(inputs)
        return value
