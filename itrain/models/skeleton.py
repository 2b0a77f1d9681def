"""Skeletons: transformers' models on the meta device, made of a config.json alone, without weights or a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from itrain.architectures import Architecture, bind_row, parse_row, require_components, row_of_type
from itrain.models.base import ModelError
from itrain.trust import printable

SHIPPED = Path(__file__).parents[1] / "assets" / "models"
"""Folders, by a model's name on the hub, of the config.json of each model that ``configs/model`` names."""

HEADS = {
    "ForImageClassification": "AutoModelForImageClassification",
    "ForAudioFrameClassification": "AutoModelForAudioFrameClassification",
    "ForSequenceClassification": "AutoModelForAudioClassification",
    "ForAudioClassification": "AutoModelForAudioClassification",
    "ForConditionalGeneration": "AutoModelForSpeechSeq2Seq",
    "ForCTC": "AutoModelForCTC",
}
"""Heads of models of images and sound, by what the names of their classes hold, and what loads them."""


def skeleton(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    components: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model that ``load_pretrained`` makes of the same arguments, on the meta device: shapes, and no values.

    Nothing is downloaded: see :func:`folder_of`. An encoder whose files have no head is given one all the same.

    Args:
        source: a folder, or a model's name on the hub.
        revision: branch, tag or commit on the hub.
        dtype: ``auto`` is the precision that the configuration names, else that of the weights beside it, else fp32.
        attn_implementation: as transformers calls it; None: its choice.
        components: the model's row, if not that of its type.

    Raises:
        ModelError: no config.json is at hand, transformers can make no model of it, or the row is wrong.
    """
    from transformers import AutoConfig

    folder, row = folder_of(source, revision), row_given(components, source)
    how: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        precision = _precision(folder, config) if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            model = auto_class(config, row).from_config(config, dtype=precision, trust_remote_code=False, **how)
    except Exception as error:  # damaged configurations raise of every kind
        reason = printable(next(iter(str(error).strip().splitlines()), ""))
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ModelError(f"model '{source}': transformers makes no model of its config.json: {kind}{reason}") from error
    give_row(model, row, source)
    _keep_in_float32(model, precision)
    return model.eval()


def row_given(components: Any, name: str) -> Architecture | None:
    """The row that was given with a model's name.

    Raises:
        ModelError: something in it is wrong.
    """
    try:
        return None if components is None else parse_row(components, f"model '{name}': its row")
    except ValueError as error:
        raise ModelError(str(error)) from error


def give_row(model: nn.Module, row: Architecture | None, name: str) -> None:
    """Give a model the row that was given with its name, if one was.

    Raises:
        ModelError: one of its paths is not in the model.
    """
    if row is None:
        return
    bind_row(model, row)
    try:
        require_components(model)
    except ValueError as error:
        raise ModelError(f"model '{name}': {error}") from error


def auto_class(config: Any, row: Architecture | None = None) -> Any:
    """The class of transformers that makes or loads a model of a configuration, whose row may be given with it."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    row = row or row_of_type(config.model_type)
    if row is not None and row.media is not None:
        return _class_with_saved_head(config)
    if row is not None and "decoder" in row.stacks:
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM if row is None or row.causal else AutoModelForMaskedLM


def _class_with_saved_head(config: Any) -> Any:
    """Of a model of images or sound: the class with the head that was saved, by the class's name; else without one."""
    import transformers

    saved = next(iter(getattr(config, "architectures", None) or ()), "")
    return next((getattr(transformers, auto) for head, auto in HEADS.items() if head in saved), transformers.AutoModel)


def folder_of(source: str, revision: str | None = None) -> Path:
    """The folder on this machine that has a model's config.json: its own, the hub's cache, or what itrain ships.

    Raises:
        ModelError: there is none.
    """
    own = Path(source).expanduser()
    if own.is_dir() or source.startswith((".", "/", "~")):
        if (own / "config.json").is_file():
            return own
        lack = "the folder has no config.json" if own.is_dir() else "there is no such folder"
        raise ModelError(f"model '{source}': {lack}; give a folder that has one")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json", revision=revision or "main")
    if isinstance(cached, str):
        return Path(cached).parent
    if (SHIPPED / source / "config.json").is_file():
        return SHIPPED / source
    raise ModelError(
        f"model '{source}': its config.json is neither in the hub's cache nor among those that itrain ships; put it "
        "into a folder and give that: model=hf model.name=<folder>"
    )


def _precision(folder: Path, config: Any) -> torch.dtype:
    """What transformers takes for ``auto``: the configuration's, else that of the first floating weight."""
    from safetensors import safe_open

    if config.dtype is not None:
        return config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                found = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(
                    weights.get_slice(name).get_dtype()
                )
                if found is not None:
                    return found
    return torch.float32


def _keep_in_float32(model: nn.Module, precision: torch.dtype) -> None:
    """Widen the weights that their model's class keeps in fp32, as loading does and making does not."""
    always, in_half = (
        getattr(model, name, None) or () for name in ("_keep_in_fp32_modules_strict", "_keep_in_fp32_modules")
    )
    half = precision in (torch.float16, torch.bfloat16)
    names = {*(always if half else ()), *(in_half if precision == torch.float16 else ())}
    for path, parameter in model.named_parameters() if names else ():
        if names & set(path.split(".")):
            parameter.data = parameter.data.float()
