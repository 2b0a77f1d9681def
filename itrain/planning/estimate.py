"""What a run takes: its own preparation, training step and evaluation, run on tensors without values and counted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from itrain.architectures import blocks
from itrain.data.splits import SplitDataModule
from itrain.opening import open_model, placements_of
from itrain.planning.fakes import faked, without_storage
from itrain.planning.memory import Memory
from itrain.signatures import ConfigError
from itrain.training.base import Training
from itrain.weights import shapes_alone

GUESSED = 2
"""Devices of a node over which weights are divided, where a trainer takes all and none is seen."""
FOLDER = Path("the run's folder")
"""Of which there is none yet: messages name it."""
UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)
"""What is raised where values are looked at that there are not."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one device of a run takes, in bytes, and the operations of one step.

    Args:
        model: the base model's class.
        parameters, trained: how many there are, and how many are trained.
        weights: bytes of the model and what is trained.
        gathered: under sharding, the bytes of weights of which a device holds more than its part at the peak.
        caches: bytes that replay keeps.
        optimizer: bytes of the optimizer's state.
        step, evaluation: bytes of all else at the peak of a training step, the first ones among them, and of a test.
        flops: of one step, forward and backward, on one device.
        devices, sharded: how many devices there are, and whether they share the weights.
        dtype: the type that most matrix products are in.
        batch: examples of a step on one device.
        length: tokens of the longest example.
        replay: what replay does, and why.
        notes: what was not counted, or stands in for something.
    """

    model: str
    parameters: int
    trained: int
    weights: int
    gathered: int
    caches: int
    optimizer: int
    step: int
    evaluation: int
    flops: int
    devices: int
    sharded: bool
    dtype: torch.dtype
    batch: int
    length: int
    replay: str
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        """The most bytes of tensors at once on one device."""
        held = self.weights + self.gathered + self.caches
        return held + max(self.step + self.optimizer, self.evaluation + self.optimizer)


def estimate(cfg: DictConfig, *, devices: int | None = None) -> Estimate:
    """What a fit of the configuration takes on each device; nothing is loaded, downloaded or written.

    Args:
        cfg: a checked configuration.
        devices: how many there are; None: as the trainer says.

    Raises:
        ValueError: what a fit would refuse before it trains, in the same words.
    """
    sharded = _sharded(cfg)
    count, assumed = (devices, "") if devices else _devices(cfg, sharded)
    cfg = cfg.copy()
    if sharded:
        cfg.network.replay = "off"
    with shapes_alone(), _quiet():
        memory = Memory()
        found = faked(cfg)
        training = instantiate(cfg.training, _convert_="all")
        opened = open_model(cfg, FOLDER, trainable=training.func.trains_model, base_model=found.base_model)
        made = instantiate(cfg.intervention, _convert_="all")
        module = opened.module(training, placements_of(cfg.site), intervention=made)
        without_storage(module)
        opened.data.setup("fit")
        model = found.base_model.model
        weights = memory.hold([*module.parameters(), *module.buffers(), *model.parameters(), *model.buffers()])
        together = int(cfg.trainer.strategy.get("tensor_parallel_size", 1)) if sharded else 1
        if count % together:
            raise ConfigError(f"plan: {count} devices cannot be split into groups of {together}; give trainer.devices")
        counted = _Counted(memory, module, opened.data, count // together)
        counted.run(cfg)
    shards, gathered = _shards(module, model, count) if sharded else (weights, 0)
    trained = sum(each.numel() for each in module.parameters() if each.requires_grad)
    part = count if sharded and module.trains_model else 1
    return Estimate(
        model=type(model).__name__,
        parameters=sum(each.numel() for each in model.parameters()),
        trained=trained,
        weights=shards,
        gathered=gathered,
        caches=counted.caches,
        optimizer=counted.optimizer // part,
        step=counted.step,
        evaluation=counted.evaluation,
        flops=counted.flops,
        devices=count,
        sharded=sharded,
        dtype=_precision(cfg) or max(model.parameters(), key=torch.numel).dtype,
        batch=counted.batch,
        length=counted.length,
        replay="nothing: the weights are divided among devices, so plain hooks run" if sharded else counted.replay,
        notes=tuple(
            note for note in (assumed, found.note, *counted.notes, *(_of_blocks(cfg) if sharded else ())) if note
        ),
    )


class _Counted:
    """Runs the parts of a fit and notes what they take, beyond the weights."""

    def __init__(self, memory: Memory, module: Training, data: SplitDataModule, devices: int) -> None:
        self.memory, self.module, self.data = memory, module, data
        self.notes: list[str] = []
        train = data.datasets["train"].examples
        self.batch = max(1, -(-min(data.batch_size, len(train)) // devices))
        self.tested = max(1, -(-min(data.eval_batch_size, len(data.datasets["test"])) // devices))
        self.length = max((each.length for each in (*data.edited(), *data.read()) if each.arguments), default=0)
        self.caches = self.optimizer = self.step = self.evaluation = self.flops = 0
        self.replay = ""

    def run(self, cfg: DictConfig) -> None:
        memory, start = self.memory, self.memory.now
        epochs = cfg.trainer.get("max_epochs")
        with memory:
            try:
                self.replay = self.module.prepare(self.data, uses=epochs if epochs and epochs > 0 else None)
            except UNKNOWN as error:
                raise ConfigError(
                    f"plan does not know {type(self.module).__name__}: before its first step, it looks at values of "
                    "the base model's activations, and without weights there are none"
                ) from error
            preparation = memory.peak - start
            groups = [each for each in self.module.parameter_groups() if each["params"]]
            optimizer = self.module.optimizer(groups) if groups and self.module.optimizer else None
            self.module.train()
            self.module.network.train(self.module.trains_model)
            before = memory.now
            if optimizer is not None:
                # Where runs are replayed, the first step may fill the cache that the second one reads.
                for _ in range(2 if hasattr(self.module.network, "stores") else 1):
                    self._train(optimizer, _precision(cfg), start)
            held = memory.now - before
            self._evaluate(start)
        kept = sum(part.nbytes for store in getattr(self.module.network, "stores", ()) for part in store.parts)
        self.caches = min(kept, held + before - start)
        self.step = max(self.step, preparation) - self.caches
        self.evaluation = max(0, self.evaluation - self.caches - self.optimizer)

    def _train(self, optimizer: torch.optim.Optimizer, precision: torch.dtype | None, start: int) -> None:
        batch = self.data.datasets["train"].examples.take(torch.arange(self.batch))
        flops, self.optimizer = self.memory.flops, _state(optimizer)
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = self.module.training_step(batch, 0)  # type: ignore[call-arg]
        loss.backward()  # type: ignore[union-attr]
        passes = self.memory.peak - start - self.optimizer
        self.memory.begin()
        optimizer.step()
        optimizer.zero_grad()
        self.flops, self.optimizer = self.memory.flops - flops, _state(optimizer)
        self.step = max(self.step, passes, self.memory.peak - start - self.optimizer)

    def _evaluate(self, start: int) -> None:
        self.module.eval()
        self.memory.begin()
        batch = self.data.datasets["test"].examples.take(torch.arange(self.tested))
        self.module.trainer = _trainer()
        try:
            with torch.no_grad():
                self.module.begin("test")
                self.module.score("test", batch)
        except UNKNOWN:
            self.notes.append("evaluation is counted up to where it looks at values")
        self.evaluation = self.memory.peak - start


def _trainer() -> lightning.Trainer:
    """One that trains nothing, for what asks it in an evaluation."""
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _state(optimizer: torch.optim.Optimizer) -> int:
    tensors = (each for state in optimizer.state.values() for each in state.values() if isinstance(each, torch.Tensor))
    return sum(each.nbytes for each in tensors)


def _shards(module: Training, model: nn.Module, devices: int) -> tuple[int, int]:
    """The bytes of weights that a device keeps, and those that it gathers at the peak.

    FSDP gathers what is in no block for the whole step, and two blocks: one runs while the next is fetched.
    """
    total, own = _bytes(model), {id(each) for each in model.parameters()}
    others = sum(each.nbytes for each in module.parameters() if id(each) not in own)
    try:
        sizes = [_bytes(block) for block in blocks(model)]
    except ValueError:
        return others + total // devices, total - total // devices
    gathered = total - sum(sizes) + 2 * max(sizes)
    return others + total // devices, max(0, min(gathered, total) * (devices - 1) // devices)


def _bytes(module: nn.Module) -> int:
    return sum(each.nbytes for each in module.parameters())


def _sharded(cfg: DictConfig) -> bool:
    strategy = cfg.trainer.get("strategy")
    name = strategy.get("_target_", "") if isinstance(strategy, Mapping | DictConfig) else str(strategy or "")
    return "shard" in name.lower() or "fsdp" in name.lower()


def _devices(cfg: DictConfig, sharded: bool) -> tuple[int, str]:
    """How many devices the trainer takes, and what is said where that cannot be known here."""
    given, nodes = cfg.trainer.get("devices", 1), int(cfg.trainer.get("num_nodes", 1) or 1)
    if isinstance(given, int) and given > 0:
        return given * nodes, ""
    if not isinstance(given, int | str):
        return len(given) * nodes, ""
    if str(given).isdecimal():
        return int(given) * nodes, ""
    if cfg.trainer.get("accelerator") == "cpu":
        return nodes, ""
    if torch.cuda.is_available():
        return torch.cuda.device_count() * nodes, ""
    taken = GUESSED if sharded else 1
    return taken * nodes, f"no GPU is seen here, so {taken} devices a node are assumed: give trainer.devices=<number>"


def _of_blocks(cfg: DictConfig) -> Iterator[str]:
    if int(cfg.trainer.strategy.get("tensor_parallel_size", 1)) > 1:
        yield "a step's tensors are counted as if each device computed whole blocks; split blocks take less"


def _precision(cfg: DictConfig) -> torch.dtype | None:
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(cfg.trainer.get("precision")))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what is said of a run that no trainer runs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*self.trainer.*reference is not registered.*")
        yield
