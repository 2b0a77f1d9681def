"""The parts of gpu_check.py. Each keeps what it has found as it goes, and raises if something is not as it must be."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from traceback import FrameSummary, extract_stack, print_exc
from typing import Any

import lightning
import torch
from bench_common import (
    MIB,
    OPTIONAL,
    SETTINGS,
    TOLERANCES,
    WAYS,
    Itrain,
    Quartiles,
    Setting,
    Way,
    count_flops,
    machine,
    relative_errors,
)
from bench_step import _available
from omegaconf import OmegaConf
from torch import Tensor
from transformers import GPT2Config

from itrain import config, experiment
from itrain.data import CounterfactualBatch
from itrain.interventions.das import DAS
from itrain.networks.base import Network
from itrain.networks.choose import make_network
from itrain.networks.lane import Edit
from itrain.networks.replay import ReplayNetwork
from itrain.results.markdown import markdown
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from itrain.training.cohort import Cohort

Keep = Callable[[str, Any], None]
"""Writes down a result under a name; those that begin with ``table`` are shown."""
ROOT = Path(__file__).resolve().parents[1]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ROUNDS = 15
STEPS = 20
"""Steps of a fit whose losses are compared with the CPU's."""
COMPILE = 45
"""Seconds after which no other model's blocks are compiled, so that the last compilation ends within the limit."""
PLUGINS = {"xdist": "xdist", "timeout": "pytest_timeout"}
"""Those of pytest that the suite uses, and their modules."""
LOSSES = 1e-3
"""How far these may be from the CPU's: sums have another order, and 20 steps of training enlarge the difference."""


class CheckError(AssertionError):
    """Something is not as it must be."""


# ------------------------------------------------------------------------------------------------ the card


