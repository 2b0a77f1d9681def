"""One training step: its time, memory and arithmetic, for itrain, its peers and a hand-written floor.

    python scripts/bench_step.py --settings a b16 b64 c            # the steps
    python scripts/bench_step.py --settings a b16 b64 --profile    # where a replayed step's time goes
    python scripts/bench_step.py --rotation                        # the rotation's own cost, and how well it learns

A step is: look up a batch, loss, backward pass, Adam on a subspace of 16 dimensions. Before anything is timed, all ways
must agree in loss and gradient on the same subspace. Steps are timed in rounds, each way once a round in an order that
is shuffled anew; medians and [quartiles] are over rounds, and ratios are taken within a round. Where a GPU is found, a
7B-shaped Llama in bf16 is measured on it too, by the device's own clock. README.md beside this file says more.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from bench_common import (
    LEARNING_RATE,
    MIB,
    OPTIONAL,
    POSITIONS,
    SETTINGS,
    TOLERANCES,
    WAYS,
    Quartiles,
    Sample,
    Way,
    count_flops,
    import_pyvene,
    interleaved,
    machine,
    peak_bytes,
    ratios,
    require_equal,
    reset_peak,
)
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.profiler import ProfilerActivity, profile, record_function

from itrain.interventions.das import DAS, FullRotationDAS
from itrain.interventions.orthogonal import retract_after_steps
from itrain.results.markdown import markdown

BATCHES = 2
"""Batches of different pairs that steps are made on."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(_peak(options.settings[0], options.positions[0], options.peak)))
        return
    print(f"{machine()}\n")
    results: dict[str, Any] = {"machine": machine()}
    ways = _available(options.ways)
    if options.rotation:
        results["rotation"] = _rotations(options.rounds, options.settings)
    elif options.profile:
        results["profile"] = [_profile(name, each) for name in options.settings for each in options.positions]
    else:
        for name in options.settings:
            results[name] = _steps(name, options, ways)
        results["gpu"] = _gpu(options, ways)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings", nargs="+", choices=[each for each in SETTINGS if not each.startswith("gpu")], default=["a"]
    )
    parser.add_argument("--positions", nargs="+", choices=POSITIONS, default=list(POSITIONS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what is compared")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="peaks, a process each")
    parser.add_argument("--rotation", action="store_true", help="only the rotation's own cost")
    parser.add_argument("--profile", action="store_true", help="only where a replayed step's time goes")
    parser.add_argument("--output", type=Path, help="a JSON file for all that was measured")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _available(wanted: Sequence[str]) -> list[str]:
    missing = [name for name in wanted if name in OPTIONAL and find_spec(OPTIONAL[name]) is None]
    for name in missing:
        print(f"{name} is left out: pip install {OPTIONAL[name]}\n")
    return [name for name in wanted if name not in missing]


# ------------------------------------------------------------------------------------------------ steps


def _steps(name: str, options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Measure a setting and print its table."""
    setting = SETTINGS[name]
    built = build(name, names, options.positions)
    errors, flops = check(built)
    # Where the position makes no difference, one stands for all.
    first = options.positions[0]
    runs = {key: way.step for key, way in built.items() if not way.anywhere or way.position == first}
    samples = interleaved(runs, options.rounds)
    kept = {key: way.kept_bytes() for key, way in built.items()}
    del runs, built
    gc.collect()
    peaks = {key: _peak_of(name, key) for key in samples} if options.memory else {}
    result = {
        key: {
            "wall": [each.wall for each in values],
            "cpu": [each.cpu for each in values],
            "flop": flops[key],
            "errors": errors[key],
            "kept_bytes": kept[key],
            **peaks.get(key, {}),
        }
        for key, values in samples.items()
    }
    print(f"### {name}: {setting.config().model_type}, {setting.length} tokens, {setting.batch_size} pairs a step\n")
    print(_table(samples, flops, errors, kept, peaks, first), "\n", flush=True)
    return result


def build(name: str, ways: Sequence[str], positions: Sequence[str], device: str = "cpu") -> dict[str, Way]:
    """Each way at each position, ready to step, as ``way@position``."""
    setting = SETTINGS[name]
    model = setting.model(device)
    pairs = setting.pairs(BATCHES * setting.batch_size)
    built = {f"{way}@{position}": WAYS[way](model, setting, pairs, position) for position in positions for way in ways}
    for way in built.values():
        way.prepare()
    return built


def check(built: Mapping[str, Way]) -> tuple[dict[str, tuple[float, float]], dict[str, int]]:
    """Errors in loss and gradient against the first way at the same position, and the FLOPs that were counted.

    Raises:
        EqualityError: a way does not compute what the first one does.
    """
    errors, flops = {}, {}
    for position in dict.fromkeys(way.position for way in built.values()):
        probes = {}
        for key, way in built.items():
            if way.position == position:
                run = partial(way.probe, torch.arange(way.setting.batch_size))
                run()  # a way that wraps the model, as nnsight does, has replay fill its caches again
                probes[key], flops[key] = count_flops(run)
        dtype = next(iter(built.values())).setting.dtype
        errors.update(require_equal(probes, dtype))
    return errors, flops


def _table(
    samples: Mapping[str, Sequence[Sample]],
    flops: Mapping[str, int],
    errors: Mapping[str, tuple[float, float]],
    kept: Mapping[str, int],
    peaks: Mapping[str, Mapping[str, int]],
    first: str,
) -> str:
    def against(key: str, other: str) -> tuple[Quartiles, Quartiles] | None:
        if other not in samples:
            return None
        return ratios(samples[key], samples[other]), ratios(samples[key], samples[other], "cpu")

    rows = []
    for key, values in samples.items():
        position = key.partition("@")[2]
        peer, floor = against(key, f"pyvene@{first}"), against(key, f"floor@{position}")
        wall = Quartiles.of([each.wall for each in values])
        rows.append(
            [
                key,
                wall.text(1e3),
                f"{Quartiles.of([each.cpu for each in values]).median * 1e3:.1f}",
                "–" if peer is None else f"{1 / peer[0].median:.2f}x",  # noqa: RUF001
                "–" if peer is None else f"{1 / peer[1].median:.2f}x",  # noqa: RUF001
                "–" if floor is None else f"{floor[0].median:.2f}",  # noqa: RUF001
                f"{flops[key] / 1e9:.2f}",
                f"{peaks[key]['step_bytes'] / MIB:.0f}" if key in peaks else "–",  # noqa: RUF001
                f"{kept[key]:,}",
                "{:.0e} / {:.0e}".format(*errors[key]),
            ]
        )
    head = [
        "way@position",
        "ms a step",
        "CPU ms",
        f"faster than pyvene@{first}",
        "by CPU time",
        "/ floor",
        "GFLOP",
        "MiB a step",
        "bytes kept a pair",
        "error in loss / gradient",
    ]
    return markdown(head, rows)


def _peak_of(setting: str, key: str) -> dict[str, int]:
    """Memory, measured in a process of its own: what an allocator has once taken it seldom gives back."""
    way, _, position = key.partition("@")
    command = [sys.executable, __file__, "--settings", setting, "--positions", position, "--peak", way]
    done = subprocess.run([*command, "--threads", str(torch.get_num_threads())], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak(setting: str, position: str, way: str) -> dict[str, int]:
    """Resident bytes before steps, with all examples kept, and what two steps take at most on top of it."""
    (built,) = build(setting, [way], [position]).values()
    before = reset_peak()
    for _ in range(2):
        built.step()
    return {"resident_bytes": before, "step_bytes": peak_bytes() - before}


# ------------------------------------------------------------------------------------------------ profile


PARTS: Mapping[str, str] = {
    "attention": r"scaled_dot_product|flash_attention|^_?softmax",
    "loss": r"log_softmax|nll_loss|cross_entropy",
    "rotation: QR": r"linalg|triangular|tril|triu|geqrf|orgqr",
    "optimizer": r"Optimizer|_foreach|_fused|addcdiv|addcmul|lerp",
    "norms and activation functions": r"norm|rsqrt|pow|mean|gelu|silu|tanh",
    "look-up and joining of what is kept": r"index|cat$|gather|scatter|searchsorted|embedding|slice_backward",
    "matrix products": r"mm$|linear|matmul",
}
"""Operators by what they serve, first match first; the vocabulary head is told by its width."""
REST = "other operators: sums, copies, masks, views"
PYTHON = "Python and dispatch"


def _profile(name: str, position: str, steps: int = 20) -> dict[str, float]:
    """Print where a replayed step's time goes, in shares of its wall time."""
    (way,) = build(name, ["replay"], [position]).values()
    config: Any = way.setting.config()
    # Where a block is as wide as the vocabulary, the head counts among the other products.
    vocabulary = config.vocab_size if config.vocab_size != 4 * config.hidden_size else -1
    steps = steps if name == "a" else 5
    for _ in range(3):
        way.step()
    (plain,) = interleaved({"replay": way.step}, 5).values()
    wall = Quartiles.of([each.wall for each in plain]).median
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
        for _ in range(steps):
            with record_function("step"):
                way.step()
    events = profiler.events()
    total = sum(event.cpu_time_total for event in events if event.name == "step")  # type: ignore[union-attr]
    spent: dict[str, float] = defaultdict(float)
    for event in events:  # type: ignore[union-attr]
        spent[_part(event, vocabulary)] += event.self_cpu_time_total
    shares = {part: time / total for part, time in spent.items()}
    rows = [[part, f"{share:.0%}"] for part, share in sorted(shares.items(), key=lambda each: -each[1])]
    print(
        f"### {name}@{position}: {wall * 1e3:.2f} ms a step without the profiler, {total / steps / 1e3:.2f} with it\n"
    )
    print(markdown(["part of a replayed step", "share"], rows), "\n", flush=True)
    return {"wall": wall, **shares}


def _part(event: Any, vocabulary: int) -> str:
    name = event.name.removeprefix("aten::")
    if name == "step" or not event.name.startswith(("aten::", "Optimizer")):
        return PYTHON
    sizes = {size for shape in event.input_shapes or [] for size in shape if isinstance(size, int)}
    if vocabulary in sizes and re.search(PARTS["matrix products"], name):
        return "vocabulary head"
    return next((part for part, operators in PARTS.items() if re.search(operators, name)), REST)


# ------------------------------------------------------------------------------------------------ rotation


def _rotations(rounds: int, settings: Sequence[str]) -> dict[str, Any]:
    """What an interchange with its backward pass and Adam costs without a model, and what it learns."""
    cases = [("subspace", 24, 4, 10), ("rotation", 24, 4, 0)] if settings[0].startswith("toy") else CASES
    times, learned, results = [], [], {}
    for kind, size, rank, steps in cases:
        makers = {"pyvene": partial(_pyvenes, size, rank, kind), "itrain": partial(_ours, size, rank, kind)}
        rotated = {name: make() for name, make in makers.items()}
        samples = interleaved({name: _stepper(each) for name, each in rotated.items()}, min(rounds, 5))
        speeds = {clock: 1 / ratios(samples["itrain"], samples["pyvene"], clock).median for clock in ("cpu", "wall")}
        errors = {name: _error(matrix()) for name, (_, _, matrix, _) in rotated.items()}
        losses = {name: _losses(make, steps) for name, make in makers.items()} if steps else {}
        label = f"{kind}, d={size}, k={rank}"
        # Three digits: what is compared are times a thousand times apart.
        medians = [Quartiles.of([each.cpu for each in values]).text(1e3, 3) for values in samples.values()]
        marks = [f"{error:.0e}" for error in errors.values()]
        times.append([label, *medians, *(f"{speed:.0f}x" for speed in speeds.values()), *marks])
        for name, each in losses.items():
            learned.append(
                [label, name, steps, *(f"{loss:.3f}" for loss in each.values()), f"{min(each.values()):.3f}"]
            )
        results[label] = {"speed": speeds, "orthogonality": errors, "losses": losses}
    head = ["", "pyvene, CPU ms", "itrain, CPU ms", "faster", "by wall time", "error of R Rᵀ, pyvene", "itrain"]
    print("### The rotation alone: interchange of 32 rows, backward pass, Adam\n")
    print(markdown(head, times), "\n")
    print("### Loss on held-out rows after equal steps from the same rows, as a share of the first one\n")
    head = ["", "", "steps", *(f"rate {rate:g}" for rate in RATES), "best"]
    print(markdown(head, learned), "\n", flush=True)
    return results


CASES = (
    ("subspace", 768, 16, 200),
    ("subspace", 4096, 16, 0),
    ("rotation", 768, 16, 0),
    ("subspace", 128, 16, 200),
    ("rotation", 128, 16, 200),
)
"""Kind, features, rank, and steps of the comparison of losses: none where a step of pyvene's takes seconds."""
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
ROWS = 32


def _planted(size: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of activations and what an interchange in a hidden subspace makes of them; and the rows to start from."""
    generator = torch.Generator().manual_seed(0)
    base, source = torch.randn(2, 65 * ROWS, size, generator=generator)
    hidden = torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q
    start = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q.T.contiguous()
    return base, source, base + (source - base) @ hidden @ hidden.T, start


Rotated = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Callable[[], Tensor], tuple[Tensor, ...]]


def _ours(size: int, rank: int, kind: str) -> Rotated:
    *data, start = _planted(size, rank)
    if kind == "subspace":
        intervention: Any = DAS(size, rank=rank)
        holder, start = intervention.subspace, start[:rank]
    else:
        intervention = FullRotationDAS(size, blocks=rank)
        holder = intervention.rotation
    holder.rows = start
    return intervention, intervention, lambda: holder.rows, tuple(data)


def _pyvenes(size: int, rank: int, kind: str) -> Rotated:
    pyvene = import_pyvene()
    *data, start = _planted(size, rank)
    if kind == "subspace":
        intervention: Any = pyvene.LowRankRotatedSpaceIntervention(embed_dim=size, low_rank_dimension=rank)
        start = start[:rank]
    else:
        intervention = pyvene.RotatedSpaceIntervention(embed_dim=size)
        intervention.set_interchange_dim(rank)
    intervention.rotate_layer.weight = start.T.contiguous()
    return intervention, intervention, lambda: intervention.rotate_layer.weight.T, tuple(data)


def _stepper(rotated: Rotated, rate: float = LEARNING_RATE, steps: int | None = None) -> Callable[[], None]:
    """Steps of Adam over new rows each time; the rate falls to 0 if the number of steps is given, as in a fit."""
    module, interchange, _, (base, source, target) = rotated
    optimizer = torch.optim.Adam([each for each in module.parameters() if each.requires_grad], lr=rate)
    # As itrain's training does; pyvene's parameters are of another kind, and are left alone.
    retract_after_steps(optimizer, module)
    fall = None if steps is None else torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    # The last batch is held out.
    starts = itertools.cycle(range(0, len(base) - ROWS, ROWS))

    def step() -> None:
        rows = slice(start := next(starts), start + ROWS)
        optimizer.zero_grad(set_to_none=True)
        mse_loss(interchange(base[rows], source[rows]), target[rows]).backward()
        optimizer.step()
        if fall is not None:
            fall.step()

    return step


def _losses(make: Callable[[], Rotated], steps: int) -> dict[float, float]:
    """For each learning rate the loss on held-out rows after training, as a share of the one before."""
    found = {}
    for rate in RATES:
        rotated = make()
        before, step = _held_out_loss(rotated), _stepper(rotated, rate, steps)
        for _ in range(steps):
            step()
        found[rate] = _held_out_loss(rotated) / before
    return found


@torch.no_grad()
def _held_out_loss(rotated: Rotated) -> float:
    _, interchange, _, (base, source, target) = rotated
    return float(mse_loss(interchange(base[-ROWS:], source[-ROWS:]), target[-ROWS:]))


@torch.no_grad()
def _error(rows: Tensor) -> float:
    """How far R R^T is from 1."""
    return float((rows @ rows.T - torch.eye(len(rows))).abs().max())


# ------------------------------------------------------------------------------------------------ GPU


def _gpu(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The same on a GPU, if there is one: times by its own clock, and its own peak memory."""
    if not torch.cuda.is_available():
        print("no GPU: its section is left out")
        return {}
    setting = SETTINGS["gpu"]
    rows, results = [], {}
    print(
        f"### gpu: a Llama of 7B shape in {setting.dtype}, {setting.length} tokens, {setting.batch_size} pairs a step\n"
    )
    for position in options.positions:
        built = build("gpu", names, [position], device="cuda")
        errors, flops = check(built)
        times: dict[str, list[float]] = {key: [] for key in built}
        for _ in range(2 + options.rounds):
            for key, way in built.items():
                times[key].append(_device_time(way.step))
        for key, way in built.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            way.step()
            peak = torch.cuda.max_memory_allocated() - before
            # The first rounds compile and choose kernels.
            quartiles = Quartiles.of(times[key][2:])
            kept = way.kept_bytes()
            results[key] = {"seconds": quartiles, "peak": peak, "flop": flops[key], "kept_bytes": kept}
            shown = "{:.0e} / {:.0e}".format(*errors[key])
            rows.append(
                [key, quartiles.text(1e3, 2), f"{flops[key] / 1e9:.0f}", f"{peak / MIB:.0f}", f"{kept:,}", shown]
            )
        built.clear()
        gc.collect()
        torch.cuda.empty_cache()
    head = ["way@position", "device ms a step", "GFLOP", "MiB a step", "bytes kept a pair", "error in loss / gradient"]
    print(markdown(head, rows), f"\n\nTolerance in bf16: {TOLERANCES[setting.dtype]:g}\n", flush=True)
    return results


def _device_time(run: Callable[[], object]) -> float:
    """Seconds on the device between the start and the end of a run."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


if __name__ == "__main__":
    main()
