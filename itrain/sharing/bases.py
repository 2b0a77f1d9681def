"""The base model of an export: described when it is written, made or compared when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from itrain.architectures import otherwise_described, unwrap
from itrain.factories import FactoryError, limits_of_model
from itrain.identity import IdentityError, difference
from itrain.models import BaseModel, load_pretrained
from itrain.models.placing import otherwise_quantized
from itrain.sharing.reading import ExportError, read_config
from itrain.tasks.base import Task
from itrain.training.base import Training
from itrain.trust import TrustError, find, shown
from itrain.weights import WeightError, earlier_fingerprints, fingerprint

OWN = "custom"
"""The name of a base model that was given as a module."""


def described_base_model(training: Training, given: BaseModel | None = None) -> dict[str, Any]:
    """The base model that is given, that a training remembers, or whose name on the hub the model itself knows."""
    if given is not None and not isinstance(given, BaseModel):
        raise ExportError(f"base_model: {type(given).__name__} is none; wrap your module: itrain.BaseModel(model=...)")
    if given is not None:
        return given.described()
    if known := training.provenance.get("base_model"):
        return dict(known)
    model = training.network.model
    name = getattr(getattr(unwrap(model), "config", None), "name_or_path", "")
    if training.trains_model or not name or Path(name).exists():
        raise ExportError(
            "which base model the export belongs to is not known; add base_model=itrain.load_pretrained(name=...), the "
            "model as it was loaded"
        )
    return BaseModel(model=model, name=name, revision=getattr(unwrap(model).config, "_commit_hash", None)).described()


def base_model_of(folder: str | Path, *, trust: Sequence[str] = ()) -> BaseModel:
    """The base model that an export names, with its tokenizer.

    Raises:
        ExportError: the export is damaged, or its model is not known or not here.
    """
    config = read_config(folder)
    base, run = config["base_model"], config.get("configuration")
    name, revision = base["name"], base.get("revision")
    if name == OWN or base.get("head"):
        if not isinstance(run, dict) or not isinstance(run.get("model"), dict):
            raise ExportError(f"'{folder}' was trained on a module of one's own ({base['type']}): load(folder, model)")
        return _made_anew(run, folder, trust)
    if base.get("folder") and not Path(name).expanduser().is_dir():
        # Or a stranger's model of that name would be fetched from the hub.
        raise ExportError(f"'{folder}' was trained on the model in '{name}', which is not here: load(folder, model)")
    if revision is not None and not isinstance(revision, str):
        raise ExportError(f"'{folder}' is damaged: {shown(revision)} is no revision of a model")
    kept = {key: base.get(key) for key in ("quantization", "components")}
    return load_pretrained(name=name, revision=revision, **kept)


def _made_anew(run: Mapping[str, Any], folder: str | Path, trust: Sequence[str]) -> BaseModel:
    """The base model as the configuration of a run makes it."""
    node, seed = run["model"], run.get("seed", 0)
    try:
        arguments = {key: _task(value, folder, trust) for key, value in node.items() if key != "_target_"}
        make = find(node.get("_target_"), (nn.Module, BaseModel), role="model", trust=trust, place=f"'{folder}'")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with limits_of_model(node.get("_target_"), folder):
                made = make(**arguments)
    except TrustError as error:
        raise ExportError(f"{error}, or give the model: load(folder, model)") from error
    except FactoryError as error:
        raise ExportError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise ExportError(f"'{folder}': its model cannot be made: {error}") from error
    return made if isinstance(made, BaseModel) else BaseModel(model=made)


def _task(value: Any, folder: str | Path, trust: Sequence[str]) -> Any:
    """An argument of what makes a model: a task, to which a head is fitted, or what it is."""
    if not isinstance(value, Mapping) or "_target_" not in value:
        return value
    make = find(value["_target_"], (Task,), role="task", trust=trust, place=f"'{folder}'")
    return make(**{key: each for key, each in value.items() if key != "_target_"})


def require_model(model: nn.Module, folder: str | Path) -> None:
    """Refuse a base model, as it was loaded, that does not compute what the one computes that an export was trained on.

    Raises:
        ExportError: it differs from what the export says; the message says in what.
    """
    base = read_config(folder)["base_model"]
    if (other := otherwise_described(base.get("components"), model)) is not None:
        raise ExportError(f"'{folder}': {other}")
    if isinstance(base.get("identity"), dict):
        try:
            found = difference(base["identity"], model)
        except (IdentityError, WeightError) as error:
            raise ExportError(f"'{folder}': {error}") from error
    else:
        now = fingerprint(model)
        known = base["fingerprint"] in {now, *earlier_fingerprints(model)}
        found = None if known else f"fingerprint {base['fingerprint']} -> {now}"
    if found is not None:
        found = otherwise_quantized(base.get("quantization"), model) or found
        raise ExportError(
            f"'{folder}' was trained on {base['name']} ({base['type']}); this model is another one, whose activations "
            f"mean something else: {found}"
        )
