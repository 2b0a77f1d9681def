"""Exports: the trained weights and what they belong to, as safetensors and JSON, never pickle."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from itrain import __version__
from itrain.factories import FactoryError, class_path, describe, find_class, rebuild
from itrain.files import replacing, replacing_folder
from itrain.models import BaseModel, earlier_fingerprints, fingerprint, load_pretrained
from itrain.networks.hooks import HookedNetwork
from itrain.training.base import Training

WEIGHTS = "intervention.safetensors"
CONFIG = "intervention_config.json"
FORMAT = 2


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

    Parametrised weights are written as their values: orthonormal rows R, not the free parameter behind them.

    Args:
        training: the trained module.
        folder: where ``intervention.safetensors`` and ``intervention_config.json`` go.
        base_model: the base model, whose name and revision are written too.
        metrics: final figures, kept for the reader.
        configuration: the run's resolved configuration, from which ``itrain test export=<folder>`` repeats its test.

    Raises:
        ExportError: the intervention or probe was not given as a class or a partial of one, so its arguments are
            unknown.
    """
    folder = Path(folder)
    try:
        arguments = {name: describe(name, value) for name, value in training.export_arguments().items()}
    except FactoryError as error:
        raise ExportError(str(error)) from error
    config = {
        "format": FORMAT,
        "training": class_path(type(training)),
        **arguments,
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
    with replacing_folder(folder) as beside:
        with replacing(beside / WEIGHTS) as file:
            _save(_materialised(training.exported), file)
        (beside / CONFIG).write_text(text + "\n")
    return folder


def _save(weights: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(weights, file)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """The description of an export.

    Raises:
        ExportError: the folder holds no export, or one of another format.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ExportError(f"'{folder}' is not an export: it has no {name}")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ExportError(f"'{folder / CONFIG}' is damaged: {error}") from error
    if config.get("format") != FORMAT:
        raise ExportError(f"'{folder}' has format {config.get('format')}; this itrain reads format {FORMAT}")
    return config


def load(folder: str | Path, model: nn.Module | None = None) -> Training:
    """Load an export onto its base model, ready to be tested or run.

    Args:
        folder: the export.
        model: the base model it belongs to; None loads the one that the export names.

    Raises:
        ExportError: the model is not the one that it was trained on, or the weights do not fit.
    """
    config = read_config(folder)
    base = config["base_model"]
    model = model if model is not None else load_pretrained(name=base["name"], revision=base["revision"]).model
    require_model(model, folder)
    try:
        cls: Any = find_class(config["training"], "training", Training, str(folder))
        names = set(inspect.signature(cls).parameters) & set(config)
        arguments = {name: rebuild(name, config[name], str(folder)) for name in names}
    except FactoryError as error:
        raise ExportError(str(error)) from error
    training = cls(network=HookedNetwork(model, trainable=cls.trains_model), **arguments)
    load_weights(training, folder)
    return training.eval()


def require_model(model: nn.Module, folder: str | Path) -> None:
    """Refuse a base model, as it was loaded, that an export was not trained on.

    Raises:
        ExportError: the model's fingerprint is not the one that the export names.
    """
    base, found = read_config(folder)["base_model"], fingerprint(model)
    if base["fingerprint"] not in {found, *earlier_fingerprints(model)}:
        raise ExportError(
            f"'{folder}' was trained on {base['name']} ({base['type']}, fingerprint {base['fingerprint']}); "
            f"this model has the fingerprint {found}, so its activations mean something else"
        )


def load_weights(training: Training, folder: str | Path) -> None:
    """Load the weights of an export into a training module.

    Raises:
        ExportError: a weight is missing, unknown, or of another shape.
    """
    module = training.exported
    weights, expected = load_file(Path(folder) / WEIGHTS), _materialised(module)
    if different := sorted(set(weights) ^ set(expected)):
        place = "the export" if different[0] in weights else "the model"
        raise ExportError(f"'{folder}': the weight '{different[0]}' is in {place} only")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            shape, needed = tuple(weight.shape), tuple(expected[name].shape)
            raise ExportError(f"'{folder}': '{name}' has the shape {shape}; {needed} is needed here")
    with torch.no_grad():
        for name, weight in weights.items():
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            if parametrize.is_parametrized(owner, leaf):
                setattr(owner, leaf, weight.to(getattr(owner, leaf).device))
            else:
                getattr(owner, leaf).copy_(weight)
    training.fitted.fill_(True)


def _materialised(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, with the value of each parametrised weight under its own name."""
    state = {name: tensor for name, tensor in module.state_dict().items() if "parametrizations." not in name}
    for path, owner in module.named_modules():
        if parametrize.is_parametrized(owner):
            leaves = cast(nn.ModuleDict, owner.parametrizations)
            state |= {f"{path}.{leaf}" if path else leaf: getattr(owner, leaf) for leaf in leaves}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
