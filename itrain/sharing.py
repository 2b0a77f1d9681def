"""Exports: just what was trained and what it belongs to, as safetensors and JSON, never pickle."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from itrain import __version__
from itrain.models import BaseModel, fingerprint, load_pretrained
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.training.base import Training

WEIGHTS = "intervention.safetensors"
CONFIG = "intervention_config.json"
FORMAT = 2

Kind = TypeVar("Kind", bound=nn.Module)


class ExportError(ValueError):
    """An export cannot be written, or does not belong where it is loaded."""


def export(
    training: Training,
    folder: str | Path,
    *,
    base_model: BaseModel,
    metrics: Mapping[str, float] | None = None,
    configuration: Mapping[str, Any] | None = None,
) -> Path:
    """Write what was trained to a folder.

    Parametrised weights are written as what they stand for: orthonormal rows R, not the free parameter behind them.

    Args:
        training: what has been trained.
        folder: where ``intervention.safetensors`` and ``intervention_config.json`` go.
        base_model: the base model, named so that it can be found again.
        metrics: final figures, kept for the reader.
        configuration: the run's, resolved, from which ``itrain test export=<folder>`` repeats its test.

    Raises:
        ExportError: the intervention or probe was not given as a class or a partial of one, so its arguments are
            unknown.
    """
    folder = Path(folder)
    config = {
        "format": FORMAT,
        "training": _path(type(training)),
        **{name: _described(name, value) for name, value in training.arguments().items()},
        "base_model": {
            "name": base_model.name,
            "revision": base_model.revision,
            "type": getattr(getattr(base_model.model, "config", None), "model_type", type(base_model.model).__name__),
            "fingerprint": base_model.fingerprint,
        },
        "metrics": dict(metrics or {}),
        "versions": {"itrain": __version__}
        | {package: version(package) for package in ("torch", "transformers", "lightning")},
        "configuration": configuration,
    }
    text = json.dumps(config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_materialised(training.exported), folder / WEIGHTS)
    (folder / CONFIG).write_text(text + "\n")
    return folder


def read_config(folder: str | Path) -> dict[str, Any]:
    """The description of an export.

    Raises:
        ExportError: the folder holds no export, or one of a newer format.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ExportError(f"'{folder}' is no export: it has no {name}")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ExportError(f"'{folder / CONFIG}' is damaged: {error}") from error
    if config.get("format") != FORMAT:
        raise ExportError(f"'{folder}' has format {config.get('format')}; this itrain reads format {FORMAT}")
    return config


def load(folder: str | Path, model: nn.Module | None = None) -> Training:
    """What an export holds, on the base model, ready to be tested or run.

    Args:
        folder: the export.
        model: the base model it belongs to; None loads the one that the export names.

    Raises:
        ExportError: the model is not the one that it was trained on, or the weights do not fit.
    """
    config = read_config(folder)
    base = config["base_model"]
    model = model if model is not None else load_pretrained(name=base["name"], revision=base["revision"]).model
    require_model(fingerprint(model), folder)
    cls: Any = _class(config["training"], "training", Training, folder)
    names = set(inspect.signature(cls).parameters) & set(config)
    arguments = {name: _rebuilt(name, config[name], folder) for name in names}
    training = cls(network=HookedNetwork(model, trainable=cls.trains_model), **arguments)
    load_weights(training.exported, folder)
    return training.eval()


def require_model(found: str, folder: str | Path) -> None:
    """Refuse a base model, known by its fingerprint, that an export does not belong to.

    Raises:
        ExportError: the model's fingerprint is not the one that the export names.
    """
    base = read_config(folder)["base_model"]
    if found != base["fingerprint"]:
        raise ExportError(
            f"'{folder}' was trained on {base['name']} ({base['type']}, fingerprint {base['fingerprint']}); "
            f"this model has the fingerprint {found}, so its activations mean something else"
        )


def load_weights(module: nn.Module, folder: str | Path) -> None:
    """Set what was trained to the weights of an export.

    Raises:
        ExportError: a weight is missing, unknown, or of another shape.
    """
    weights, expected = load_file(Path(folder) / WEIGHTS), _materialised(module)
    if different := sorted(set(weights) ^ set(expected)):
        place = "the export" if different[0] in weights else "the model"
        raise ExportError(f"'{folder}': the weight '{different[0]}' is in {place} only")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            shape, needed = tuple(weight.shape), tuple(expected[name].shape)
            raise ExportError(f"'{folder}': '{name}' has the shape {shape}, and {needed} is needed here")
    with torch.no_grad():
        for name, weight in weights.items():
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            if parametrize.is_parametrized(owner, leaf):
                setattr(owner, leaf, weight.to(getattr(owner, leaf).device))
            else:
                getattr(owner, leaf).copy_(weight)


def _materialised(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with each parametrised weight under its own name and as what it stands for."""
    state = {name: tensor for name, tensor in module.state_dict().items() if "parametrizations." not in name}
    for path, owner in module.named_modules():
        if parametrize.is_parametrized(owner):
            leaves = cast(nn.ModuleDict, owner.parametrizations)
            state |= {f"{path}.{leaf}" if path else leaf: getattr(owner, leaf) for leaf in leaves}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _described(name: str, value: Any) -> Any:
    """An argument as JSON: sites by name, a factory by its class and the arguments that it was given."""
    if name == "sites":
        return [str(site) for site in value]
    if not callable(value):
        return value
    cls, arguments = value, {}
    if isinstance(value, functools.partial):
        cls, arguments = value.func, dict(value.keywords)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ExportError(
            f"give the {name} as a class or functools.partial(class, argument=...), so that it can be built again"
        )
    return {"class": _path(cls), "arguments": {key: _described(key, each) for key, each in arguments.items()}}


def _rebuilt(name: str, value: Any, folder: str | Path) -> Any:
    """The inverse of :func:`_described`."""
    if name == "sites":
        return [Site.parse(site) for site in value]
    if isinstance(value, dict) and value.keys() == {"class", "arguments"}:
        arguments = {key: _rebuilt(key, each, folder) for key, each in value["arguments"].items()}
        return functools.partial(_class(value["class"], name, nn.Module, folder), **arguments)
    return value


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _class(path: str, role: str, kind: type[Kind], folder: str | Path) -> type[Kind]:
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ExportError(f"'{folder}' needs the {role} {path}, which cannot be imported here") from error
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise ExportError(f"'{folder}' names {path}, which is no {role}")
    return cls
