"""The check of a configuration: its keys, the kinds of its parts, and what each of them needs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from hydra.utils import get_object

from itrain.config.placing import all_have_own, check_site, own_interventions
from itrain.owned import FILLED, OWNED, refuse_in_sweeps, refuse_owned, runs_on_all_devices
from itrain.placements import SITE_FIELDS
from itrain.signatures import Call, ConfigError, calls_in, check_calls, check_kind
from itrain.trust import ANNOTATE, PARTNER, is_known, says_what_it_makes

Node = Mapping[str, Any]

_BUILT = ("model", "network", "task", "data", "intervention", "training", "trainer", "logger", "launcher", "sweep")
_NEEDED = ("model", "network", "task", "data", "training", "trainer")
COMPLETED = ("network", "data", "intervention", "training", "trainer")
"""The parts whose construction the run completes."""
_KINDS = {
    "network": "itrain.networks.base.Network",
    "task": "itrain.tasks.base.Task",
    "data": "itrain.data.splits.SplitDataModule",
    "intervention": "itrain.interventions.base.Intervention",
    "training": "itrain.training.base.Training",
    "trainer": "lightning.pytorch.Trainer",
    "logger": "lightning.pytorch.loggers.Logger",
    "sweep": "itrain.sweeps.grid.Grid",
}
_MODELS = ("torch.nn.Module", "itrain.BaseModel")
_CALLBACK = "lightning.pytorch.Callback"
_LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The top-level keys of a configuration."""

    name: str
    seed: int
    output: str
    site: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None
    model: Node
    network: Node
    data: Node
    training: Node
    trainer: Node
    task: Node | None = None
    intervention: Node | None = None
    logger: Node | None = None
    launcher: Node | None = None
    sweep: Node | None = None
    threads: int | None = None
    vacuity: bool | None = None
    ckpt: str | None = None
    export: str | None = None
    trust: Sequence[str] = ()
    versions: Mapping[str, str] | None = None
    commit: str | None = None


def check_parts(plain: Node) -> None:
    """Check a configuration as plain data, without building anything.

    Raises:
        ConfigError: naming the key at fault and the nearest right one.
    """
    for group in _NEEDED:
        if plain.get(group) is None:
            raise ConfigError(f"{group}: none is given; choose one with {group}=<choice>")
    for group in _BUILT:
        if plain.get(group) is not None and not (isinstance(plain[group], dict) and "_target_" in plain[group]):
            choice = f"; {group}=<choice> chooses one that has it"
            raise ConfigError(f"{group}: needs _target_, the path of a class or function{choice}")
    for key, remedy in OWNED["training"].items():
        if key in plain and key not in Configuration.__dataclass_fields__:
            raise ConfigError(f"{key}: no such key; {remedy}")
    if fields := [key for key in SITE_FIELDS if key in plain]:
        raise ConfigError(f"{fields[0]}: no such key, did you mean 'site.{fields[0]}'?")
    callbacks, own = _callbacks(plain["trainer"]), [place for place, _ in own_interventions(plain.get("site"))]
    if not callbacks:
        plain = {**plain, "trainer": {key: value for key, value in plain["trainer"].items() if key != "callbacks"}}
    calls = {call.place: call for call in calls_in(plain)}
    for place, call in calls.items():
        refuse_owned(place, call.node)
        kind = _CALLBACK if place in callbacks else _KINDS["intervention"] if place in own else _KINDS.get(place)
        # A sweep's logger is any object that takes sweeps, as the sweep itself checks.
        if kind is not None and not (place == "logger" and plain.get("sweep")):
            check_kind(call, get_object(kind))
            _check_annotated(call, (kind,))
        if place == "model" or place.endswith(f".{PARTNER}"):
            _check_annotated(call, _MODELS)
        if place in (*_BUILT, *own) and (call.node.get("_partial_") is True) != (place in (*COMPLETED, *own)):
            raise ConfigError(f"{place}._partial_: leave it out; itrain knows which parts a run completes")
    check_calls(Configuration, plain, filled=FILLED)
    for key in ("name", "output", "ckpt", "export"):
        if plain.get(key) == "":
            raise ConfigError(f"{key} is empty; add {key}=<{'name' if key == 'name' else 'path'}>, or leave it out")
    if not 0 <= plain["seed"] <= _LARGEST_SEED:
        raise ConfigError(f"seed: expected 0 to {_LARGEST_SEED}, not {plain['seed']}")
    for part in (*COMPLETED, *own):
        if part in calls:
            _check_completed(calls[part])
    _check_parts_of(plain, calls["training"])


