"""What a configuration describes, opened: the model and its network, the task and its data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from itrain.data.labelled import concepts_of
from itrain.data.splits import SplitDataModule
from itrain.factories import limits_of_model
from itrain.models import BaseModel, with_random_weights
from itrain.models.served import served
from itrain.networks.base import Network
from itrain.owned import additions
from itrain.placements import Placement, Placements
from itrain.reports.silence import silence_others
from itrain.sharding import ShardedStrategy, load_sharded, shard
from itrain.sharing import load
from itrain.sites import Site
from itrain.tasks.arbitrary import with_arbitrary_labels
from itrain.tasks.base import Task
from itrain.tasks.concepts import instructions_of
from itrain.tasks.contract import count_classes
from itrain.tasks.responses import ResponseTask
from itrain.threads import choose_threads
from itrain.trainers import RunError
from itrain.training.base import Training
from itrain.training.building import count_features

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

    def module(
        self,
        training: Callable[..., Training],
        sites: Placements,
        *,
        intervention: Any = None,
        control: bool | None = None,
    ) -> Training:
        """The training module at the sites; the run gives those arguments that only it knows.

        Whether it has a control is asked of the data, unless weights that it is to have say so.
        """
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
            "control": lambda: (
                getattr(self.data, "has_control", self.task.control is not None) if control is None else control
            ),
            "concept": lambda: self.task.mentions if isinstance(self.task, ResponseTask) else [],
            "end": lambda: self.task.end if isinstance(self.task, ResponseTask) else None,
            "concepts": lambda: concepts_of(self.data),
            "instructions": lambda: instructions_of(self.task),
            "excluded": lambda: list(getattr(self.base_model.tokenizer, "all_special_ids", ())),
        }
        asked = inspect.signature(training).parameters
        return training(**additions("training", given, {name: known[name] for name in asked if name in known}))


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


def placements_of(site: Any) -> list[Placement | Site]:
    """What a configuration's site says: sites where these say all, or placements, with their own factories."""
    node = OmegaConf.to_container(site) if OmegaConf.is_config(site) else site
    found = [] if node is None else instantiate({"site": node}, _convert_="all")["site"]
    return [each.short for each in Placement.parse_all(found)]


def _network(cfg: DictConfig, base_model: BaseModel, folder: Path, *, trainable: bool) -> Network:
    """The base model's network; its cache beyond the limit goes to the run's folder unless it names another."""
    known = {"model": lambda: base_model.model, "trainable": lambda: trainable, "folder": lambda: folder}
    asked = inspect.signature(get_object(cfg.network._target_)).parameters
    known = {name: make for name, make in known.items() if name in asked}
    return instantiate(cfg.network)(**additions("network", cfg.network, known))