def card(keep: Keep, *, toy: bool) -> None:
    """What the card is, and its two ceilings: bf16 products and copies."""
    size = 256 if toy else 8192
    left, right = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    rate = 2 * size**3 / _median(lambda: left @ right, 5)
    source = torch.empty((1 << 20) if toy else (1 << 31), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    speed = 2 * source.nbytes / _median(lambda: target.copy_(source), 5)
    keep("bf16_rate", rate)
    keep("copy_speed", speed)
    keep("table", f"{machine()}; bf16 products {rate / 1e12:.0f} TFLOP/s, copies {speed / 1e12:.2f} TB/s")
    print(f"{machine()}: {rate / 1e12:.0f} TFLOP/s, {speed / 1e12:.2f} TB/s", flush=True)


# ------------------------------------------------------------------------------------------------ steps


def steps(keep: Keep, *, toy: bool) -> None:
    """DAS by each way: time, memory and share of the card's bf16 rate, on equal losses and gradients."""
    ways = _available(["hooks", "replay", *OPTIONAL, "floor"])
    cases = [("gpu-1b", "middle"), ("gpu", "middle"), ("gpu", "last"), ("gpu-long", "middle")]
    cases = [("toy-llama", "middle")] if toy else cases
    _compare_ways(keep, cases, {name: WAYS[name] for name in ways} | {"replay, host": _on_host}, toy=toy)


def compile(keep: Keep, *, toy: bool) -> None:
    """The same with blocks compiled."""
    cases = [("toy-llama", "middle")] if toy else [("gpu-1b", "middle"), ("gpu", "middle")]
    ways = {"replay": WAYS["replay"], "compiled": partial(Itrain, replay=True, compile=not toy or GPU)}
    _compare_ways(keep, cases, ways, toy=toy, until=time.perf_counter() + COMPILE)


def _on_host(*args: Any) -> Way:
    """Replay with its caches in host memory, as where they exceed the limit of the device's."""
    way = Itrain(*args, replay=True)
    assert isinstance(way.network, ReplayNetwork)
    _keep_on_host(way.network)
    return way


def _keep_on_host(network: ReplayNetwork) -> None:
    network.budget.place = lambda size, device, freed=None: "cpu"  # type: ignore[method-assign]


def _compare_ways(
    keep: Keep,
    cases: Sequence[tuple[str, str]],
    ways: Mapping[str, Callable[..., Way]],
    *,
    toy: bool,
    until: float = float("inf"),
) -> None:
    rate = _rate(toy=toy)
    head = ["way", "ms a step", "hooks / it", "GFLOP", "of bf16 rate", "MiB a step", "KiB kept a pair", "error"]
    faults = []
    for name, position in cases:
        if time.perf_counter() > until:
            keep(f"table {name} {position}", f"{name}, {position}: no time was left")
            continue
        setting, since = SETTINGS[name], time.perf_counter()
        model = setting.model(DEVICE)
        pairs = setting.pairs(2 * setting.batch_size)
        print(f"{name}: model made in {time.perf_counter() - since:.1f} s", flush=True)
        built: dict[str, Way] = {}
        for way, make in ways.items():
            since = time.perf_counter()
            try:
                built[way] = make(model, setting, pairs, position)
                built[way].prepare()
            except Exception as error:
                built.pop(way, None)
                faults.append(f"{way} at {name}, {position}: {type(error).__name__}: {error}")
                print_exc()
            print(f"  {way}: ready in {time.perf_counter() - since:.1f} s", flush=True)
        if not built:
            continue
        rows = _measured(built, setting, rate, faults, rounds=1 if toy else ROUNDS)
        table = markdown(head, [[*each.values()] for each in rows])
        title = f"{setting.config().model_type}, {name}, token: {position}, {setting.length} tokens, "
        title += f"{setting.batch_size} pairs, {str(setting.dtype).removeprefix('torch.')}"
        keep(f"table {name} {position}", f"**{title}**\n\n{table}")
        print(f"{title}\n{table}", flush=True)
        built.clear()
        del model
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
    if faults:
        raise CheckError("; ".join(faults))


def _measured(
    built: Mapping[str, Way], setting: Setting, rate: float, faults: list[str], *, rounds: int
) -> list[dict[str, str]]:
    """A row of the table for each way."""
    errors, flops, probes = {}, {}, {}
    for name, way in built.items():
        run = partial(way.probe, torch.arange(setting.batch_size))
        run()  # a way that wraps the model, as nnsight does, has replay fill its caches again
        # Compiled code does not run where operations are counted, and has those of the same blocks as they are.
        compiles = isinstance(way, Itrain) and getattr(way.network, "compiles", False)
        probes[name], flops[name] = (run(), flops.get("replay", 0)) if compiles else count_flops(run)
        errors[name] = relative_errors(probes[name], next(iter(probes.values())))
        # A way that differs is told, and measured all the same.
        if not max(errors[name]) <= TOLERANCES[setting.dtype]:
            faults.append(f"{name} differs: loss by {errors[name][0]:.1e}, gradient by {errors[name][1]:.1e}")
            print(faults[-1], flush=True)
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(rounds):
        for name, way in built.items():
            times[name].append(_seconds(way.step, 2))
    rows = []
    hooks = Quartiles.of(times[next(iter(built))]).median
    for name, way in built.items():
        quartiles = Quartiles.of(times[name])
        rows.append(
            {
                "way": name,
                "ms": quartiles.text(1e3, 2),
                "faster": f"{hooks / quartiles.median:.2f}x",
                "GFLOP": f"{flops[name] / 1e9:.0f}",
                "share": f"{flops[name] / quartiles.median / rate:.0%}",
                "memory": f"{_peak(way.step) / MIB:.0f}",
                "kept": f"{way.kept_bytes() / 1024:.0f}",
                "error": "{:.0e} / {:.0e}".format(*errors[name]),
            }
        )
    return rows


# ------------------------------------------------------------------------------------------------ waits


def waits(keep: Keep, *, toy: bool) -> None:
    """Where a warm step of a fit waits for the card: nowhere, as far as it is for itrain to say."""
    rows, faults = [], []
    cases: dict[str, tuple[list[str], bool]] = {
        "das_gender": ([], False),
        # Of so few pairs all are kept when the watch begins. To write them to the host is waited for.
        "das_gender, caches on the host": (["data.train_pairs=128"], True),
        "das_gender, hooks": (["network.replay=off"], False),
        "boundless_das_price": ([], False),
        "iit_lora_gender": ([], False),
        "reft_style": ([], False),
        "probe_gender": ([], False),
    }
    for name, (overrides, host) in list(cases.items())[: 2 if toy else None]:
        with _parts(name.partition(",")[0], DEVICE, [*overrides, "trainer.max_steps=12"]) as parts:
            if host:
                _keep_on_host(parts.module.network)
            rows += _waits_of(name, parts.module, parts.data, parts.trainer, faults)
    with _parts("das_gender", DEVICE, ["trainer.max_steps=12"]) as parts:
        rows += _waits_of("cohort", _cohort(parts.module.network), parts.data, parts.trainer, faults)
    head = ["fit", "waits a step", "where itrain", "whose call"]
    keep("table", markdown(head, rows))
    print(markdown(head, rows), flush=True)
    if faults:
        raise CheckError("; ".join(faults))


def _waits_of(name: str, module: Any, data: Any, trainer: lightning.Trainer, faults: list[str]) -> list[list[str]]:
    watch = Waits()
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    try:
        with watch.watching():
            trainer.fit(module, datamodule=data)
    except Exception as error:
        faults.append(f"{name}: {type(error).__name__}: {error}")
        warnings.warn(faults[-1], stacklevel=1)
        return [[name, "failed", str(error), ""]]
    found = watch.found.most_common() or [(("nowhere", ""), 0)]
    own = [place for (place, other), _ in found if place.startswith("itrain/") and not other]
    if own and name != "das_gender, hooks":
        faults.append(f"{name} waits at {', '.join(own)}")
    return [[name, f"{count / watch.steps:.1f}", place, other] for (place, other), count in found]


CALLED = "called a synchronizing"
"""What torch says of each wait, and not of the mode in which it says so."""


class Waits(lightning.Callback):
    """Notes where steps 5 to 10 of a fit wait for the card, batches and optimizer included."""

    first, steps = 4, 6

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        """How often, by the innermost line of itrain and that of another package which it called."""

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if GPU and trainer.global_step in (self.first, self.first + self.steps):
            torch.cuda.set_sync_debug_mode("warn" if trainer.global_step == self.first else "default")

    @contextmanager
    def watching(self) -> Iterator[None]:
        def note(message: Any, *rest: Any, **others: Any) -> None:
            stack = extract_stack()[:-1]
            # Losses and weights are looked at between epochs, not in a step.
            if CALLED in str(message) and "_look_at_all" not in {each.name for each in stack}:
                self.found[_place(stack)] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", message=f".*{CALLED}.*")
            warnings.showwarning = note
            try:
                yield
            finally:
                if GPU:
                    torch.cuda.set_sync_debug_mode("default")


def _place(stack: Sequence[FrameSummary]) -> tuple[str, str]:
    """The innermost line of itrain, and that of another package which it called, if one did."""
    files = [(str(Path(each.filename)), each) for each in stack if "warnings.py" not in each.filename]
    own = [place for place, (file, _) in enumerate(files) if file.startswith(str(ROOT / "itrain"))]
    inner = [(file, each) for file, each in files[own[-1] + 1 if own else 0 :] if "/site-packages/torch/" not in file]
    inner = [(file, each) for file, each in inner if not file.startswith(str(ROOT))]
    at = files[own[-1]] if own else None
    here = "" if at is None else f"{Path(at[0]).relative_to(ROOT)}:{at[1].lineno} {at[1].line}"
    other = "" if not inner else f"{'/'.join(Path(inner[-1][0]).parts[-3:])}:{inner[-1][1].lineno} {inner[-1][1].line}"
    return here, other


def _cohort(network: Network) -> Cohort:
    """Members at several positions of a layer, which lie side by side."""
    members = {
        position: AlignmentSearch(
            network=network, sites=f"layer2.block_output@{position}", intervention=partial(DAS, rank=2)
        )
        for position in ("name", "last", "first")
    }
    return Cohort(members=members, optimizer=partial(torch.optim.Adam, lr=1e-2))


# ------------------------------------------------------------------------------------------------ patching


def patching(keep: Keep, *, toy: bool) -> None:
    """Patching of each block's output at the last token, and its first-order estimate, at GPT-2 XL's shape."""
    sizes = (
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 40}
        if toy
        else {"n_embd": 1600, "n_layer": 48, "n_head": 25}
    )
    setting = Setting(config=partial(GPT2Config, initializer_range=0.04, **sizes), layer=0, length=15, batch_size=16)
    batch = setting.pairs(setting.batch_size).to(DEVICE)
    model = setting.model(DEVICE)
    sites = [Site(layer=layer, component="block_output", position="last") for layer in range(sizes["n_layer"])]
    rows, effects = [], {}
    for replay in ("off", "on"):
        network = make_network(model, replay=replay)
        network.prepare([[site] for site in sites], [batch.base], list(batch.sources.values()))
        runs = {
            "patching": partial(_patched, network, batch, sites),
            "attribution": partial(_attributed, network, batch, sites),
        }
        for name, run in runs.items():
            run()
            effects[name, replay] = run()
            times = Quartiles.of([_seconds(run) for _ in range(1 if toy else 5)])
            rows.append([f"{name}, replay={replay}", times.text(1e3, 1)])
    keep("table", f"GPT-2 XL's shape, fp32, 16 pairs of 15 tokens\n\n{markdown(['way', 'ms'], rows)}")
    print(markdown(["way", "ms"], rows), flush=True)
    for name in ("patching", "attribution"):
        apart = float((effects[name, "on"] - effects[name, "off"]).norm() / effects[name, "off"].norm())
        print(f"{name}: replay differs from hooks by {apart:.1e}", flush=True)
        if not apart < 1e-3:
            raise CheckError(f"{name}: replay differs from hooks by {apart:.1e}")


