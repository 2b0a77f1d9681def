"""Whole fits: itrain with Lightning, its caches and their filling, against a bare loop and against pyvene's own loop.

    python scripts/bench_fit.py --settings a b16 --parts lightning
    python scripts/bench_fit.py --settings a b64 --parts pyvene memory

The part ``lightning`` measures what the Trainer, metrics, logging and checkpoints add to a bare loop over the same
steps. ``pyvene`` measures fits of 1, 10 and 100 epochs against pyvene's training loop over the same pairs; fits are run
for so many epochs as --measured-epochs says, and pyvene's loop for so many steps as --peer-steps says, and both are
extrapolated from there, since all epochs after the second are alike. ``memory`` compares the peaks of fits with replay
and with hooks. Where a GPU is found, ``pyvene`` and ``memory`` are measured there too, on a 7B-shaped Llama in bf16.
README.md beside this file says more.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
import torch
from bench_common import (
    LEARNING_RATE,
    MIB,
    POSITIONS,
    SETTINGS,
    Pyvene,
    Quartiles,
    alignment_search,
    machine,
    peak_bytes,
    require_equal,
    reset_peak,
    sampled,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from itrain.data import CounterfactualBatch
from itrain.data.loading import BatchSampler
from itrain.data.splits import SplitDataset
from itrain.interventions.orthogonal import retract_after_steps
from itrain.metrics import RULES, is_right
from itrain.networks.choose import make_network
from itrain.networks.replay import ReplayNetwork
from itrain.results.markdown import markdown
from itrain.training.alignment import AlignmentSearch
from itrain.training.optimization import with_linear_schedule

TRAINER = Path(__file__).parents[1] / "configs" / "trainer" / "default.yaml"
PARTS = ("lightning", "pyvene", "memory")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
EPOCHS = (1, 10, 100)
PAIRS = {"toy": 8, "a": 4096, "b16": 256, "b64": 256, "c": 64, "gpu": 256}
OVERHEAD_EPOCHS = {"toy": 2, "a": 10, "b16": 10}
VALIDATION_PAIRS = 128


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    _quiet()
    if options.peak:
        print(json.dumps(_peak(options.settings[0], options.positions[0], options.peak)))
        return
    print(f"{machine()}\n")
    results: dict[str, Any] = {"machine": machine()}
    settings = [*options.settings, *(["gpu"] if torch.cuda.is_available() else [])]
    if "lightning" in options.parts:
        results["lightning"] = _lightning_part(options)
    if "pyvene" in options.parts:
        if find_spec("pyvene") is None:
            print("pyvene is left out: pip install pyvene\n")
        else:
            results["pyvene"] = _pyvene_part(settings, options)
    if "memory" in options.parts:
        results["memory"] = _memory_part(settings, options)
    if not torch.cuda.is_available():
        print("no GPU: its section is left out")
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=[each for each in PAIRS if each != "gpu"], default=["a"])
    parser.add_argument("--positions", nargs="+", choices=POSITIONS, default=list(POSITIONS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3, help="fits of each kind in the part 'lightning'")
    parser.add_argument("--measured-epochs", type=int, default=10, help="epochs that are run before extrapolating")
    parser.add_argument("--peer-steps", type=int, default=4, help="steps of pyvene's loop before extrapolating")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for one thread on a busy machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="a JSON file for all that was measured")
    parser.add_argument("--peak", choices=["replay", "hooks"], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


# ------------------------------------------------------------------------------------------------ fits


class Fit:
    """A search over random pairs, and the loops that train it."""

    def __init__(self, name: str, position: str, *, replay: bool, epochs: int, pairs: int | None = None) -> None:
        setting = SETTINGS[name]
        self.name, self.setting, self.epochs = name, setting, epochs
        self.device = "cuda" if name == "gpu" else "cpu"
        pairs = pairs or PAIRS[name]
        self.model = setting.model(self.device)
        everything = setting.pairs(pairs + VALIDATION_PAIRS)
        self.pairs = everything.take(torch.arange(pairs))
        self.validation = everything.take(torch.arange(pairs, pairs + VALIDATION_PAIRS))
        self.network = make_network(self.model, replay="on" if replay else "off", uses=epochs)
        self.search = alignment_search(self.network, setting, position)
        self.steps = epochs * -(-pairs // setting.batch_size)
        self.kept = 0
        self.announcement = ""

    def announce(self) -> str:
        """Have replay make ready for the pairs; what it says of its caches."""
        if isinstance(self.network, ReplayNetwork):
            both = [self.pairs.base], [self.pairs.sources["variable"]]
            self.announcement = self.network.prepare([self.search.sites], *both)
            self.kept = sum(self.network.estimate([self.search.sites], *both)) if self.network.keeps else 0
        return self.announcement

    def loader(self, pairs: CounterfactualBatch, *, shuffle: bool) -> DataLoader[CounterfactualBatch]:
        size = self.setting.batch_size if shuffle else 256
        sampler = BatchSampler(len(pairs), size, seed=0 if shuffle else None)
        return DataLoader(SplitDataset(pairs), batch_size=None, sampler=sampler, pin_memory=torch.cuda.is_available())

    def with_lightning(
        self, *, validate: bool = True, epochs: int | None = None, callbacks: Sequence[lightning.Callback] = ()
    ) -> None:
        """As ``itrain fit`` runs it: the settings of configs/trainer, checkpoints, and figures in a CSV file."""
        settings: Any = OmegaConf.to_container(OmegaConf.load(TRAINER))
        settings = {key: value for key, value in settings.items() if not key.startswith("_")}
        settings |= {"max_epochs": epochs or self.epochs, "accelerator": "gpu" if self.device == "cuda" else "cpu"}
        self.announce()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = ModelCheckpoint(dirpath=folder, filename="last", enable_version_counter=False)
            trainer = lightning.Trainer(
                **settings,
                default_root_dir=folder,
                logger=CSVLogger(folder),
                callbacks=[checkpoint, *callbacks],
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            validation = self.loader(self.validation, shuffle=False) if validate else None
            trainer.fit(self.search, self.loader(self.pairs, shuffle=True), validation)

    def bare(self) -> None:
        """The same steps and the same validation, in plain torch."""
        self.announce()
        optimizer = torch.optim.Adam(self.search.exported.parameters(), lr=LEARNING_RATE)
        retract_after_steps(optimizer, self.search)
        schedule = with_linear_schedule(optimizer, _Steps(self.steps), warmup=0.1)["lr_scheduler"]["scheduler"]  # type: ignore[arg-type]
        training = self.loader(self.pairs, shuffle=True)
        for epoch in range(self.epochs):
            training.sampler.set_epoch(epoch)  # type: ignore[union-attr]
            for batch in training:
                optimizer.zero_grad(set_to_none=True)
                logits = self.search.interchange(batch, self.search.trained)
                cross_entropy(logits, batch.counterfactual_label).backward()
                optimizer.step()
                schedule.step()
            with torch.inference_mode():
                for batch in self.loader(self.validation, shuffle=False):
                    logits = self.search.interchange(batch, self.search.trained)
                    for rule in RULES:
                        is_right(logits, batch.counterfactual_label, batch.contrast_label, rule).sum()


class _Steps:
    """What the schedule asks of a Trainer."""

    def __init__(self, steps: int) -> None:
        self.estimated_stepping_batches = steps


class EpochClock(lightning.Callback):
    """Notes how long it took until each epoch ended."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.start = clock, clock()
        self.ends: list[float] = []

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        _synchronise()
        self.ends.append(self.clock() - self.start)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ Lightning's share


