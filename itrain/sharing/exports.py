"""Exports: the trained weights and what they belong to, as safetensors and JSON, never pickle."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from itrain import __version__
from itrain.architectures import otherwise_described, unwrap
from itrain.factories import FactoryError, Limited, class_path, describe, find_class, limits_of_model, rebuild
from itrain.files import finite, replacing, replacing_folder
from itrain.identity import IdentityError, difference
from itrain.interventions.base import otherwise
from itrain.interventions.orthogonal import OrthonormalRows
from itrain.models import BaseModel, load_pretrained
from itrain.models.placing import otherwise_quantized
from itrain.networks.choose import plain_network
from itrain.shards import divided, gathered, is_first, is_sharded
from itrain.tasks.base import Task
from itrain.training.base import Training
from itrain.trust import QuotingError, TrustError, find, packages_of, read_json, require_names, require_readable, shown
from itrain.weights import WeightError, earlier_fingerprints, fingerprint

WEIGHTS = "intervention.safetensors"
CONFIG = "intervention_config.json"
EXPORT = "export"
"""The folder in a run's folder that holds its export."""
FORMAT = 2
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Precisions in which weights are read; they are cast to that of the module."""
UNEVEN = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far R R^T may be from 1 for rounding alone, where it is more than 1e-3."""
OWN = "custom"
"""The name of a base model that was given as a module."""


class ExportError(QuotingError):
    """An export cannot be written, or does not belong where it is loaded."""


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
        "base_model": base_model.described() if base_model is not None else _known_base_model(training),
        "metrics": finite(metrics or {}),
        "versions": {"itrain": __version__}
        | {package: version(package) for package in ("torch", "transformers", "lightning")},
        "configuration": configuration,
    }
    if needed := packages_of(config):
        config["trust"] = needed
    text, values = json.dumps(config), _values(training.exported)
    divided_among = any(map(is_sharded, values.values()))
    weights = gathered(values) if divided_among else values
    if divided_among and not is_first():
        return folder
    weights = {name: each.detach().cpu().contiguous().clone() for name, each in weights.items()}
    try:
        require_readable(json.loads(text), text, f"the description of the export to '{folder}'")
    except TrustError as error:
        raise ExportError(str(error)) from error
    _require_finite(weights, training.exported, f"the export to '{folder}'")
    with replacing_folder(folder) as beside:
        with replacing(beside / WEIGHTS) as file:
            _save(weights, file)
        (beside / CONFIG).write_text(text + "\n")
    return folder


def _known_base_model(training: Training) -> dict[str, Any]:
    """The base model that a training remembers, or whose name on the hub the model itself knows."""
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
        ExportError: the folder holds no export, a damaged one, or one of another format.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            inside = folder / EXPORT
            meant = f"; did you mean '{inside}'?" if (inside / name).is_file() else ""
            raise ExportError(f"'{folder}' is not an export: it has no {name}{meant}")
    try:
        config = read_json(folder / CONFIG)
    except TrustError as error:
        raise ExportError(str(error)) from error
    if not isinstance(config, dict):
        raise ExportError(f"'{folder / CONFIG}' is damaged: it holds no object")
    if config.get("format") != FORMAT:
        raise ExportError(f"'{folder}' has format {config.get('format')}; this itrain reads format {FORMAT}")
    base = config.get("base_model")
    if not isinstance(base, dict) or not all(isinstance(base.get(key), str) for key in ("name", "type", "fingerprint")):
        raise ExportError(f"'{folder / CONFIG}' is damaged: it does not say what its base model is")
    return config


def read_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """The shape of each weight of an export, from the header of its file; no weight is read.

    Raises:
        ExportError: the file is damaged, for example shorter than its header says.
    """
    try:
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ExportError(f"'{Path(folder) / WEIGHTS}' is damaged: {error}") from error


def limited_to(folder: str | Path) -> Limited:
    """A context in which no module can be made that is far larger than an export's weights."""
    elements = sum(torch.Size(shape).numel() for shape in read_shapes(folder).values())
    return Limited(elements, str(folder))


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


def load_weights(training: Training, folder: str | Path) -> None:
    """Load the weights of an export into a training module.

    Raises:
        ExportError: the file is damaged, or a weight is missing, unknown, of another shape or kind, not finite, or has
            rows that are not orthonormal where they must be.
    """
    module, shapes = training.exported, read_shapes(folder)
    expected = _values(module)
    added = {name for name in _saved_lately(module) if name not in shapes}  # which exports of earlier versions lack
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


def fill(module: nn.Module, weights: Mapping[str, Tensor], place: str) -> None:
    """Set weights of a module, parametrised ones by their values.

    Raises:
        ExportError: a weight is not finite, has rows that are not orthonormal where they must be, or is the fingerprint
            of something else than what is here.
    """
    places = {name: _place(module, name) for name in weights}
    there = {name: getattr(*owned) for name, owned in places.items()}
    cast_weights = {name: weight.to(there[name].device, there[name].dtype) for name, weight in weights.items()}
    _require_finite(cast_weights, module, place)  # what is large in fp64 is infinite in fp32
    for name, (owner, leaf) in places.items():
        if _is_orthonormal(owner, leaf):
            _require_orthonormal(weights[name], f"{place}: '{name}'")
        if (other := otherwise(owner, leaf, weights[name])) is not None:
            raise ExportError(f"{place}: {other}")
    with torch.no_grad():
        for name, (owner, leaf) in places.items():
            if parametrize.is_parametrized(owner, leaf):
                setattr(owner, leaf, cast_weights[name])
            else:
                there[name].copy_(divided(cast_weights[name], there[name]))


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _is_orthonormal(owner: nn.Module, leaf: str) -> bool:
    if not parametrize.is_parametrized(owner, leaf):
        return False
    (*_, last) = cast(Any, owner.parametrizations)[leaf]
    return isinstance(last, OrthonormalRows)


def _require_finite(weights: Mapping[str, Tensor], module: nn.Module, place: str) -> None:
    for name, weight in weights.items():
        if not weight.is_floating_point():
            continue
        owner, leaf = _place(module, name)
        # Infinity in a buffer is a mask or a bound.
        found = weight.isnan() if leaf in owner._buffers else ~weight.isfinite()
        if found.any():
            raise ExportError(f"{place}: the weight '{name}' is not finite; the training that made it went wrong")


def _require_orthonormal(rows: Tensor, place: str) -> None:
    """Refuse rows that setting them would turn into others, without a word."""
    exact = rows.double()
    apart = float((exact @ exact.T - torch.eye(len(exact), dtype=exact.dtype)).abs().max())
    if apart > UNEVEN.get(rows.dtype, 1e-3):
        raise ExportError(f"{place} has rows that are not orthonormal (R R^T is {apart:.2g} from 1); it is damaged")


def _saved_lately(module: nn.Module) -> set[str]:
    """The weights that earlier versions did not save, and that keep their initial values without them."""
    return {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        for name in getattr(part, "lately", ())
    }


def _values(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, with the value of each parametrised weight under its own name."""
    state = {name: tensor for name, tensor in module.state_dict().items() if "parametrizations." not in name}
    for path, owner in module.named_modules():
        if parametrize.is_parametrized(owner):
            leaves = cast(nn.ModuleDict, owner.parametrizations)
            state |= {f"{path}.{leaf}" if path else leaf: getattr(owner, leaf) for leaf in leaves}
    return state
