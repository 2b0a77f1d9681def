"""What `itrain plan` prints: what a run takes, whether that fits, and the flags that make it fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict

import torch
from omegaconf import DictConfig

from itrain.planning.estimate import Estimate

GIB = 1 << 30


def room(cfg: DictConfig) -> tuple[int, str] | None:
    """The bytes of memory of the device that the trainer takes, and which that is; None: no such device is here."""
    if cfg.trainer.get("accelerator") == "cpu" or (
        cfg.trainer.get("accelerator") == "auto" and not torch.cuda.is_available()
    ):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "memory of this machine"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    return None


def lines(found: Estimate, available: tuple[int, str] | None) -> Iterator[str]:
    """The report, a line each."""
    where = f"{found.devices} devices" if found.devices > 1 else "one device"
    shared = ", the weights divided among them" if found.sharded else ""
    rows = {
        "model": f"{found.model}, {found.parameters:,} parameters",
        "trained": f"{found.trained:,} parameters",
        "step": f"{found.batch} examples on each of {where}{shared}, up to {found.length} tokens",
        "replay": found.replay,
        "operations": f"{found.flops / 1e12:.3g} TFLOP a step, forward and backward",
        "memory": "bytes of tensors at once on one device",
        "  weights": _size(found.weights),
        **({"  gathered": _size(found.gathered)} if found.gathered else {}),
        "  cache": _size(found.caches),
        "  optimizer": _size(found.optimizer),
        "  in training": _size(found.step),
        "  in evaluation": _size(found.evaluation),
        "  peak": _size(found.peak),
    }
    if available is not None:
        size, what = available
        fits = "fits" if found.peak <= size else "does not fit"
        rows["fits"] = f"{fits}: {_size(found.peak)} of {_size(size)} ({what})"
        if found.peak > size:
            rows["remedy"] = "; ".join(remedies(found, size))
    else:
        rows["fits"] = "no such device is on this machine: compare the peak with its memory"
    rows |= {f"note {number}": text for number, text in enumerate(found.notes, 1)}
    width = max(map(len, rows))
    yield from (f"{name:{width}}  {text}" for name, text in rows.items())


def remedies(found: Estimate, size: int) -> Iterator[str]:
    """The flags that make less of what takes most."""
    if max(found.step, found.evaluation) > found.peak // 3:
        key = "data.eval_batch_size" if found.evaluation > found.step else "data.batch_size"
        yield f"a smaller {key}"
    if found.weights > found.peak // 3 and found.weights >= 4 * found.parameters:
        yield "model.dtype=bfloat16"
    if not found.sharded and found.weights > size // 2:
        yield "trainer=fsdp on several GPUs"
    if found.caches > found.peak // 3:
        yield "a smaller network.budget_gib"


def as_data(found: Estimate) -> dict[str, object]:
    """The estimate as plain data."""
    return {**asdict(found), "peak": found.peak}


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size * 1024 / GIB:.1f} MiB"
