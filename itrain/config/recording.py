"""What a configuration records besides what was asked for: defaults that act, versions, and the user's commit."""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, open_dict

from itrain.config.overrides import parse
from itrain.config.placing import all_have_own, plain_site
from itrain.owned import FILLED, OWNED, WRITTEN, owner
from itrain.signatures import Call, ConfigError

RECORDED = ("versions", "commit")
"""Keys that say what a run was made with; a configuration that is read again takes those of the new run."""

_SECONDS = 10


def refuse_recorded(override: Override) -> None:
    """Refuse an override of what a run writes down itself.

    Raises:
        ConfigError: naming the key.
    """
    key = override.key_or_group
    part, argument = [*key.split("."), ""][:2]
    if part in RECORDED or argument in WRITTEN.get(part, ()):
        raise ConfigError(f"{key}: a run writes it down itself; leave it out")


def leave_out_unread(config: DictConfig, overrides: Sequence[str]) -> None:
    """Set the parts to null that the training does not read: an intervention of probes, a site of LoRA.

    Raises:
        ConfigError: an override sets one of them.
    """
    training = Call(place="training", target=get_object(config.training._target_), node={})
    sweeps = config.sweep is not None
    own = all_have_own(plain_site(config))
    remedies = {"site": "set sweep.layers and sweep.positions", "intervention": "set sweep.methods and sweep.ranks"}
    for part, argument in (("site", "sites"), ("intervention", "intervention")):
        placed = part == "intervention" and own
        if not sweeps and argument in training.accepts and not placed:
            continue
        for override in map(parse, overrides):
            asked = override.key_or_group.split(".")[0] == part and override.type is not OverrideType.DEL
            if asked and override.value() is not None:
                who = "a sweep" if sweeps else training.target.__name__
                reason = "every site has one of its own" if placed and not sweeps else f"{who} takes no {part}"
                remedy = remedies[part] if sweeps else "leave it out"
                raise ConfigError(f"'{override.input_line}' has no effect: {reason}; {remedy}")
        config[part] = None


def fill_in_defaults(config: DictConfig) -> None:
    """Write out the plain default of each argument that a constructor would take it from, except a launcher's."""
    with open_dict(config):
        for key in config:
            if key != "launcher":
                _fill(config._get_node(key), str(key))


def commit() -> str | None:
    """The commit of the repository in whose folder the run was started, with ``-dirty`` where files have changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _fill(node: Any, place: str) -> None:
    if isinstance(node, ListConfig):
        for index in range(len(node)):
            _fill(node._get_node(index), f"{place}[{index}]")
    if not isinstance(node, DictConfig) or node._is_none() or node._is_interpolation():
        return
    if "_target_" in node:
        call = Call(place=place, target=get_object(node["_target_"]), node={})
        for name, default in _defaults(call).items():
            if name not in node:
                node[name] = default
    for key in list(node):
        _fill(node._get_node(key), f"{place}.{key}")


def _defaults(call: Call) -> dict[str, Any]:
    """The defaults that are plain data, except of what the run gives.

    Of other packages, switches and null are left out: they ask for nothing, and releases add some, which an earlier
    release would refuse in a configuration that is read again.
    """
    part = owner(call.place)
    others = {*OWNED.get(part, {}), *FILLED.get(part, ())}
    foreign = str(getattr(call.target, "__module__", "")).split(".")[0] in ("torch", "lightning", "pytorch_lightning")
    found = {}
    for name in call.accepts:
        default = (call.parameters or {})[name].default
        unwanted = default is inspect.Parameter.empty or (foreign and isinstance(default, bool | None))
        if name not in others and not unwanted and _is_plain(default):
            found[name] = list(default) if isinstance(default, tuple) else default
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
