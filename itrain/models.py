"""Loads base models: the embedded tiny world, the Hugging Face hub, a local folder, or your own module."""

from __future__ import annotations

import hashlib
import json
import re
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from itrain.architectures import ARCHITECTURES, unwrap
from itrain.trust import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TINY_WORLD = "itrain/tiny-world"
"""The embedded model's name in exports."""
ANSWER = "answer.json"
"""The file beside the embedded model's weights that holds some of its logits after a prompt."""
SAMPLED = 256
"""Values of each weight that enter a fingerprint."""

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


class ModelError(ValueError):
    """A base model cannot be loaded."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model with its tokenizer, and the name and revision from which it can be loaded again."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None = None
    name: str = "custom"
    revision: str | None = None
    fingerprint: str = field(init=False)
    """Of the weights as loaded; later training does not change it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", fingerprint(self.model))


def load_embedded(*, dtype: Dtype = "float32") -> BaseModel:
    """The tiny world: a small GPT-NeoX that ships with itrain and knows pronouns, agreement, facts and prices.

    Raises:
        ModelError: the installed libraries do not reproduce the model's stored logits.
    """
    from transformers.utils import logging

    shown, folder = logging.is_progress_bar_enabled(), Path(__file__).parent / "assets" / "tiny_world"
    logging.disable_progress_bar()
    try:
        base_model = _load(str(folder), name=TINY_WORLD, revision=None, dtype=dtype)
    finally:
        if shown:
            logging.enable_progress_bar()
    _require_answer(base_model, folder / ANSWER)
    return base_model


def load_pretrained(*, name: str, revision: str | None = None, dtype: Dtype = "auto") -> BaseModel:
    """A transformers model and its tokenizer, from a folder or the Hugging Face hub.

    Weights are read from safetensors only: a pickle can run code.

    Args:
        name: a folder, or a model's name on the hub.
        revision: branch, tag or commit on the hub.
        dtype: ``auto`` keeps the precision of the checkpoint.

    Raises:
        ModelError: the model cannot be loaded; the message names it and the remedy.
    """
    if name == TINY_WORLD:
        return load_embedded(dtype="float32" if dtype == "auto" else dtype)
    if Path(name).expanduser().is_dir():
        return _load(str(Path(name).expanduser()), name=name, revision=None, dtype=dtype)
    if name.startswith((".", "/", "~")):
        raise ModelError(f"model '{name}': there is no such folder")
    return _load(name, name=name, revision=revision, dtype=dtype)


def with_random_weights(base_model: BaseModel, *, seed: int) -> BaseModel:
    """The same architecture and tokenizer with fresh weights, drawn by the model's own initialisation.

    Results on it cannot be due to what the model has learned. Zhang and Bowman 2018, "Language Modeling Teaches You
    More Syntax than Translation Does", section 3.

    Raises:
        ModelError: a module does not say how it is initialised, or the weights do not match the architecture.
    """
    model = unwrap(base_model.model)
    remedy = "set sweep.random_model=false to go without"
    with torch.random.fork_rng(devices=[]):
        # The CPU's alone: an accelerator's draws go on where they were.
        torch.default_generator.manual_seed(seed)
        # Transformers' models are initialised as they are made, from a configuration that they might change.
        made = getattr(type(model), "config_class", None) is not None
        fresh = type(model)(deepcopy(model.config)) if made else deepcopy(model).cpu()
        for name, part in () if made else fresh.named_modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
            elif list(part.parameters(recurse=False)):
                raise ModelError(
                    f"model '{base_model.name}': {type(part).__name__} at '{name}' has weights and no "
                    f"reset_parameters() that draws them anew; give it one, or {remedy}"
                )
    new, old = list(fresh.parameters()), list(model.parameters())
    if [p.shape for p in new] != [p.shape for p in old] or not all(p.is_floating_point() for p in old):
        raise ModelError(
            f"model '{base_model.name}': its weights are not those of its architecture (adapters or quantisation?), so "
            f"it has no randomly initialised twin; {remedy}"
        )
    for drawn, given in zip(new, old, strict=True):
        drawn.data = drawn.data.to(given.dtype)
    fresh.to(old[0].device).train(model.training)
    return BaseModel(model=fresh, tokenizer=base_model.tokenizer, name=f"{base_model.name}, randomly initialised")


