"""Loads base models: the embedded tiny world, the Hugging Face hub, a local folder, or your own module."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from itrain.architectures import ARCHITECTURES, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TINY_WORLD = "itrain/tiny-world"
"""The name under which exports speak of the embedded model."""
SAMPLED = 256
"""Values of each weight that enter a fingerprint."""

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


class ModelError(ValueError):
    """A base model cannot be loaded."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model with its tokenizer, and the name and revision it can be found under again."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None = None
    name: str = "custom"
    revision: str | None = None
    fingerprint: str = field(init=False)
    """Of the weights that were loaded, whatever is trained later."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", fingerprint(self.model))


def load_embedded(*, dtype: Dtype = "float32") -> BaseModel:
    """The tiny world: a small GPT-NeoX that ships with itrain and knows pronouns, agreement, facts and prices."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return _load(str(Path(__file__).parent / "assets" / "tiny_world"), name=TINY_WORLD, revision=None, dtype=dtype)
    finally:
        if shown:
            logging.enable_progress_bar()


def load_pretrained(*, name: str, revision: str | None = None, dtype: Dtype = "auto") -> BaseModel:
    """A transformers model and its tokenizer, from a folder or the Hugging Face hub.

    Weights are read from safetensors only: a pickle can run code.

    Args:
        name: a folder, or a model's name on the hub.
        revision: branch, tag or commit on the hub.
        dtype: ``auto`` keeps the precision of the checkpoint.

    Raises:
        ModelError: the model cannot be had; the message names it and the remedy.
    """
    if name == TINY_WORLD:
        return load_embedded(dtype="float32" if dtype == "auto" else dtype)
    if Path(name).expanduser().is_dir():
        return _load(str(Path(name).expanduser()), name=name, revision=None, dtype=dtype)
    if name.startswith((".", "/", "~")):
        raise ModelError(f"model '{name}': there is no such folder")
    return _load(name, name=name, revision=revision, dtype=dtype)


def fingerprint(model: nn.Module) -> str:
    """A hash of the model's shapes and of evenly spaced values of each weight.

    The values enter in bfloat16, so that a model has one fingerprint whether loaded in fp32 or bf16.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(unwrap(model).state_dict().items()):
        flat = weight.detach().flatten()
        stride = max(1, flat.numel() // SAMPLED)
        sample = flat[::stride][:SAMPLED].cpu().to(torch.bfloat16).contiguous().view(torch.uint8)
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _load(source: str, *, name: str, revision: str | None, dtype: Dtype) -> BaseModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    _require_reachable(source, name)
    try:
        revision = revision or "main"
        config = AutoConfig.from_pretrained(source, revision=revision)
        row = ARCHITECTURES.get(config.model_type)
        auto = AutoModelForCausalLM if row is None or row.causal else AutoModelForMaskedLM
        model = auto.from_pretrained(
            source, revision=revision, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True
        )
        tokenizer = _load_tokenizer(source, revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model '{name}' cannot be loaded: {reason}") from error
    return BaseModel(model=model, tokenizer=tokenizer, name=name, revision=None if Path(source).is_dir() else revision)


def _load_tokenizer(source: str, revision: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    # AutoTokenizer splits text as the model's type usually does, even where the saved tokenizer says otherwise.
    saved = get_tokenizer_config(source, revision=revision).get("tokenizer_class")
    generic = saved in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(source, revision=revision)


def _require_reachable(source: str, name: str) -> None:
    """Refuse at once a folder without weights, and a hub model that is neither cached nor to be had."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model '{name}': the folder has no config.json; save a model there with save_pretrained")
        if not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"model '{name}': the folder has no weights (*.safetensors); save them there with save_pretrained"
            )
        return
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except HfHubHTTPError as error:
        raise ModelError(
            f"model '{name}': the Hugging Face hub refuses it ({error.response.status_code}); check its name, "
            "or log in with `hf auth login`"
        ) from error
    except Exception as error:  # the transport's errors have no base class that the hub promises
        raise ModelError(
            f"model '{name}' is not in the cache and the Hugging Face hub cannot be reached ({error}); go online once, "
            "or give a folder: model=hf model.name=<folder>"
        ) from error
