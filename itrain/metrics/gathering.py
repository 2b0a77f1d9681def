"""Counts among processes: which of them have different examples, whose states are added up."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

_holders: list[Any] = []
"""The group of processes that have different examples, where others have the same; see :func:`count_among`."""


def count_among(group: Any) -> None:
    """Add up counts among the processes of a group alone: those of other groups have the same examples."""
    _holders[:] = [group]


def gather_counts(value: Tensor, group: Any = None) -> list[Tensor]:
    """The values of the processes that have different examples, for ``dist_sync_fn`` of torchmetrics."""
    return gather_all_tensors(value, _holders[0] if group is None and _holders else group)
