"""What `itrain plan` prints: what a run takes, whether that fits, and the flags that make it fit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

import torch
from omegaconf import DictConfig

from itrain.planning.estimate import Estimate, estimate
from itrain.signatures import ConfigError

GIB = 1 << 30


def planned(cfg: DictConfig, rates: Sequence[str] = ()) -> list[str]:
    """The report on a configuration.

    Args:
        cfg: a checked configuration.
        rates: TFLOP/s that a device reaches, as they were given.

    Raises:
        ConfigError: a rate is no number above 0, or there are several; or the run cannot be counted.
    """
    speed = _given(rates)
    found = estimate(cfg)
    return list(lines(found, room(cfg), speed or speed_of(cfg, found.dtype)))


def _given(rates: Sequence[str]) -> tuple[float, str] | None:
    if not rates:
        return None
    try:
        (rate,) = map(float, rates)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ConfigError(f"rate={' '.join(rates)}: give one number of TFLOP/s above 0")
    return rate * 1e12, "as given"


def room(cfg: DictConfig) -> tuple[int, str] | None:
    """The bytes of memory of the device that the trainer takes, and which that is; None: no such device is here."""
    if cfg.trainer.get("accelerator") == "cpu" or (
        cfg.trainer.get("accelerator") == "auto" and not torch.cuda.is_available()
    ):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "memory of this machine"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    return None


def lines(found: Estimate, available: tuple[int, str] | None, speed: tuple[float, str] | None) -> Iterator[str]:
    """The report, a line each.

    Args:
        found: what a run takes.
        available: see :func:`room`.
        speed: floating-point operations a second, and where that is from; None: it is not known.
    """
    where = f"each of {found.devices} devices" if found.devices > 1 else "one device"
    shared = ", the weights divided among them" if found.sharded else ""
    rows = {
        "model": f"{found.model}, {found.parameters:,} parameters",
        "trained": f"{found.trained:,} parameters",
        "step": f"{found.batch} examples on {where}{shared}, up to {found.length} tokens",
        "replay": found.replay,
        "operations": f"{found.flops / 1e12:.3g} TFLOP a step, forward and backward",
        "time": _time(found, speed),
        "memory": "tensors on one device at once, by what they are for",
        "  weights": _size(found.weights),
        **({"  gathered": _size(found.gathered)} if found.gathered else {}),
        "  cache": _size(found.caches),
        "  optimizer": _size(found.optimizer),
        "  a training step": _size(found.step),
        "  or evaluation": _size(found.evaluation),
        "  peak": _size(found.peak),
    }
    if available is not None:
        size, what = available
        fits = "yes" if found.peak <= size else "no"
        rows["fits"] = f"{fits}, {_size(found.peak)} of {_size(size)} ({what})"
        if found.peak > size:
            rows["remedy"] = "; ".join(remedies(found, size))
    else:
        rows["fits"] = "no such device is on this machine: compare the peak with its memory"
    rows |= {f"note {number}": text for number, text in enumerate(found.notes, 1)}
    width = max(map(len, rows))
    yield from (f"{name:{width}}  {text}" for name, text in rows.items())


def speed_of(cfg: DictConfig, dtype: torch.dtype) -> tuple[float, str] | None:
    """The speed of a matrix product on the device that the trainer takes; None: it is not on this machine."""
    if room(cfg) is None:
        return None
    here = torch.cuda.is_available() and cfg.trainer.get("accelerator") != "cpu"
    device, size = torch.device("cuda" if here else "cpu"), 8192 if here else 1024
    left = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        float((left @ left)[0, 0])
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times), "as a matrix product runs here"


def _time(found: Estimate, speed: tuple[float, str] | None) -> str:
    if speed is None:
        return "not known, since no such device is on this machine: give rate=<TFLOP/s that it reaches>"
    rate, why = speed
    seconds = found.flops / rate
    shown = f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
    return f"at least {shown} a step, at {rate / 1e12:.3g} TFLOP/s ({why}); small models take far longer"


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


def _size(size: int) -> str:
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size * 1024 / GIB:.1f} MiB" if size * 20480 >= GIB else f"{size * 1024**2 / GIB:.1f} KiB"
