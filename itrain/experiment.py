"""One run of a configuration: builds its parts, fits, tests, and writes the files of the run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf

from itrain import vacuity
from itrain.checkpoints import read_checkpoint, require_origin
from itrain.data.splits import SplitDataModule
from itrain.factories import Limited, as_node, describe
from itrain.leaving import METRICS, continue_metrics, former_metrics, leave_results, show_results
from itrain.loggers.base import begin_run, log_run
from itrain.loggers.runs import EVALUATION, FIT
from itrain.models import BaseModel
from itrain.opening import Opened, open_model, placements_of
from itrain.reports.figures import save_run_figure
from itrain.reports.terminal import announce, announce_best, announce_controls
from itrain.shards import end_together, has_shards
from itrain.sharing import EXPORT, limited_to, load_weights, require_model
from itrain.sharing import export as write_export
from itrain.sharing.reading import read_config
from itrain.trainers import RunError, make_trainer
from itrain.training.base import Training
from itrain.training.building import require_one_place
from itrain.training.callbacks import epochs_of
from itrain.training.checkpointed import ARGUMENTS
from itrain.training.finite import fault_in
from itrain.trust import shown


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts that a configuration describes: what was opened, and what is trained on it and by what."""

    opened: Opened
    module: Training
    trainer: lightning.Trainer

    @property
    def base_model(self) -> BaseModel:
        return self.opened.base_model

    @property
    def data(self) -> SplitDataModule:
        return self.opened.data


def fit(cfg: DictConfig, folder: Path) -> Mapping[str, float]:
    """Train, test and export; returns the final figures, which ``metrics.json`` holds too."""
    return fitted(cfg, folder)[1]


def fitted(cfg: DictConfig, folder: Path) -> tuple[Parts, Mapping[str, float]]:
    """The same; returns the parts too, as the fit has left them."""
    parts = _build(cfg, folder)
    controls = vacuity.planned(cfg, parts.opened.task, parts.module, parts.trainer)
    former = former_metrics(cfg.ckpt) or []
    how = parts.module.prepare(parts.data, uses=epochs_of(parts.trainer))
    announce(parts.base_model, parts.data, parts.module, folder, how=how, threads=parts.opened.threads)
    announce_controls([each.name for each in controls])
    begin_run(parts.trainer.loggers[1:], _plain(cfg), FIT)
    before = {}
    if parts.module.shows_start:
        with isolate_rng():  # or the fit would differ from Trainer.fit alone
            before = _figures(parts)
    if any(parameter.requires_grad for parameter in parts.module.parameters()):
        if cfg.ckpt is not None:
            _load_checkpoint(parts.module, cfg.ckpt)  # Lightning does so again, and says less of what does not fit
        continue_metrics(former, parts.trainer)
        parts.trainer.fit(parts.module, datamodule=parts.data, ckpt_path=cfg.ckpt, weights_only=True)
        if parts.trainer.global_step == 0:
            raise RunError("no step was taken: a limit of the trainer (max_steps, max_time, limit_train_batches) is 0")
        _keep_best(parts)
    results = _test(parts, folder, before)
    if controls:
        build = partial(_control, cfg, parts.opened)
        results = {**results, **vacuity.check(cfg, controls, build, parts.opened.task, results)}
        leave_results(parts.module, parts.data, results, folder)
    _export(cfg, folder, parts, results)
    end_together()
    _draw(folder, results)
    log_run(parts.trainer.loggers, results, folder / "figure.png")
    show_results(parts.module, parts.data, results, folder)
    return parts, results


def loaded(cfg: DictConfig, folder: Path) -> Parts:
    """The parts with the weights of a checkpoint or an export."""
    parts = _build(cfg, folder)
    _load(cfg, parts)
    return parts


def test(cfg: DictConfig, folder: Path) -> Mapping[str, float]:
    """Test the weights of a checkpoint or an export."""
    parts = loaded(cfg, folder)
    begin_run(parts.trainer.loggers[1:], _plain(cfg), EVALUATION)
    results = _test(parts, folder)
    end_together()
    show_results(parts.module, parts.data, results, folder)
    return results


def export(cfg: DictConfig, folder: Path, *, tests: bool = False) -> Parts:
    """Export what a checkpoint holds, with figures where it ``tests`` them; return the parts."""
    parts = loaded(cfg, folder)
    tests = tests or parts.module.settles_in_test
    _export(cfg, folder, parts, metrics=_test(parts, folder) if tests else {})
    end_together()
    return parts


