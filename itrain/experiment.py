"""One run of a configuration: builds its parts, fits, tests, and leaves behind what the run was and found."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from itrain.data import CounterfactualDataModule
from itrain.models import BaseModel
from itrain.networks.replay import Network, ReplayNetwork
from itrain.reports.figures import save_run_figure
from itrain.reports.terminal import announce, show
from itrain.sharing import export as write_export
from itrain.sharing import load_weights, require_model
from itrain.sites import Site
from itrain.tasks.base import Task
from itrain.training.alignment import AlignmentSearch, count_features
from itrain.training.callbacks import FirstStepCheck
from itrain.training.probing import ProbeTraining

CHECKPOINTS = "checkpoints"
EXPORT = "export"


class RunError(ValueError):
    """The run cannot start or go on; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a configuration stands for."""

    base_model: BaseModel
    task: Task
    data: CounterfactualDataModule
    module: AlignmentSearch | ProbeTraining
    trainer: lightning.Trainer


def fit(cfg: DictConfig, folder: Path) -> Mapping[str, float]:
    """Train, test and export; returns the final figures, which ``metrics.json`` holds too."""
    parts = _build(cfg, folder)
    parts.module.fit_activations(parts.data.train_dataloader())
    announce(parts.base_model, parts.data, parts.module, folder, how=_make_ready(parts))
    if any(parameter.requires_grad for parameter in parts.module.parameters()):
        parts.trainer.fit(parts.module, datamodule=parts.data, ckpt_path=cfg.ckpt)
    results = _test(parts, folder)
    if isinstance(parts.module, AlignmentSearch):
        _export(cfg, folder, parts, results)
    _draw(folder, results)
    return results


def test(cfg: DictConfig, folder: Path) -> Mapping[str, float]:
    """Test the weights of a checkpoint or an export."""
    parts = _build(cfg, folder)
    _load(cfg, parts)
    return _test(parts, folder)


def export(cfg: DictConfig, folder: Path) -> Path:
    """Export the interventions of a checkpoint."""
    parts = _build(cfg, folder)
    if not isinstance(parts.module, AlignmentSearch):
        raise RunError("only interventions are exported; this run trains probes")
    _load(cfg, parts)
    _export(cfg, folder, parts, metrics={})
    return folder / EXPORT


def _build(cfg: DictConfig, folder: Path) -> Parts:
    if cfg.trainer.get("max_epochs") == 0:
        raise RunError("trainer.max_epochs=0 trains nothing; use 1 or more, or `itrain test` to evaluate")
    _quiet()
    lightning.seed_everything(cfg.seed, verbose=False)
    base_model = instantiate(cfg.model)
    if not isinstance(base_model, BaseModel):
        base_model = BaseModel(model=base_model)
    network = _network(cfg, base_model, folder)
    task = instantiate(cfg.task, _convert_="all")
    task.bind(base_model.tokenizer)
    data = instantiate(cfg.data, _convert_="all")(task=task, network=network, seed=cfg.seed)
    sites = _sites(cfg.site)
    module = _module(cfg, network, sites, task, data)
    callbacks = [
        FirstStepCheck(),
        ModelCheckpoint(dirpath=folder / CHECKPOINTS, filename="last", save_top_k=1, enable_version_counter=False),
    ]
    if cfg.trainer.get("enable_progress_bar", True):
        callbacks.append(RichProgressBar())
    trainer = instantiate(cfg.trainer, _convert_="all")(
        default_root_dir=folder, callbacks=callbacks, logger=_loggers(cfg, folder), enable_model_summary=False
    )
    network.to(trainer.strategy.root_device)
    data.setup("fit")
    data.require(sites)
    return Parts(base_model=base_model, task=task, data=data, module=module, trainer=trainer)


def _network(cfg: DictConfig, base_model: BaseModel, folder: Path) -> Network:
    """The base model's network; what it keeps beyond its budget goes to the run's folder, unless told otherwise."""
    epochs = cfg.trainer.get("max_epochs")
    settings: dict[str, Any] = {"uses": epochs if epochs and epochs > 0 else None, "folder": folder}
    return instantiate(cfg.network)(
        model=base_model.model, **{key: value for key, value in settings.items() if key not in cfg.network}
    )


def _quiet() -> None:
    """Silence remarks of Lightning's that are wrong here or say nothing about the run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for remark in (
        "Found .* in eval mode",
        "The '.*_dataloader' does not have many workers",
        ".*LeafSpec",
        "Experiment logs directory",
    ):
        warnings.filterwarnings("ignore", remark)


def _sites(site: Any) -> list[Site]:
    node: Any = OmegaConf.to_container(site) if OmegaConf.is_config(site) else site
    return [Site.parse(each) for each in (node if isinstance(node, Sequence) and not isinstance(node, str) else [node])]


def _module(
    cfg: DictConfig, network: Network, sites: list[Site], task: Task, data: CounterfactualDataModule
) -> AlignmentSearch | ProbeTraining:
    partial = instantiate(cfg.training, _convert_="all")
    join = bool(cfg.training.get("join_positions", False))
    sizes = count_features(network, sites, data.example(), join_positions=join)
    if partial.func is ProbeTraining:
        classes = {variable: len(task.values(variable)) for variable in task.variables}
        return partial(network=network, sites=sites, classes=classes, hidden_sizes=sizes)
    intervention = instantiate(cfg.intervention, _convert_="all")
    return partial(network=network, sites=sites, intervention=intervention, hidden_sizes=sizes)


def _make_ready(parts: Parts) -> str:
    """Tell a replaying network what it will be asked; the line that says how the model will be run."""
    network, batches = parts.module.network, [dataset.pairs for dataset in parts.data.datasets.values()]
    if not isinstance(network, ReplayNetwork):
        return "plain hooks"
    if isinstance(parts.module, ProbeTraining):
        return "reads are kept, and stop at the site"
    sources = [source for batch in batches for source in batch.sources.values()]
    return network.expect(parts.module.sites, [batch.base for batch in batches], sources)


def _loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    others = [] if cfg.logger is None else [instantiate(cfg.logger, save_dir=str(folder), _convert_="all")]
    return [CSVLogger(folder, name="", version=""), *others]


def _test(parts: Parts, folder: Path) -> Mapping[str, float]:
    (figures,) = parts.trainer.test(parts.module, datamodule=parts.data, verbose=False)
    results = {"model/accuracy": parts.data.model_accuracy["test"], **figures}
    if parts.trainer.is_global_zero:
        (folder / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")
        show(results, parts.data, folder)
    return results


def _load(cfg: DictConfig, parts: Parts) -> None:
    if cfg.export is not None and isinstance(parts.module, AlignmentSearch):
        require_model(parts.base_model.model, cfg.export)
        load_weights(parts.module.interventions, cfg.export)
        return
    if cfg.ckpt is None:
        raise RunError("nothing to test: give ckpt=<run folder or .ckpt> or export=<folder>")
    parts.module.load_state_dict(torch.load(cfg.ckpt, map_location="cpu", weights_only=True)["state_dict"])


@rank_zero_only
def _export(cfg: DictConfig, folder: Path, parts: Parts, metrics: Mapping[str, float]) -> None:
    assert isinstance(parts.module, AlignmentSearch)
    configuration: Any = OmegaConf.to_container(cfg, resolve=True)
    write_export(
        parts.module, folder / EXPORT, base_model=parts.base_model, metrics=metrics, configuration=configuration
    )


@rank_zero_only
def _draw(folder: Path, results: Mapping[str, float]) -> None:
    save_run_figure(folder / "metrics.csv", results, folder / "figure.png")
