"""One run of a configuration: builds its parts, fits, tests, and writes the files of the run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import get_object, instantiate
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf

from itrain.data.responses import ResponseDataModule
from itrain.data.splits import SplitDataModule
from itrain.files import write_text
from itrain.loggers.base import log_run
from itrain.models import BaseModel, with_random_weights
from itrain.networks.base import Network
from itrain.reports.figures import save_run_figure
from itrain.reports.generations import in_words, print_generations, save_generations
from itrain.reports.silence import silence_others
from itrain.reports.terminal import announce, show
from itrain.sharing import export as write_export
from itrain.sharing import load, load_weights, require_model
from itrain.sites import Site
from itrain.tasks.base import Task
from itrain.tasks.responses import Prompts
from itrain.threads import choose_threads
from itrain.training.base import Training
from itrain.training.callbacks import epochs_of
from itrain.training.finetuning import Finetuning
from itrain.training.interchange import count_features
from itrain.training.safeguards import safeguard

CHECKPOINTS = "checkpoints"
EXPORT = "export"
GENERATED = 64
"""The most tokens that are generated after a typed prompt."""


class RunError(ValueError):
    """The run cannot start or go on; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The model, task and data of a configuration."""

    base_model: BaseModel
    network: Network
    task: Task
    data: SplitDataModule
    open_network: Callable[[BaseModel], Network]
    """Makes the network of a base model."""
    threads: str
    """How many CPU threads were chosen, and why."""

    @cached_property
    def random_twin(self) -> Opened:
        """The same with a randomly initialised model; the data stay those that the base model answers correctly."""
        base_model = with_random_weights(self.base_model, seed=self.data.seed)
        return replace(self, base_model=base_model, network=self.open_network(base_model))

    def module(
        self, training: Callable[..., Training], sites: Sequence[Site], *, intervention: Any = None, join: bool = False
    ) -> Training:
        """The training module at the sites; the run gives those arguments that only it knows."""
        known: dict[str, Callable[[], Any]] = {
            "network": lambda: self.network,
            "sites": lambda: sites,
            "hidden_sizes": lambda: count_features(self.network, sites, self.data.example(), join_positions=join),
            "intervention": lambda: intervention,
            "classes": lambda: {variable: len(self.task.values(variable)) for variable in self.task.variables},
            "control": lambda: self.task.control is not None,
        }
        asked = inspect.signature(training).parameters
        return training(**{name: make() for name, make in known.items() if name in asked})


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts that a configuration describes."""

    base_model: BaseModel
    data: SplitDataModule
    module: Training
    trainer: lightning.Trainer
    threads: str


def fit(cfg: DictConfig, folder: Path) -> Mapping[str, float]:
    """Train, test and export; returns the final figures, which ``metrics.json`` holds too."""
    parts = _build(cfg, folder)
    how = parts.module.prepare(parts.data, uses=epochs_of(parts.trainer))
    announce(parts.base_model, parts.data, parts.module, folder, how=how, threads=parts.threads)
    for logger in parts.trainer.loggers[1:]:
        logger.log_hyperparams(_plain(cfg))
    before = {}
    if parts.module.shows_start:
        with isolate_rng():  # or the fit would differ from Trainer.fit alone
            before = _figures(parts)
    if any(parameter.requires_grad for parameter in parts.module.parameters()):
        parts.trainer.fit(parts.module, datamodule=parts.data, ckpt_path=cfg.ckpt)
    results = _test(parts, folder, before)
    _export(cfg, folder, parts, results)
    _draw(folder, results)
    log_run(parts.trainer.loggers, results, folder / "figure.png")
    _show(parts, results, folder)
    return results


def test(cfg: DictConfig, folder: Path) -> Mapping[str, float]:
    """Test the weights of a checkpoint or an export."""
    parts = _build(cfg, folder)
    _load(cfg, parts)
    results = _test(parts, folder)
    _show(parts, results, folder)
    return results


def export(cfg: DictConfig, folder: Path) -> Path:
    """Export what a checkpoint holds."""
    parts = _build(cfg, folder)
    _load(cfg, parts)
    _export(cfg, folder, parts, metrics={})
    return folder / EXPORT


def generate(cfg: DictConfig, prompts: Sequence[str]) -> None:
    """Print continuations of prompts, before and after the training of an export."""
    base_model = instantiate(cfg.model)
    module = load(cfg.export, base_model.model)
    if not isinstance(module, Finetuning):
        raise RunError(f"'{cfg.export}' is of {type(module).__name__}, which trains no responses to generate")
    task = Prompts(texts=prompts)
    task.bind(base_model.tokenizer)
    inputs = task.inputs(task.settings("test"))
    if task.tokenizer.unk_token_id in inputs.arguments["input_ids"].flatten().tolist():
        raise RunError("a prompt has words that are not in the model's vocabulary")
    columns = {"prompt": prompts}
    for name, trained in (("before", False), ("after", True)):
        tokens = module.generate(inputs, max_new_tokens=GENERATED, end=task.end, trained=trained)
        columns[name] = [task.text(each) for each in tokens.tolist()]
    print_generations(columns)