def _lightning_part(options: argparse.Namespace) -> dict[str, Any]:
    """Whole fits in turn, with and without Lightning."""
    rows, results = [], {}
    for name in options.settings:
        if name not in OVERHEAD_EPOCHS:
            continue
        for position in options.positions:
            samples: dict[str, list[Any]] = {"bare": [], "lightning": []}
            steps = 0
            for round_number in range(options.rounds):
                for kind in sorted(samples, reverse=bool(round_number % 2)):
                    fit = Fit(name, position, replay=True, epochs=OVERHEAD_EPOCHS[name])
                    samples[kind].append(sampled(fit.bare if kind == "bare" else fit.with_lightning))
                    steps = fit.steps
                    del fit
                    gc.collect()
            extra = {
                clock: [
                    getattr(ours, clock) / getattr(bare, clock) - 1
                    for ours, bare in zip(samples["lightning"], samples["bare"], strict=True)
                ]
                for clock in ("wall", "cpu")
            }
            bare, ours = (statistics.median(each.wall for each in samples[kind]) for kind in ("bare", "lightning"))
            rows.append(
                [
                    f"{name}@{position}",
                    steps,
                    f"{bare:.2f}",
                    f"{ours:.2f}",
                    Quartiles.of(extra["wall"]).text(100, 1, " %"),
                    Quartiles.of(extra["cpu"]).text(100, 1, " %"),
                    f"{(ours - bare) / steps * 1e3:.2f}",
                ]
            )
            results[f"{name}@{position}"] = {"steps": steps, "bare": bare, "lightning": ours, "extra": extra}
    head = ["fit", "steps", "bare loop, s", "with Lightning, s", "Lightning adds", "by CPU time", "ms a step"]
    print("### What Lightning, metrics, logging and checkpoints add to a fit with replay\n")
    print(markdown(head, rows), "\n", flush=True)
    return results


