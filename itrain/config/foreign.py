"""What a configuration that was read from a file may name and ask for, before anything of it is built or imported."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from itrain.config.placing import own_interventions
from itrain.signatures import brief
from itrain.trust import TrustError, find, is_known, not_trusted, require_names, require_plain, shown

PLACES = ("save_dir", "dir", "dirpath", "default_root_dir", "folder", "root_dir", "log_dir", "logdir")
"""Arguments that say where something is written; a file must not."""
WRITERS = ("network", "trainer", "logger")
"""The groups that have such arguments."""
CROWDS = ("num_workers", "devices", "num_nodes", "n_jobs", "threads")
"""Numbers of processes or threads, of which a file must not ask for more than :data:`CROWD`."""
CROWD = 256
PARTIAL = ("network", "data", "intervention", "training", "trainer")
"""The groups whose parts the run completes."""

PUBLISHED = {
    "aryaman/causalgym", "pyvene/axbench-concept500", "mib-bench/arithmetic_addition", "mib-bench/arc_easy",
    "mib-bench/copycolors_mcqa", "mib-bench/ioi", "mib-bench/ravel",
}  # fmt: skip
"""The data sets that itrain's own recipes and tasks name."""

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def require_harmless(
    taken: Mapping[str, Any], place: str, *, trust: Sequence[str], typed: Collection[str] = (), own: bool = False
) -> None:
    """Refuse a configuration that names what is not trusted or does not fit where it stands, or asks for too much.

    Args:
        taken: the configuration, as plain data.
        place: how messages speak of the file.
        trust: packages that are trusted besides itrain, and besides the parts of torch and Lightning that it needs.
        typed: keys that the command line sets anyway.
        own: whether it lies where it says that it was written, so that what it reads was named here.

    Raises:
        TrustError: naming the file, the key and the remedy.
    """
    require_names(trust)
    _require_references(taken, place)
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.create(dict(taken)), resolve=True)
    except OmegaConfBaseException as error:
        raise TrustError(f"{place}: {brief(error)}") from error
    require_plain(plain, place)
    for group in WRITERS:
        if isinstance(plain.get(group), dict):
            for key in _written(plain[group], group):
                if not any(word == key or key.startswith(f"{word}.") for word in typed):
                    raise TrustError(f"{place} says where to write ({key}), which no file may; repeat it: {key}=<path>")
    training = plain.get("training")
    if isinstance(training, dict) and isinstance(training.get("under"), str) and "training.under" not in typed:
        # What itrain saves says what probes read under itself, and its weights hold it.
        raise TrustError(f"{place} names an export (training.under), which no file may; repeat it: training.under=...")
    for key, value in _named(plain, ""):
        if key.split(".")[-1] in CROWDS and _number(value) > CROWD:
            raise TrustError(f"{place}: {key} is {value}; no file may ask for more than {CROWD}; repeat it: {key}=...")
    untrusted = [(key, path) for key, path in _targets(plain) if not _is_trusted(path, trust)]
    if untrusted:
        key, path = untrusted[0]
        packages = sorted({str(path).split(".")[0] for _, path in untrusted})
        raise TrustError(f"{place} names {shown(path)} ({key}), {not_trusted(packages)}")
    _require_fitting(plain, place, trust)
    if not own:
        _require_asked(plain, place, typed)
    for key, node in own_interventions(plain.get("site")):
        if not isinstance(node, Mapping) or node.get("_partial_") is not True:
            raise TrustError(f"{place}: {key} is no _partial_ call, which the run would complete")
    _require_methods(plain.get("sweep"), place)


def _require_asked(plain: Mapping[str, Any], place: str, typed: Collection[str]) -> None:
    """Refuse files and data sets that nobody has asked for here: a stranger's choice of what is read or fetched."""
    for key, node in _nodes(plain, ""):
        made = get_object(str(node["_target_"]))
        for name in getattr(made, "reads", ()):
            usual = inspect.signature(made).parameters[name].default
            if node.get(name) in (None, usual) or node.get("fingerprint"):  # which is that of a file that is here
                continue
            for path, value in _sources(node[name], f"{key}.{name}"):
                asked = any(path == word or path.startswith(f"{word}.") for word in typed)
                if not asked and value not in PUBLISHED:
                    raise TrustError(
                        f"{place} names what would be read here ({path}: {shown(value)}), which no file may; if you "
                        f"want it, repeat it: {path}=..."
                    )


def _require_methods(grid: Mapping[str, Any] | None, place: str) -> None:
    methods = {} if grid is None else grid.get("methods")
    for name, method in methods.items() if isinstance(methods, Mapping) else ():
        if not re.fullmatch(r"[\w+-][\w .+-]*", str(name)):
            # Files are named after methods.
            raise TrustError(f"{place}: {shown(name)} is no name of a method; use letters, digits, '_', '+' and '-'")
        if not isinstance(method, Mapping) or method.get("_partial_") is not True:
            raise TrustError(f"{place}: sweep.methods.{name} is no _partial_ call, which the sweep would complete")


