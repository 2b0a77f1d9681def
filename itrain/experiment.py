"""One run of a configuration: builds its parts, fits, tests, and writes the files of the run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
from hydra.utils import get_object, instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf
from torch import nn

from itrain import vacuity
from itrain.checkpoints import read_checkpoint, require_origin
from itrain.data.labelled import concepts_of
from itrain.data.splits import SplitDataModule
from itrain.factories import Limited, as_node, describe, limits_of_model
from itrain.leaving import METRICS, continue_metrics, former_metrics, leave_results, show_results
from itrain.loggers.base import begin_run, log_run
from itrain.loggers.runs import EVALUATION, FIT
from itrain.models import BaseModel, with_random_weights
from itrain.models.served import served
from itrain.networks.base import Network
from itrain.owned import additions
from itrain.placements import Placement, Placements
from itrain.reports.figures import save_run_figure
from itrain.reports.silence import silence_others
from itrain.reports.terminal import announce, announce_best, announce_controls
from itrain.sharding import ShardedStrategy, load_sharded, shard
from itrain.shards import end_together, has_shards
from itrain.sharing import EXPORT, limited_to, load, load_weights, require_model
from itrain.sharing import export as write_export
from itrain.sites import Site
from itrain.tasks.arbitrary import with_arbitrary_labels
from itrain.tasks.base import Task
from itrain.tasks.concepts import instructions_of
from itrain.tasks.contract import count_classes
from itrain.tasks.responses import ResponseTask
from itrain.threads import choose_threads
from itrain.trainers import RunError, make_trainer
from itrain.training.base import Training
from itrain.training.building import count_features, require_one_place
from itrain.training.callbacks import epochs_of
from itrain.training.finite import fault_in

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The model, task and data of a configuration."""

    base_model: BaseModel
    network: Network
    task: Task
    data: SplitDataModule
    open_network: Callable[[BaseModel], Network]
    """Makes the network of a base model."""
    open_data: Callable[[Task], SplitDataModule]
    """Makes the data of a task."""
    threads: str
    """How many CPU threads were chosen, and why."""
    trust: Sequence[str] = ()
    """Packages whose classes an export may name."""
    mesh: DeviceMesh | None = None
    """The processes among which the model is divided; None: it is not."""

    @cached_property
    def random_twin(self) -> Opened:
        """The same with a randomly initialised model; the data stay those that the base model answers correctly."""
        base_model = with_random_weights(self.base_model, seed=self.data.seed)
        if self.mesh is not None:
            shard(base_model.model, self.mesh)
        return replace(self, base_model=base_model, network=self.open_network(base_model))

    @cached_property
    def control_twin(self) -> Opened:
        """The same with the task's control task: the same pairs with arbitrary labels."""
        task = self.task.control_task()
        if task is None:
            raise RunError(f"sweep.control_task: task {type(self.task).__name__} has no control task; leave it out")
        if getattr(self.data, "keep", "all") != "all":
            raise RunError("sweep.control_task needs all pairs, since no model answers arbitrary labels: data.keep=all")
        return self._with_task(task)

    @cached_property
    def false_twin(self) -> Opened:
        """The same with variables that the model need not have, or with arbitrary labels where the task has none."""
        return self._with_task(self.task.false_task() or with_arbitrary_labels(self.task))

    def _with_task(self, task: Task) -> Opened:
        data = self.open_data(task)
        data.setup("fit")
        return replace(self, task=task, data=data)

    def module(self, training: Callable[..., Training], sites: Placements, *, intervention: Any = None) -> Training:
        """The training module at the sites; the run gives those arguments that only it knows."""
        given: Mapping[str, Any] = getattr(training, "keywords", {})
        if isinstance(folder := given.get("under"), str):
            training = partial(training, under=load(folder, self.base_model.model, trust=self.trust))
        join = bool(given.get("join_positions", False))
        known: dict[str, Callable[[], Any]] = {
            "network": lambda: self.network,
            "sites": lambda: sites,
            "hidden_sizes": lambda: count_features(self.network, sites, self.data.example(), join_positions=join),
            **({} if intervention is None else {"intervention": lambda: intervention}),
            "example": self.data.example,
            "classes": lambda: {variable: count_classes(self.task, variable) for variable in self.task.variables},
            "control": lambda: getattr(self.data, "has_control", self.task.control is not None),
            "concept": lambda: self.task.mentions if isinstance(self.task, ResponseTask) else [],
            "end": lambda: self.task.end if isinstance(self.task, ResponseTask) else None,
            "concepts": lambda: concepts_of(self.data),
            "instructions": lambda: instructions_of(self.task),
            "excluded": lambda: list(getattr(self.base_model.tokenizer, "all_special_ids", ())),
        }
        asked = inspect.signature(training).parameters
        return training(**additions("training", given, {name: known[name] for name in asked if name in known}))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts that a configuration describes."""

    opened: Opened
    base_model: BaseModel
    data: SplitDataModule
    module: Training
    trainer: lightning.Trainer
    threads: str


def fit(cfg: DictConfig, folder: Path) -> Mapping[str, float]:
    """Train, test and export; returns the final figures, which ``metrics.json`` holds too."""
    return fitted(cfg, folder)[1]


def fitted(cfg: DictConfig, folder: Path) -> tuple[Parts, Mapping[str, float]]:
    """The same; returns the parts too, as the fit has left them."""
    parts = _build(cfg, folder)
    controls = vacuity.planned(cfg, parts.opened.task, parts.module, parts.trainer)
    former = former_metrics(cfg.ckpt) or []
    how = parts.module.prepare(parts.data, uses=epochs_of(parts.trainer))
    announce(parts.base_model, parts.data, parts.module, folder, how=how, threads=parts.threads)
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


def open_model(
    cfg: DictConfig,
    folder: Path,
    *,
    trainable: bool = False,
    like: Opened | None = None,
    trainer: lightning.Trainer | None = None,
    base_model: BaseModel | None = None,
) -> Opened:
    """Load the model unless it is given, and make its task and data; nothing is sampled yet.

    Where the model computes what that of ``like`` does, its network is reused, with its cache. Where the strategy of
    ``trainer`` divides the model among processes, they are started first.
    """
    silence_others()
    mesh = None
    if trainer is not None and isinstance(trainer.strategy, ShardedStrategy):
        mesh = trainer.strategy.open(trainer)
    lightning.seed_everything(cfg.seed, verbose=False)
    base_model = base_model_of(cfg, mesh) if base_model is None else base_model
    if trainer is not None and mesh is not None:
        # FSDP2 settles the precision of parts in their first run.
        trainer.precision_plugin.convert_module(base_model.model)
    threads = choose_threads(base_model.model, cfg.get("threads"))
    open_network = partial(_network, cfg, folder=folder, trainable=trainable)
    same = like is not None and like.base_model.fingerprint == base_model.fingerprint
    if like is not None and same and like.base_model.identity == base_model.identity:
        base_model, network = like.base_model, like.network
    else:
        network = open_network(base_model)
    task = instantiate(cfg.task, _convert_="all")
    task.bind(base_model.tokenizer)

    def open_data(task: Task) -> SplitDataModule:
        known = {"task": lambda: task, "network": lambda: network, "seed": lambda: cfg.seed}
        return instantiate(cfg.data, _convert_="all")(**additions("data", cfg.data, known))

    return Opened(
        base_model=base_model,
        network=network,
        task=task,
        data=open_data(task),
        open_network=open_network,
        open_data=open_data,
        threads=threads,
        trust=cfg.trust,
        mesh=mesh,
    )


def base_model_of(cfg: DictConfig, mesh: DeviceMesh | None = None) -> BaseModel:
    """The base model of a configuration, within the limits of its export or checkpoint; sharded over a mesh if given.

    One that a server runs has no weights here.

    Raises:
        RunError: what makes it makes something else.
    """
    if cfg.network.get("remote"):
        return served(cfg.model, cfg.network.remote)
    with limits_of_model(cfg.model._target_, cfg.export or cfg.ckpt):
        make = partial(instantiate, cfg.model)
        made = make() if mesh is None else load_sharded(make, mesh)
    if not isinstance(made, nn.Module | BaseModel):
        raise RunError(f"model: {cfg.model._target_} makes a {type(made).__name__}, not an nn.Module or BaseModel")
    return made if isinstance(made, BaseModel) else BaseModel(model=made)


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
        module = opened.module(training, sites, intervention=instantiate(cfg.intervention, _convert_="all"))
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
    given = {"base_model": opened.base_model, "data": opened.data, "threads": opened.threads}
    return Parts(opened=opened, **given, module=module, trainer=trainer)


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


def _network(cfg: DictConfig, base_model: BaseModel, folder: Path, *, trainable: bool) -> Network:
    """The base model's network; its cache beyond the limit goes to the run's folder unless it names another."""
    known = {"model": lambda: base_model.model, "trainable": lambda: trainable, "folder": lambda: folder}
    asked = inspect.signature(get_object(cfg.network._target_)).parameters
    known = {name: make for name, make in known.items() if name in asked}
    return instantiate(cfg.network)(**additions("network", cfg.network, known))


def placements_of(site: Any) -> list[Placement | Site]:
    """What a configuration's site says: sites where these say all, or placements, with their own factories."""
    node = OmegaConf.to_container(site) if OmegaConf.is_config(site) else site
    found = [] if node is None else instantiate({"site": node}, _convert_="all")["site"]
    return [each.short for each in Placement.parse_all(found)]


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
