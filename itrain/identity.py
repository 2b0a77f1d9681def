"""Identity: what a model computes, portable between processes, precisions and releases of the libraries."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from itrain.architectures import unwrap
from itrain.shards import own_class
from itrain.weights import Digest, fits, projected, served_by, weights, were_half

EXACT, ROUNDED = 1e-4, 5e-3
"""How far projections of equal weights may differ, relative to the norm of what is projected: where both enter in
bfloat16 from the same or a higher precision, and where one was in float16 before."""
LARGEST = 1 << 24
"""The largest number in a configuration that was saved."""
PER_WEIGHT = 4
"""Numbers that an identity holds of each weight, besides its shape."""
NOT_COMPUTED = re.compile(
    r"^_|drop|_token_ids?$|label|output_attentions|output_hidden_states|initializer|version|dtype$"
    r"|^(architectures|auto_map|chunk_size_feed_forward|finetuning_task|name_or_path|problem_type|pretraining_tp"
    r"|quantization_config|return_dict|task_specific_params|tie_\w+|tokenizer_class|use_cache|vocab_size)$"
)
"""Names in a configuration that do not change what a loaded model in eval mode computes. The weights tell of ties and
of the size of the vocabulary, which may be longer."""


class IdentityError(ValueError):
    """What was saved of a model's identity is damaged."""


def identity(model: nn.Module) -> dict[str, Any]:
    """What the model computes, as plain data: its configuration or its modules' attributes, and projected weights.

    Functions that its code calls, and attributes that were changed after a model was made from its configuration, do
    not enter. All processes that share a divided model must ask for it. A model on a server has its name and revision
    in place of its weights.

    Raises:
        WeightError: a weight has no values here.
    """
    return fingerprint_and_identity(model)[1]