def _is_trusted(path: Any, trust: Sequence[str]) -> bool:
    return isinstance(path, str) and (is_known(path) or any(path.startswith(f"{name}.") for name in trust))


def _require_references(taken: Mapping[str, Any], place: str) -> None:
    """Refuse all but plain references to plain values: others run functions, or grow without end."""
    for key, text in _named(taken, ""):
        if not isinstance(text, str) or "${" not in text:
            continue
        if "${" in _REFERENCE.sub("", text) or "_target_" in key:
            raise TrustError(f"{place}: {key} is {shown(text)}, which no file may ask for")
        for name in _REFERENCE.findall(text):
            value: Any = taken
            for part in name.split("."):
                # Relative references and those into lists are not followed here, and so not taken.
                value = value.get(part, taken) if isinstance(value, Mapping) else taken
            if isinstance(value, Mapping | list) or (isinstance(value, str) and "${" in value):
                raise TrustError(f"{place}: {key} refers to {shown(name)}, which is no plain value")


def _require_fitting(plain: Mapping[str, Any], place: str, trust: Sequence[str]) -> None:
    """Refuse a class or function that is not of the kind of the group that names it."""
    slots = _slots()
    for group in slots:
        if not isinstance(plain.get(group), Mapping | None):
            raise TrustError(f"{place} is damaged: {group} is {shown(plain[group])}")
    for key, path in _targets(plain):
        group, _, rest = key.partition(".")
        if group == "launcher":
            continue
        if group == "site":
            _require_placed(rest.split("."), path, place, trust)
            continue
        if group not in slots:
            raise TrustError(f"{place} names {shown(path)} as {key}, which is no part of a run")
        kinds, inner = slots[group]
        if rest == "_target_":
            role = group
        elif inner or not str(path).startswith("itrain."):
            kinds, role = inner or (object,), f"part of the {group}"
        else:
            raise TrustError(f"{place} names {shown(path)} as {key}, but a {group} has no parts of its own")
        find(path, kinds, role=role, trust=trust, place=place)
        if rest == "_target_" and group in PARTIAL and plain[group].get("_partial_") is not True:
            raise TrustError(f"{place}: {group} is no _partial_ call, which the run would complete")


def _require_placed(keys: Sequence[str], path: Any, place: str, trust: Sequence[str]) -> None:
    """Refuse what the site names unless it is an intervention of its own, or a part of one."""
    from torch import nn

    from itrain.interventions.base import Intervention

    if "intervention" not in keys:
        raise TrustError(f"{place} names {shown(path)} as {'.'.join(['site', *keys])}, which is no part of a run")
    own = keys[keys.index("intervention") + 1 :] == ["_target_"]
    kind, role = (Intervention, "intervention") if own else (nn.Module, "part of the intervention")
    find(path, (kind,), role=role, trust=trust, place=place)


def _slots() -> dict[str, tuple[tuple[type, ...], tuple[type, ...]]]:
    """The kinds that each group takes, and those that its arguments take."""
    import lightning
    from lightning.pytorch.loggers import Logger
    from torch import nn
    from torch.optim import Optimizer

    from itrain.data.splits import SplitDataModule
    from itrain.interventions.base import Intervention
    from itrain.models import BaseModel
    from itrain.networks.base import Network
    from itrain.sharding import ShardedStrategy
    from itrain.sweeps.grid import Grid
    from itrain.tasks.base import Task
    from itrain.training.base import Training
    from itrain.training.judges import Judge

    return {
        "model": ((nn.Module, BaseModel), (Task,)),
        "network": ((Network,), ()),
        "task": ((Task,), (Task,)),
        "data": ((SplitDataModule,), (Task,)),
        "intervention": ((Intervention,), (nn.Module,)),
        "training": ((Training,), (nn.Module, BaseModel, Optimizer, Judge)),
        "trainer": ((lightning.Trainer,), (lightning.Callback, ShardedStrategy)),
        "logger": ((Logger,), ()),
        "sweep": ((Grid,), (nn.Module, Optimizer)),
    }


def _number(value: Any) -> float:
    """A number as Lightning reads it, which takes text for one; 0 where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0


def _targets(plain: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in _named(plain, "") if key.split(".")[-1] == "_target_"]


def _written(value: Any, key: str) -> Iterator[str]:
    """The keys below one that say where something is written."""
    for name, each in _named(value, key):
        is_path = isinstance(each, str) and (each.startswith(("/", "~", "\\")) or ".." in Path(each).parts)
        if each is not None and (is_path or name.split(".")[-1] in PLACES):
            yield name


def _nodes(value: Any, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All mappings that name a class or a function, each with its key."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield key, value
        for name, each in value.items():
            yield from _nodes(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _nodes(each, key)


def _sources(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """The file or data set that an argument names, or those for each split; anything else is said in full."""
    for name, each in value.items() if isinstance(value, Mapping) else [("", value)]:
        if isinstance(each, str):
            yield f"{key}.{name}" if name else key, each


def _named(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """All plain values below a key, each with its own; lists count as their items."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _named(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _named(each, key)
    else:
        yield key, value