def fingerprint(model: nn.Module) -> str:
    """A hash of the model's shapes and of evenly spaced values of each weight, in the model's order.

    The values enter in bfloat16, so that a model has one fingerprint whether loaded in fp32 or bf16. Weights' names do
    not enter: releases of transformers rename them.
    """
    digest = hashlib.sha256()
    for weight in unwrap(model).state_dict().values():
        digest.update(_sample(weight))
    return digest.hexdigest()[:16]


def earlier_fingerprints(model: nn.Module) -> set[str]:
    """What exports of itrain 0.1 may know the model by: hashes with the weights' names, one for each name of a head."""
    state = unwrap(model).state_dict()
    found = set()
    for head in ("lm_head", "embed_out"):
        named = {re.sub("^(lm_head|embed_out)(?=[.])", head, name): weight for name, weight in state.items()}
        digest = hashlib.sha256()
        for name, weight in sorted(named.items()):
            digest.update(f"{name} ".encode() + _sample(weight))
        found.add(digest.hexdigest()[:16])
    return found


def _sample(weight: Tensor) -> bytes:
    flat = weight.detach().flatten()
    stride = max(1, flat.numel() // SAMPLED)
    sample = flat[::stride][:SAMPLED].cpu().to(torch.bfloat16).contiguous().view(torch.uint8)
    return f"{tuple(weight.shape)} ".encode() + sample.numpy().tobytes()


def _load(source: str, *, name: str, revision: str | None, dtype: Dtype) -> BaseModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    _require_reachable(source, name)
    try:
        revision = revision or "main"
        # Or transformers would ask whether it may run the model's own code.
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        row = ARCHITECTURES.get(config.model_type)
        auto = AutoModelForCausalLM if row is None or row.causal else AutoModelForMaskedLM
        model = auto.from_pretrained(
            source,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
        tokenizer = _load_tokenizer(source, revision)
    except Exception as error:  # damaged files raise of every kind
        reason = printable(next(iter(str(error).strip().splitlines()), ""))
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ModelError(f"model '{name}' cannot be loaded: {kind}{reason}") from error
    return BaseModel(model=model, tokenizer=tokenizer, name=name, revision=None if Path(source).is_dir() else revision)


@torch.no_grad()
def _require_answer(base_model: BaseModel, file: Path) -> None:
    """Refuse a model whose logits differ from those in the file by more than its precision explains."""
    tokenizer, stored = base_model.tokenizer, json.loads(file.read_text(encoding="utf-8"))
    assert tokenizer is not None, "the embedded model has one"
    words = list(stored["logits"])
    weight = next(base_model.model.parameters())
    tokens = torch.tensor([tokenizer(stored["prompt"])["input_ids"]], device=weight.device)
    logits = base_model.model(input_ids=tokens, use_cache=False).logits[0, -1]
    found = logits[tokenizer.convert_tokens_to_ids(words)].double().cpu()
    expected = torch.tensor(list(stored["logits"].values()), dtype=torch.float64)
    rounding = 4 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
    # A NaN must fail this too.
    if bool(((found - expected).abs() <= max(stored["tolerance"], rounding)).all()):
        return
    columns = "; ".join(
        f"{word} {there:.2f} instead of {here:.2f}" for word, there, here in zip(words, found, expected, strict=True)
    )
    packages = ("transformers", "tokenizers", "torch")
    raise ModelError(
        f"model '{base_model.name}': {', '.join(f'{name} {version(name)}' for name in packages)} do not reproduce "
        f"the logits stored with its weights, so no result on it would hold: after '{stored['prompt']}', {columns}. "
        "Install the releases that it was made with: "
        + ", ".join(f"{name} {stored['versions'][name]}" for name in packages)
    )


def _load_tokenizer(source: str, revision: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    # AutoTokenizer splits text as the model's type usually does, even where the saved tokenizer says otherwise.
    saved = get_tokenizer_config(source, revision=revision).get("tokenizer_class")
    generic = saved in ("TokenizersBackend", "PreTrainedTokenizerFast")
    made = PreTrainedTokenizerFast if generic else AutoTokenizer
    return made.from_pretrained(source, revision=revision, trust_remote_code=False)


def _require_reachable(source: str, name: str) -> None:
    """Refuse at once a folder without weights, and a hub model that is neither cached nor reachable."""
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
