"""How many CPU threads torch uses for one operation."""

from __future__ import annotations

import os

import torch
from torch import nn

SMALL = 2_000_000
"""Weights below which a model's operations are too short to be shared among threads."""

MOST = 16
"""Threads for each of the CPU's; torch dies without a word where the system gives it no more of them."""


def choose_threads(model: nn.Module, asked: int | None = None) -> str:
    """Set torch's threads, and return the line that says how many and why.

    Threads wait for each other after every operation. In a small model that takes as long as the arithmetic, and many
    times as long where another process has one of their cores. So a small model gets one thread, unless the user says
    otherwise: by ``asked`` or by OMP_NUM_THREADS.

    Raises:
        ValueError: fewer than one thread is asked for, or more than the machine can have use for.
    """
    if asked is not None:
        most = MOST * (os.cpu_count() or 1)
        if not 1 <= asked <= most:
            raise ValueError(f"threads={asked}: give 1 to {most}, or null for a choice by the model's size")
        torch.set_num_threads(asked)
        return f"{asked} (threads={asked})"
    if os.environ.get("OMP_NUM_THREADS"):
        return f"{torch.get_num_threads()} (OMP_NUM_THREADS)"
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL:
        torch.set_num_threads(1)
        return "1 (small model; threads=<n> sets another number)"
    return f"{torch.get_num_threads()} (torch's choice; threads=<n> sets another number)"