def open_model(cfg: DictConfig, folder: Path, *, trainable: bool = False, like: Opened | None = None) -> Opened:
    """Load the model, and make its task and data; nothing is sampled yet.

    Where the weights equal those of ``like``, its network is reused, with its cache.
    """
    silence_others()
    lightning.seed_everything(cfg.seed, verbose=False)
    base_model = instantiate(cfg.model)
    if not isinstance(base_model, BaseModel):
        base_model = BaseModel(model=base_model)
    threads = choose_threads(base_model.model, cfg.get("threads"))
    open_network = partial(_network, cfg, folder=folder, trainable=trainable)
    if like is not None and like.base_model.fingerprint == base_model.fingerprint:
        base_model, network = like.base_model, like.network
    else:
        network = open_network(base_model)
    task = instantiate(cfg.task, _convert_="all")
    task.bind(base_model.tokenizer)
    data = instantiate(cfg.data, _convert_="all")(task=task, network=network, seed=cfg.seed)
    return Opened(
        base_model=base_model, network=network, task=task, data=data, open_network=open_network, threads=threads
    )


def make_logger(cfg: DictConfig, folder: Path) -> Logger | None:
    """The configured logger, beside the result files; it writes to the run's folder unless it names another."""
    if cfg.logger is None:
        return None
    asked = inspect.signature(get_object(cfg.logger._target_)).parameters
    known = {"save_dir": str(folder)} if "save_dir" in asked and "save_dir" not in cfg.logger else {}
    return instantiate(cfg.logger, **known, _convert_="all")


def _build(cfg: DictConfig, folder: Path) -> Parts:
    if cfg.trainer.get("max_epochs") == 0:
        raise RunError("trainer.max_epochs=0 trains nothing; use 1 or more, or `itrain test` to evaluate")
    training = instantiate(cfg.training, _convert_="all")
    opened = open_model(cfg, folder, trainable=training.func.trains_model)
    if cfg.export is not None:
        require_model(opened.base_model.model, cfg.export)  # before the module changes it, as adapters do
    sites = _sites(cfg.site)
    module = opened.module(
        training,
        sites,
        intervention=instantiate(cfg.intervention, _convert_="all"),
        join=bool(cfg.training.get("join_positions", False)),
    )
    callbacks: list[lightning.Callback] = [
        ModelCheckpoint(dirpath=folder / CHECKPOINTS, filename="last", save_top_k=1, enable_version_counter=False),
    ]
    if cfg.trainer.get("enable_progress_bar", True):
        callbacks.append(RichProgressBar())
    trainer = instantiate(cfg.trainer, _convert_="all")(
        default_root_dir=folder, callbacks=callbacks, logger=_loggers(cfg, folder), enable_model_summary=False
    )
    safeguard(trainer, folder / CHECKPOINTS / "last.ckpt")
    opened.network.to(trainer.strategy.root_device)
    opened.data.setup("fit")
    # As the fit will run them, so that statistics and room are worked out for its precision.
    opened.data.trainer = trainer
    trainer.precision_plugin.convert_module(module)
    return Parts(base_model=opened.base_model, data=opened.data, module=module, trainer=trainer, threads=opened.threads)


def _network(cfg: DictConfig, base_model: BaseModel, folder: Path, *, trainable: bool) -> Network:
    """The base model's network; its cache beyond the limit goes to the run's folder unless it names another."""
    settings: dict[str, Any] = {"trainable": trainable, "folder": folder}
    return instantiate(cfg.network)(
        model=base_model.model, **{key: value for key, value in settings.items() if key not in cfg.network}
    )


def _sites(site: Any) -> list[Site]:
    node: Any = OmegaConf.to_container(site) if OmegaConf.is_config(site) else site
    return [Site.parse(each) for each in (node if isinstance(node, list) else [] if node is None else [node])]


def _loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    other = make_logger(cfg, folder)
    return [CSVLogger(folder, name="", version=""), *([] if other is None else [other])]


def _figures(parts: Parts) -> Mapping[str, float]:
    (figures,) = parts.trainer.test(parts.module, datamodule=parts.data, verbose=False)
    return figures


def _test(parts: Parts, folder: Path, before: Mapping[str, float] | None = None) -> Mapping[str, float]:
    start = {key.replace("test/", "before/", 1): value for key, value in (before or {}).items()}
    results = {**parts.data.figures(), **start, **_figures(parts)}
    if parts.trainer.is_global_zero:
        write_text(folder / "metrics.json", json.dumps(results, indent=2) + "\n")
        if isinstance(parts.module, Finetuning) and isinstance(parts.data, ResponseDataModule):
            save_generations(parts.module.generations, parts.data.text, folder)
    return results


@rank_zero_only
def _show(parts: Parts, results: Mapping[str, float], folder: Path) -> None:
    """Print what is written: the screen comes last, as it may be gone."""
    show(results, folder)
    if isinstance(parts.module, Finetuning) and isinstance(parts.data, ResponseDataModule):
        print_generations(in_words(parts.module.generations, parts.data.text))


def _load(cfg: DictConfig, parts: Parts) -> None:
    if cfg.export is not None:
        load_weights(parts.module, cfg.export)
        return
    if cfg.ckpt is None:
        raise RunError("nothing to test: give ckpt=<run folder or .ckpt> or export=<folder>")
    parts.module.load_state_dict(torch.load(cfg.ckpt, map_location="cpu", weights_only=True)["state_dict"])


@rank_zero_only
def _export(cfg: DictConfig, folder: Path, parts: Parts, metrics: Mapping[str, float]) -> None:
    write_export(parts.module, folder / EXPORT, base_model=parts.base_model, metrics=metrics, configuration=_plain(cfg))


def _plain(cfg: DictConfig) -> Any:
    return OmegaConf.to_container(cfg, resolve=True)


@rank_zero_only
def _draw(folder: Path, results: Mapping[str, float]) -> None:
    save_run_figure(folder / "metrics.csv", results, folder / "figure.png")
