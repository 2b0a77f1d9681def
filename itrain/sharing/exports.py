"""Exports: the trained weights and what they belong to, as safetensors and JSON, never pickle."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from itrain import __version__
from itrain.factories import FactoryError, class_path, describe, find_class, rebuild
from itrain.files import finite, replacing, replacing_folder
from itrain.models import BaseModel
from itrain.networks.choose import plain_network
from itrain.shards import gathered, is_first, is_sharded
from itrain.sharing.bases import base_model_of, described_base_model, require_model
from itrain.sharing.reading import CONFIG, FORMAT, WEIGHTS, ExportError, limited_to, read_config, read_shapes
from itrain.sharing.values import FLOATS, fill, require_finite, saved_lately, values_of
from itrain.training.base import Training
from itrain.trust import TrustError, packages_of, require_names, require_readable, shown


def export(
    training: Training,
    folder: str | Path,
    *,
    base_model: BaseModel | None = None,
    metrics: Mapping[str, float] | None = None,
    configuration: Mapping[str, Any] | None = None,
) -> Path:
    """Write what was trained to a folder; all processes that share a sharded model must, and the first one writes.

    Parametrised weights are written as their values: orthonormal rows R, not the free parameter behind them.

    Args:
        training: the trained module.
        folder: where ``intervention.safetensors`` and ``intervention_config.json`` go.
        base_model: the base model, whose name and revision are written too.
        metrics: final figures, kept for the reader.
        configuration: the run's resolved configuration, from which ``itrain test export=<folder>`` repeats its test.

    What is None is taken from the training's ``provenance``.

    Raises:
        ExportError: the intervention or probe was not given as a class or a partial of one, so its arguments are
            unknown; a weight is not finite; the base model is not known; or the description is too large to be read
            again.
    """
    folder, known = Path(folder), training.provenance
    metrics, configuration = metrics or known.get("metrics"), configuration or known.get("configuration")
    try:
        arguments = {name: describe(name, value) for name, value in training.export_arguments().items()}
    except FactoryError as error:
        raise ExportError(str(error)) from error
    config = {
        "format": FORMAT,
        "training": class_path(type(training)),
        **arguments,
        "base_model": described_base_model(training, base_model),
        "metrics": finite(metrics or {}),
        "versions": {"itrain": __version__}
        | {package: version(package) for package in ("torch", "transformers", "lightning")},
        "configuration": configuration,
    }
    if needed := packages_of(config):
        config["trust"] = needed
    text, values = json.dumps(config), values_of(training.exported)
    divided_among = any(map(is_sharded, values.values()))
    weights = gathered(values) if divided_among else values
    if divided_among and not is_first():
        return folder
    weights = {name: each.detach().cpu().contiguous().clone() for name, each in weights.items()}
    try:
        require_readable(json.loads(text), text, f"the description of the export to '{folder}'")
    except TrustError as error:
        raise ExportError(str(error)) from error
    require_finite(weights, training.exported, f"the export to '{folder}'")
    with replacing_folder(folder) as beside:
        with replacing(beside / WEIGHTS) as file:
            _save(weights, file)
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


def load(folder: str | Path, model: nn.Module | BaseModel | None = None, *, trust: Sequence[str] = ()) -> Training:
    """Load an export onto its base model, ready to be tested or run.

    The export is data: its classes come from itrain, or from packages that are trusted by name.

    Args:
        folder: the export.
        model: the base model it belongs to; None loads the one that the export names. An export of a model that was
            trained itself, also by LoRA, changes this one's weights; attach it to keep them: ``load(x).attach(model)``.
        trust: packages of one's own whose classes the export may name, for example ``["my_package"]``.

    Raises:
        ExportError: the export is damaged, names what is not trusted, the model is not the one that it was trained on,
            or the weights do not fit.
    """
    config = read_config(folder)
    try:
        require_names(trust)
        cls: Any = find_class(config.get("training"), "training", Training, str(folder), trust=trust)
        names = set(inspect.signature(cls).parameters) & set(config)
        arguments = {name: rebuild(name, config[name], str(folder), trust=trust) for name in names}
    except (FactoryError, TrustError) as error:
        raise ExportError(str(error)) from error
    limits = limited_to(folder)
    model = base_model_of(folder, trust=trust) if model is None else model
    tokenizer = model.tokenizer if isinstance(model, BaseModel) else None
    model = model.model if isinstance(model, BaseModel) else model
    require_model(model, folder)
    network = plain_network(model, trainable=cls.trains_model)
    try:
        with limits:
            training = cls(network=network, **arguments)
    except FactoryError as error:
        raise ExportError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise ExportError(f"'{folder}' does not fit {cls.__name__}: {error}") from error
    load_weights(training, folder)
    training.tokenizer = tokenizer
    training.provenance = {part: config.get(part) for part in ("base_model", "configuration")}
    if isinstance(found := config.get("metrics"), dict):
        training.provenance["metrics"] = {name: each for name, each in found.items() if isinstance(each, int | float)}
    return training.eval()


def load_weights(training: Training, folder: str | Path) -> None:
    """Load the weights of an export into a training module.

    Raises:
        ExportError: the file is damaged, or a weight is missing, unknown, of another shape or kind, not finite, or has
            rows that are not orthonormal where they must be.
    """
    module, shapes = training.exported, read_shapes(folder)
    expected = values_of(module)
    added = {name for name in saved_lately(module) if name not in shapes}  # which exports of earlier versions lack
    if different := sorted((set(shapes) ^ set(expected)) - added):
        place = "the export" if different[0] in shapes else "the model"
        raise ExportError(f"'{folder}': the weight {shown(different[0])} is in {place} only")
    for name, shape in shapes.items():
        if shape != expected[name].shape:
            needed = tuple(expected[name].shape)
            raise ExportError(f"'{folder}': '{name}' has the shape {shape}; {needed} is needed here")
    weights = load_file(Path(folder) / WEIGHTS)
    for name, weight in weights.items():
        wanted = expected[name].dtype
        if weight.dtype != wanted and not (weight.dtype in FLOATS and wanted in FLOATS):
            raise ExportError(f"'{folder}': '{name}' is of {weight.dtype}; {wanted} is needed here")
    fill(module, weights, f"'{folder}'")
    training.fitted.fill_(True)