def fingerprint_and_identity(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Both names of a model, for which its weights are looked at once."""
    model, rows, precisions, fitting = unwrap(model), [], set(), []
    served = served_by(model)
    digest = Digest(served)
    for weight in () if served is not None else weights(model):
        lines = weight.lines()
        digest.add(weight, lines)
        rows.append([*weight.value.shape, *projected(lines)])
        precisions.add(str(weight.value.dtype).removeprefix("torch."))
        fitting.append(fits(lines))
    if were_half(fitting):
        precisions.add("float16")
    return digest.name, {
        "configuration": _settings(model),
        "vocabulary": _vocabulary(model),
        "modules": [text for _, text in _modules(model)],
        "precisions": sorted(precisions),
        "weights": rows,
        **({} if served is None else {"served": {"name": served.repo_id, "revision": served.revision}}),
    }


def difference(saved: Mapping[str, Any], model: nn.Module) -> str | None:
    """What differs between the model and one whose identity was saved; None where they compute the same.

    Rounding to float16 or bfloat16 is no difference, nor are a longer vocabulary and other names. Where the weights of
    either were on a server, only the configurations are compared, and a warning says so.

    Raises:
        IdentityError: what was saved is damaged.
        WeightError: a weight has no values here.
    """
    model = unwrap(model)
    _require_whole(saved)
    found = _configurations(saved, model)
    if not found and "served" not in saved and served_by(model) is None:
        found = _described(saved, model) or _weights(saved, model)
    elif not found:
        warnings.warn(
            "the base model's weights were not compared, since they are or were on a server: only its configuration is "
            "that of the model which the export was trained on",
            stacklevel=2,
        )
    return f"{', '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''}" if found else None


def _require_whole(saved: Mapping[str, Any]) -> None:
    """Refuse what is no identity: exports are written by others.

    Raises:
        IdentityError: naming the part that is damaged.
    """
    settings, rows, texts = (saved.get(part) for part in ("configuration", "weights", "modules"))
    sound = {
        "configuration": "configuration" in saved
        and (settings is None or (isinstance(settings, dict) and _are_small(settings))),
        "modules": isinstance(texts, list),
        "weights": isinstance(rows, list)
        and all(isinstance(row, list) and len(row) >= PER_WEIGHT and _are_numbers(row) for row in rows),
    }
    for part, is_sound in sound.items():
        if not is_sound:
            raise IdentityError(f"the {part} in the base model's identity are damaged")


def _are_numbers(values: Sequence[object]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _are_small(settings: Mapping[str, Any]) -> bool:
    """Whether no number is so large that a configuration of it could take all memory."""
    return all(
        _are_small(value) if isinstance(value, dict) else not isinstance(value, int) or abs(value) <= LARGEST
        for value in settings.values()
    )


def _settings(model: nn.Module) -> dict[str, Any] | None:
    """The settings of a model's configuration that change what is computed, as JSON holds them; None without one."""
    config: Any = getattr(model, "config", None)
    return _settings_of(config) if hasattr(config, "to_dict") else None


def _settings_of(config: Any) -> dict[str, Any]:
    # Text for what JSON does not hold, such as infinity.
    return json.loads(json.dumps(_pruned(config.to_dict()), default=str), parse_constant=str)


def _vocabulary(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    return getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "vocab_size", None)


def _pruned(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change what is computed, with those of parts within."""
    return {
        name: _pruned(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if not NOT_COMPUTED.search(str(name))
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _configurations(saved: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Settings that differ, after the installed class has read the saved ones as its own."""
    there, own = saved["configuration"], _settings(model)
    if there is None or own is None:
        return [] if there is own else ["only one of the two has a configuration"]
    if there.get("model_type") != own.get("model_type"):
        return [f"model_type {there.get('model_type')} -> {own.get('model_type')}"]
    if there == own:
        return []
    from huggingface_hub.errors import StrictDataclassError

    config: Any = model.config
    try:
        # Another release may have other names and defaults.
        read = type(config).from_dict(_pruned(there))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = str(error).splitlines()[0]
        raise IdentityError(f"the saved configuration is none of {type(config).__name__}: {reason}") from error
    was, now = _flat(_settings_of(read)), _flat(own)
    # What the installed class knows nothing of does not change what it computes.
    known = [name for name in dict.fromkeys([*was, *now]) if name.partition(".")[0] in own]
    return [f"{name} {was.get(name)} -> {now.get(name)}" for name in known if was.get(name) != now.get(name)]


def _modules(model: nn.Module) -> list[tuple[str, str]]:
    """Path and attributes of the modules that no configuration describes: a model's own, and adapters."""
    own = _settings(model) is None
    return [
        (path or own_class(model).__name__, text)
        for path, module in model.named_modules()
        if (own or _adapts(module)) and (text := _text(module))
    ]


def _text(module: nn.Module) -> str:
    """The attributes of a module that its forward may depend on; torch's own modules say them."""
    kind = own_class(module)
    if kind.__module__.startswith("torch."):
        return f"{kind.__name__}({module.extra_repr()})"
    if _adapts(module):
        own: Any = module
        return f"active={own.active_adapters}, disabled={own.disable_adapters}, scaling={own.scaling}"
    plain = {
        name: getattr(value, "__name__", value)  # of functions, such as activations
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name != "training"
    }
    return ", ".join(f"{name}={value}" for name, value in plain.items() if isinstance(value, int | float | str))


def _adapts(module: nn.Module) -> bool:
    """Whether the module is a layer to which PEFT has added adapters."""
    return hasattr(module, "active_adapters") and isinstance(getattr(module, "scaling", None), dict)


def _described(saved: Mapping[str, Any], model: nn.Module) -> list[str]:
    here = _modules(model)
    if len(here) != len(saved["modules"]):
        return [f"{len(saved['modules'])} modules that no configuration describes -> {len(here)}"]
    return [f"{path}: {was} -> {now}" for (path, now), was in zip(here, saved["modules"], strict=True) if was != now]


def _weights(saved: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The names of weights that differ by more than rounding."""
    here, there = list(weights(model)), saved["weights"]
    if len(here) != len(there):
        return [f"{len(there)} weights -> {len(here)}"]
    grown, half = (saved.get("vocabulary"), _vocabulary(model)), "float16" in saved.get("precisions", ())
    found, fitting, compared = [], [], []
    for weight, each in zip(here, there, strict=True):
        lines, own, shape = weight.lines(), tuple(weight.value.shape), tuple(each[:-PER_WEIGHT])
        fitting.append(fits(lines))
        if None not in grown and (*shape[:1], *own[:1]) == grown and shape[0] in range(1, own[0]):
            lines, own = weight.lines(int(shape[0])), (*shape[:1], *own[1:])
        compared.append((own, projected(lines)))
    now_half = were_half(fitting)
    for weight, each, (own, now) in zip(here, there, compared, strict=True):
        shape, was = tuple(each[:-PER_WEIGHT]), each[-PER_WEIGHT:]
        rounded = half != (now_half or weight.value.dtype == torch.float16)
        if shape != own:
            found.append(f"the shape of '{weight.name}' {shape} -> {own}")
        elif not _close(was, now, ROUNDED if rounded else EXACT):
            found.append(f"the weight '{weight.name}'")
    return found


def _close(saved: Sequence[float], found: Sequence[float], tolerance: float) -> bool:
    """Whether norms and projections differ by no more than that of the norms; NaN differs from all."""
    scales = [saved[place // 2 * 2] for place in range(PER_WEIGHT)]
    return all(abs(was - now) <= tolerance * scale + 1e-7 for was, now, scale in zip(saved, found, scales, strict=True))