def _difference(logits: Tensor, batch: CounterfactualBatch) -> Tensor:
    pairs = torch.stack([batch.counterfactual_label, batch.base_label], 1)
    return logits.gather(1, pairs).float() @ torch.tensor([1.0, -1.0], device=logits.device)


@torch.no_grad()
def _patched(network: Network, batch: CounterfactualBatch, sites: Sequence[Site]) -> Tensor:
    """The logit difference with each site's activation from the source, (sites, B)."""
    (source,) = batch.sources.values()
    with network.unchanged():
        taken = network.read(source, sites)

        def patch(site: Site) -> Edit:
            return lambda base: taken[site]

        return torch.stack([_difference(network.edit(batch.base, [(site, patch(site))]), batch) for site in sites])


def _attributed(network: Network, batch: CounterfactualBatch, sites: Sequence[Site]) -> Tensor:
    """(source - base) times the gradient of the logit difference at each site, (sites, B)."""
    (source,) = batch.sources.values()
    with network.unchanged():
        with torch.no_grad():
            theirs, ours = network.read(source, sites), network.read(batch.base, sites)
        shifts = {site: torch.zeros_like(ours[site], requires_grad=True) for site in sites}

        def shift(site: Site) -> Edit:
            return lambda base: base + shifts[site]

        logits = network.edit(batch.base, [(site, shift(site)) for site in sites])
    gradients = torch.autograd.grad(_difference(logits, batch).sum(), list(shifts.values()))
    return torch.stack(
        [((theirs[site] - ours[site]) * each).sum((1, 2)) for site, each in zip(sites, gradients, strict=True)]
    )


