"""Checks of numbers that constructors are given; the messages begin with the argument's name."""

from __future__ import annotations

import inspect
from collections.abc import Collection


def require_at_least(least: float, **values: float | None) -> None:
    """Refuse numbers below a bound, and NaN; None is no number.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name}={value}: give {least} or more")


def require_share(**values: float) -> None:
    """Refuse numbers that are no share of a whole.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: give a share, from 0 to 1")


def require_some(**values: Collection[object] | None) -> None:
    """Refuse lists that hold nothing; None stands for a default.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in values.items():
        if value is not None and not value:
            raise ValueError(f"{name} is empty; name some, or leave it out")


def refuse_idle(made: object, why: str, **values: object) -> None:
    """Refuse settings that nothing reads as others are given, unless they are the constructor's own defaults.

    Args:
        made: what is constructed.
        why: the end of a sentence: because of what, and what to add.
        values: the settings.

    Raises:
        ValueError: naming the argument.
    """
    parameters = inspect.signature(type(made)).parameters
    for name, value in values.items():
        if name in parameters and value != parameters[name].default:
            raise ValueError(f"{name}={value} has no effect {why}, or leave it out")