# ------------------------------------------------------------------------------------------------ pyvene's loop


def _pyvene_part(settings: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Fits of itrain against pyvene's loop over the same pairs."""
    rows, results = [], {}
    for name in settings:
        for position in options.positions:
            require_same_start(name, position)
            peer = PyveneLoop(name, position, options.peer_steps)
            step, ends, notes = peer.seconds_per_step(CLOCKS[options.clock]), {}, {}
            per_epoch = step * -(-PAIRS[name] // SETTINGS[name].batch_size)
            del peer
            gc.collect()
            for epochs in (1, max(EPOCHS)):
                measured = min(epochs, options.measured_epochs)
                fit = Fit(name, position, replay=True, epochs=epochs)
                watch = EpochClock(CLOCKS[options.clock])
                fit.with_lightning(validate=False, epochs=measured, callbacks=[watch])
                ends[epochs] = watch.ends
                notes[epochs] = fit.announcement
                del fit
                gc.collect()
            print(f"{name}@{position}: {notes[max(EPOCHS)]}; once: {notes[1]}", flush=True)
            for epochs in EPOCHS:
                seconds, measured = _extrapolated(ends[1 if epochs == 1 else max(EPOCHS)], epochs)
                rows.append(
                    [
                        f"{name}@{position}",
                        epochs,
                        f"{epochs * per_epoch:.1f}",
                        f"{seconds:.1f}",
                        "yes" if measured else "extrapolated",
                        f"{epochs * per_epoch / seconds:.1f}x",
                    ]
                )
                results[f"{name}@{position}, {epochs}"] = {"pyvene": epochs * per_epoch, "itrain": seconds}
    head = ["fit", "epochs", "pyvene's loop, s", "itrain, s", "itrain measured", "faster"]
    print(f"\n### Whole fits, caches and their filling included (pyvene: {options.peer_steps} steps, extrapolated)\n")
    print(", ".join(f"{name}: {PAIRS[name]} pairs" for name in settings), "\n")
    print(markdown(head, rows), "\n", flush=True)
    return results


def _extrapolated(ends: Sequence[float], epochs: int) -> tuple[float, bool]:
    """Seconds until an epoch has ended, and whether they were measured.

    The first epoch fills the caches and the second one checks them; the median of those after it stands for all others.
    """
    if epochs <= len(ends):
        return ends[epochs - 1], True
    lengths = [after - before for before, after in itertools.pairwise(ends)]
    return ends[-1] + (epochs - len(ends)) * statistics.median(lengths[1:] or lengths), False


class PyveneLoop(Pyvene):
    """pyvene's training loop as in its tutorials: batches from a data loader, a progress bar that shows the loss."""

    def __init__(self, name: str, position: str, steps: int) -> None:
        setting = SETTINGS[name]
        device = "cuda" if name == "gpu" else "cpu"
        model = setting.model(device)
        super().__init__(model, setting, setting.pairs(PAIRS[name] + VALIDATION_PAIRS, device), position)
        self.name, self.steps = name, steps
        self.prepare()

    def seconds_per_step(self, clock: Callable[[], float]) -> float:
        """The median over some steps; the first one is not counted."""
        source, base = self.source.arguments["input_ids"], self.pairs.base.arguments["input_ids"]
        data = TensorDataset(*(each[: PAIRS[self.name]] for each in (base, source, self.pairs.counterfactual_label)))
        loader = DataLoader(data, batch_size=self.setting.batch_size, shuffle=True)
        schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=100)
        times: list[float] = []
        with open("/dev/null", "w") as nowhere:
            while len(times) <= self.steps:
                bar, before = tqdm(loader, file=nowhere), clock()
                for batch in bar:
                    loss = self._step(*batch)
                    bar.set_postfix({"loss": f"{loss.item():.2f}"})
                    schedule.step()
                    times.append(clock() - before)
                    before = clock()
                    if len(times) > self.steps:
                        break
        return statistics.median(times[1:])

    def _step(self, base: Tensor, source: Tensor, label: Tensor) -> Tensor:
        _, output = self.intervenable({"input_ids": base}, [{"input_ids": source}], {"sources->base": self.token})
        loss = cross_entropy(output.logits[:, -1].float(), label)
        loss.backward()
        self.optimizer.step()
        self.intervenable.set_zero_grad()
        return loss


def require_same_start(name: str, position: str) -> None:
    """Refuse to compare fits that would not begin with the same loss and gradient.

    Raises:
        EqualityError: they differ by more than rounding.
    """
    fit = Fit(name, position, replay=True, epochs=2, pairs=SETTINGS[name].batch_size)
    peer = Pyvene(fit.model, fit.setting, fit.pairs.to(fit.device), position)
    rows = torch.arange(fit.setting.batch_size)
    fit.announce()
    batch = fit.pairs.take(rows).to(fit.device)
    _probe(fit.search, batch)  # keeps the examples, which the next one replays
    require_equal({"pyvene": peer.probe(rows), "itrain": _probe(fit.search, batch)}, fit.setting.dtype)


def _probe(search: AlignmentSearch, batch: CounterfactualBatch) -> tuple[Tensor, Tensor]:
    (intervention,) = search.trained.values()
    with parametrize.cached():
        matrix: Tensor = intervention.subspace.rows  # type: ignore[union-attr, assignment]
        loss = cross_entropy(search.interchange(batch, search.trained), batch.counterfactual_label)
        (gradient,) = torch.autograd.grad(loss, matrix)
    return loss.detach(), gradient


# ------------------------------------------------------------------------------------------------ memory


def _memory_part(settings: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Peaks of fits of two epochs, each in a process of its own."""
    rows, results = [], {}
    for name in settings:
        for position in options.positions:
            peaks = {way: _peak_of(name, position, way) for way in ("hooks", "replay")}
            hooks, replay = peaks["hooks"]["fit_bytes"], peaks["replay"]["fit_bytes"]
            kept = peaks["replay"]["kept_bytes"]
            rows.append(
                [
                    f"{name}@{position}",
                    *(f"{each / MIB:.0f}" for each in (hooks, replay, kept, hooks + kept)),
                    "yes" if replay <= hooks + kept else "NO",
                ]
            )
            results[f"{name}@{position}"] = peaks
    head = ["fit", "hooks, MiB", "replay, MiB", "cache as printed, MiB", "hooks and cache, MiB", "replay is within"]
    print("### Peak memory of fits of two epochs, on top of the loaded model\n")
    print(markdown(head, rows), "\n", flush=True)
    return results


def _peak_of(name: str, position: str, way: str) -> dict[str, int]:
    command = [sys.executable, __file__, "--settings", name, "--positions", position, "--peak", way]
    command += ["--threads", str(torch.get_num_threads())]
    # Freed tensors are given back at once: what malloc holds on to is not counted, as on a GPU torch's own reserve.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak(name: str, position: str, way: str) -> dict[str, int]:
    """What a fit of two epochs takes at most, on top of the loaded model."""
    # Lightning sets up much at its first fit, and torch's code is read from its file where it first runs: neither is to
    # be counted, for either way. Two epochs fill, compare with plain hooks and replay.
    Fit("toy", "last", replay=True, epochs=2).with_lightning(validate=False)
    # Six batches: enough for a cache that can be seen beside a step's own memory.
    fit = Fit(name, position, replay=way == "replay", epochs=2, pairs=6 * SETTINGS[name].batch_size)
    if fit.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fit.with_lightning(validate=False)
        return {"fit_bytes": torch.cuda.max_memory_allocated() - before, "kept_bytes": fit.kept}
    before = reset_peak()
    fit.with_lightning(validate=False)
    return {"fit_bytes": peak_bytes() - before, "kept_bytes": fit.kept}


if __name__ == "__main__":
    main()