# ------------------------------------------------------------------------------------------------ results


def fits(keep: Keep, *, toy: bool) -> None:
    """The losses of the first steps of five recipes, on the card and on the CPU."""
    recipes = ["das_gender", "boundless_das_price", "iit_lora_gender", "reft_style", "probe_gender"]
    rows, faults = [], []
    for recipe in recipes[: 1 if toy else None]:
        count = 3 if toy else STEPS
        try:
            ours, theirs = (_losses(recipe, device, count) for device in (DEVICE, "cpu"))
            apart = float(((ours - theirs).abs() / theirs.abs()).max())
            rows.append([recipe, f"{theirs[0]:.4f}", f"{theirs[-1]:.4f}", f"{ours[-1]:.4f}", f"{apart:.1e}"])
            if not apart < LOSSES:
                faults.append(f"{recipe}: losses differ by {apart:.1e}")
        except Exception as error:
            faults.append(f"{recipe}: {type(error).__name__}: {error}")
            rows.append([recipe, "failed", "", "", ""])
            print_exc()
    head = ["recipe", "first loss", f"loss {STEPS}, CPU", f"loss {STEPS}, card", "largest difference"]
    keep("table", markdown(head, rows))
    print(markdown(head, rows), flush=True)
    if faults:
        raise CheckError("; ".join(faults))


def shards(keep: Keep, *, toy: bool) -> None:
    """The losses of the first steps under FSDP2 on one device, beside those of the whole model under hooks."""
    rows, faults = [], []
    count = 3 if toy else STEPS
    sharded = [f"trainer=fsdp{'' if GPU else '_cpu'}", "trainer.devices=1"]
    for recipe in ("das_gender", "iit_lora_gender")[: 1 if toy else None]:
        with _process_variables():
            whole, divided = (_losses(recipe, DEVICE, count, each) for each in (["network.replay=off"], sharded))
        apart = float(((divided - whole).abs() / whole.abs()).max())
        rows.append([recipe, f"{whole[-1]:.4f}", f"{divided[-1]:.4f}", f"{apart:.1e}"])
        if not apart < LOSSES:
            faults.append(f"{recipe}: losses under shards differ by {apart:.1e}")
    head = ["recipe", f"loss {STEPS}, whole", f"loss {STEPS}, shards", "largest difference"]
    keep("table", markdown(head, rows))
    print(markdown(head, rows), flush=True)
    if faults:
        raise CheckError("; ".join(faults))