def _check_annotated(call: Call, kinds: Sequence[str]) -> None:
    """Refuse a user's function that does not say what it makes: what is saved of the run could not be read again."""
    path = str(call.node["_target_"])
    if inspect.isclass(call.target) or is_known(path):
        return
    if not says_what_it_makes(call.target, tuple(map(get_object, kinds))):
        wanted = " or ".join(kinds)
        group, _, rest = call.place.partition(".")
        role = f"part of the {group}" if rest else group
        raise ConfigError(
            f"{call.place}._target_ names {path}, which is no {role}{ANNOTATE}: -> {wanted}; or else an export of the "
            "run could not be tested"
        )


def _check_completed(call: Call) -> None:
    """Check that a class takes what the run gives it, and that nothing else is left without a value."""
    owned = OWNED.get(call.place, {})
    if call.place in ("data", "network") and call.parameters is not None:
        for name in owned:
            if name not in call.accepts and not call.takes_anything:
                raise ConfigError(f"{call.place}: {call.target.__name__} takes no '{name}', which the run gives it")
    given = {*owned, *FILLED.get(call.place, ()), call.given_later, *call.node}
    for name in call.required:
        if name not in given:
            raise ConfigError(f"{call.at(name)} has no value; add {call.at(name)}=<value>")


def _callbacks(trainer: Node) -> list[str]:
    """The places of the configured callbacks: one, a list, or a mapping by name in which null leaves one out."""
    given, place = trainer.get("callbacks"), "trainer.callbacks"
    if isinstance(given, dict) and "_target_" not in given:
        entries = {f"{place}.{name}": node for name, node in given.items()}
    else:
        entries = {f"{place}[{i}]": node for i, node in enumerate(given)} if isinstance(given, list) else {place: given}
    for where, node in entries.items():
        if node is not None and not (isinstance(node, dict) and "_target_" in node):
            raise ConfigError(f"{where}: expected a mapping with _target_, the path of a callback, or null")
    return [where for where, node in entries.items() if node is not None]


def _check_parts_of(plain: Node, training: Call) -> None:
    """Check what a training is given besides its own settings: sites that can be read, and an intervention."""
    site = plain["site"]
    if site is not None:
        check_site(site)
    if plain.get("sweep") is not None:
        refuse_in_sweeps(plain["trainer"])
        if plain.get("launcher") is not None and runs_on_all_devices(plain["trainer"]):
            raise ConfigError(
                f"launcher: with trainer.strategy={plain['trainer']['strategy']} each job runs on all devices, one job "
                "after the other; leave out the launcher, or the strategy"
            )
        _check_sweep(plain["sweep"], training)
    else:
        asked = training.accepts
        if (site is None or site == []) and "sites" in asked:
            raise ConfigError(f"site: none is given; at least one site is needed for {training.target.__name__}")
        chosen = (training.parameters or {}).get("intervention")
        asks = chosen is not None and chosen.default in (None, Parameter.empty)
        if asks and plain.get("intervention") is None and not all_have_own(site):
            raise ConfigError(
                f"intervention: none is given; {training.target.__name__} needs one: intervention=<choice>"
            )


def _check_sweep(sweep: Node, training: Call) -> None:
    """Check that a sweep's methods are trainings, or interventions of a training that takes such."""
    kinds, compared = tuple(get_object(_KINDS[group]) for group in ("intervention", "training")), False
    for name, method in sweep["methods"].items():
        place = f"sweep.methods.{name}"
        if not isinstance(method, dict) or "_target_" not in method:
            raise ConfigError(f"{place}: expected a mapping with _target_, the path of a class")
        (call, *_) = calls_in(method, place)
        if not (inspect.isclass(call.target) and issubclass(call.target, kinds)):
            raise ConfigError(f"{place}: {call.target.__name__} is neither an intervention nor a training")
        compared = compared or issubclass(call.target, kinds[0])
    if compared and not {"sites", "intervention"} <= set(training.accepts):
        name = training.target.__name__
        raise ConfigError(f"training: a sweep compares interventions, and {name} takes none; training=alignment")