def _build(cfg: DictConfig, folder: Path) -> Parts:
    for limit in ("max_epochs", "max_steps", "limit_train_batches"):
        if cfg.trainer.get(limit) == 0:
            raise RunError(f"trainer.{limit}=0 trains nothing; use 1 or more, or `itrain test` to evaluate")
    if cfg.trainer.get("limit_test_batches") == 0:
        raise RunError("trainer.limit_test_batches=0 tests nothing; leave it out")
    training = instantiate(cfg.training, _convert_="all")
    trainer = make_trainer(cfg, folder)
    opened = open_model(cfg, folder, trainable=training.func.trains_model, trainer=trainer)
    if cfg.export is not None:
        require_model(opened.base_model.model, cfg.export)  # before the module changes it, as adapters do
    elif cfg.ckpt is not None:
        require_origin(read_checkpoint(cfg.ckpt), opened.base_model.fingerprint, place=f"'{cfg.ckpt}'")
    sites = placements_of(cfg.site)
    with _limits(cfg):
        saved, intervention = _saved_arguments(cfg), instantiate(cfg.intervention, _convert_="all")
        control = None if saved is None else bool(saved.get("control", False))
        module = opened.module(training, sites, intervention=intervention, control=control)
    _require_concepts(module, saved or {}, cfg.export or cfg.ckpt)
    if isinstance(cfg.training.get("under"), str):
        # Its weights are part of what is saved, which is to be loaded without the folder.
        cfg.training.under = as_node(describe("under", module.arguments["under"]))
    module.origin = {"fingerprint": opened.base_model.fingerprint, "configuration": _plain(cfg)}
    module.provenance = {"base_model": opened.base_model.described(), "configuration": _plain(cfg)}
    require_one_place(opened.network, trainer)
    opened.network.to(trainer.strategy.root_device)
    opened.data.setup("fit")
    share = trainer.limit_test_batches
    if isinstance(share, float) and int(share * len(opened.data.test_dataloader())) == 0:
        raise RunError(f"trainer.limit_test_batches={share} of the test batches is none; give more, or leave it out")
    # As the fit will run them, so that statistics and room are worked out for its precision.
    opened.data.trainer = trainer
    trainer.precision_plugin.convert_module(module)
    return Parts(opened=opened, module=module, trainer=trainer)


def _control(cfg: DictConfig, opened: Opened, control: vacuity.Control) -> tuple[Training, SplitDataModule]:
    """The run's training as a control, which starts as the run did, and its data."""
    if control.random_model:
        opened = opened.random_twin
    elif control.false_task:
        opened = opened.false_twin
    lightning.seed_everything(cfg.seed, verbose=False)
    training, intervention = (instantiate(each, _convert_="all") for each in (cfg.training, cfg.intervention))
    sites = vacuity.sites_changed(placements_of(cfg.site), control.change)
    return opened.module(training, sites, intervention=intervention and control.change(intervention)), opened.data


def _limits(cfg: DictConfig) -> AbstractContextManager[object]:
    """Within it, no module can be made that is far larger than the weights that it is to have."""
    if cfg.export is not None:
        return limited_to(cfg.export)
    if cfg.ckpt is None:
        return nullcontext()
    # Storages, since a tensor may repeat one value without end.
    weights = read_checkpoint(cfg.ckpt)["state_dict"].values()
    return Limited(sum(weight.untyped_storage().nbytes() for weight in weights), cfg.ckpt)


def _saved_arguments(cfg: DictConfig) -> Mapping[str, Any] | None:
    """The arguments that the training of an export or a checkpoint had; None: it starts afresh, or they are unknown."""
    if cfg.export is not None:
        return read_config(cfg.export)
    saved = None if cfg.ckpt is None else read_checkpoint(cfg.ckpt).get(ARGUMENTS)
    found = saved.get("arguments") if isinstance(saved, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _require_concepts(module: Training, saved: Mapping[str, Any], place: str | None) -> None:
    """Refuse data with other concepts than those of saved detectors, which know them by their order."""
    own, concepts = saved.get("concepts"), module.arguments.get("concepts")
    if isinstance(own, list) and concepts and own != list(concepts):
        raise RunError(
            f"'{place}' detects {', '.join(map(shown, own))}, and the data are labelled with "
            f"{', '.join(map(shown, concepts))}; give data with the same concepts in the same order"
        )


def _figures(parts: Parts) -> Mapping[str, float]:
    return parts.trainer.test(parts.module, datamodule=parts.data, verbose=False)[0]


def _test(parts: Parts, folder: Path, before: Mapping[str, float] | None = None) -> Mapping[str, float]:
    start = {key.replace("test/", "before/", 1): value for key, value in (before or {}).items()}
    results = {**parts.data.figures(), **start, **_figures(parts), **vacuity.unchecked(parts.module)}
    leave_results(parts.module, parts.data, results, folder)
    return results


def _load(cfg: DictConfig, parts: Parts) -> None:
    if cfg.export is not None:
        load_weights(parts.module, cfg.export)
        return
    if cfg.ckpt is None:
        raise RunError("nothing to test: give ckpt=<run folder or .ckpt> or export=<folder>")
    _load_checkpoint(parts.module, cfg.ckpt)


def _load_checkpoint(module: Training, file: str) -> None:
    try:
        module.load_state_dict(read_checkpoint(file)["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"'{file}' does not fit {type(module).__name__}: {reason}") from error


def _keep_best(parts: Parts) -> None:
    """Take the weights of the best checkpoint, where a configured callback has kept one, for test and export."""
    for callback in parts.trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            _load_checkpoint(parts.module, callback.best_model_path)
            announce_best(Path(callback.best_model_path), callback.monitor, float(callback.best_model_score or 0))
            return


def _export(cfg: DictConfig, folder: Path, parts: Parts, metrics: Mapping[str, float]) -> None:
    """Export in the first process; all others of a sharded model give it their parts."""
    if not (parts.trainer.is_global_zero or has_shards(parts.module)):
        return
    if fault := fault_in(parts.module):
        raise RunError(f"{fault.text}, so there is nothing to export")
    write_export(parts.module, folder / EXPORT, base_model=parts.base_model, metrics=metrics, configuration=_plain(cfg))


def _plain(cfg: DictConfig) -> Any:
    return OmegaConf.to_container(cfg, resolve=True)


@rank_zero_only
def _draw(folder: Path, results: Mapping[str, float]) -> None:
    save_run_figure(folder / METRICS, results, folder / "figure.png")