@contextmanager
def _process_variables() -> Iterator[None]:
    """A group of processes, and the variables that name this one in it, end with the run that has formed it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class Losses(lightning.Callback):
    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
        self.found.append(outputs["loss"].detach().float())


def _losses(recipe: str, device: str, count: int, words: Sequence[str] = ()) -> Tensor:
    losses = Losses()
    with _parts(recipe, device, [f"trainer.max_steps={count}", *words]) as parts:
        parts.trainer.callbacks.append(losses)  # type: ignore[attr-defined]
        parts.trainer.fit(parts.module, datamodule=parts.data)
    return torch.stack(losses.found).cpu()


@contextmanager
def _parts(recipe: str, device: str, overrides: Sequence[str]) -> Iterator[Any]:
    """The parts of a recipe's run, without files, figures and validation."""
    quiet = {"enable_progress_bar": "false", "enable_checkpointing": "false", "limit_val_batches": 0}
    fixed = [f"trainer.{name}={value}" for name, value in (quiet | {"log_every_n_steps": 1000}).items()]
    cfg = config.request([f"recipe={recipe}", f"trainer={'gpu' if device == 'cuda' else 'cpu'}", *fixed, *overrides])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield experiment._build(cfg, Path(folder))


def sweep(keep: Keep, *, toy: bool) -> None:
    """A small grid on the card and on the CPU: the same table."""
    from itrain.sweeps.run import sweep as run_sweep

    small = ["sweep.layers=[2]", "sweep.positions=[name]", "sweep.methods=[das]"] if toy else ["sweep.layers=[1,3]"]
    small += ["trainer.max_epochs=2", "data.train_pairs=256", "data.test_pairs=64", "trainer.enable_progress_bar=false"]
    tables, times = {}, {}
    for device in dict.fromkeys((DEVICE, "cpu")):
        words = ["recipe=das_vs_probe_gender", f"trainer={'gpu' if device == 'cuda' else 'cpu'}", *small]
        with tempfile.TemporaryDirectory() as folder:
            since = time.perf_counter()
            cfg = config.request(words, sweeps=True)
            (Path(folder) / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
            tables[device] = run_sweep(cfg, Path(folder))
            times[device] = time.perf_counter() - since
    ours, theirs = tables[DEVICE], tables["cpu"]
    keys = [name for name in ("method", "layer", "position", "seed", "rank", "variable") if name in theirs]
    figures = [name for name in theirs.select_dtypes("number") if "iia" in name or "accuracy" in name]
    joined = theirs.merge(ours, on=keys, suffixes=("", "/card"))
    apart = max(float((joined[name] - joined[f"{name}/card"]).abs().max()) for name in figures)
    shown = ", ".join(f"{device} {seconds:.1f} s" for device, seconds in times.items())
    keep("table", f"{len(theirs)} rows, {len(figures)} figures, largest difference {apart:.3f}; {shown}")
    print(f"{len(theirs)} rows, {figures}: largest difference {apart:.3f}; {shown}", flush=True)
    if len(joined) != len(theirs) or not apart <= 0.1:
        raise CheckError(f"the card's table differs from the CPU's by {apart}, {len(joined)} of {len(theirs)} rows")


def tests(keep: Keep, *, toy: bool) -> None:
    """The tests marked gpu."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-rfE", "--tb=short"]
        command += ["--show-capture=no", "--basetemp", str(Path(folder) / "t")]
        command += [str(file) for file in sorted((ROOT / "tests").glob("test_gpu*.py"))]
        # Only the suite's own plugins: what others warn of would be an error.
        command += [word for name, module in PLUGINS.items() if find_spec(module) for word in ("-p", name)]
        # Most of a short test is Python, on one core.
        command += ["-n", "1" if toy else "8"] if find_spec("xdist") else []
        command += ["--collect-only"] if toy else []
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=135, env=environment)
    print(done.stdout[-20000:], done.stderr[-500:], flush=True)
    keep("table", "\n".join(done.stdout.strip().splitlines()[-1:]))
    if done.returncode:
        raise CheckError(f"pytest ended with {done.returncode}")


# ------------------------------------------------------------------------------------------------ measuring


def _rate(*, toy: bool) -> float:
    size = 256 if toy else 8192
    left, right = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    return 2 * size**3 / _median(lambda: left @ right, 5)


def _median(run: Callable[[], object], rounds: int) -> float:
    run()
    return Quartiles.of([_seconds(run) for _ in range(rounds)]).median


def _seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of a run, by the card's clock where there is one."""
    if not GPU:
        since = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - since) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def _peak(run: Callable[[], object]) -> int:
    """The most bytes that a run adds to the card's memory."""
    if not GPU:
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
