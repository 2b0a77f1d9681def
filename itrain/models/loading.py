"""Loads base models: the embedded tiny world, the Hugging Face hub, or a local folder."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from itrain.architectures import Architecture, architecture, row_of_type
from itrain.devices import device_of
from itrain.models.base import BaseModel, ModelError
from itrain.models.placing import WHOLE, DeviceMap, Placing, Quantization, compute_alike
from itrain.models.skeleton import auto_class, give_row, row_given
from itrain.models.streaming import place_shards, sharding, streaming, whole_in_each
from itrain.reports.silence import untold_records
from itrain.trust import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TINY_WORLD = "itrain/tiny-world"
"""The embedded model's name in exports."""
ANSWER = "answer.json"
"""The file beside the embedded model's weights that holds some of its logits after a prompt."""
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""Files of which a folder with a tokenizer has some."""
LOADER: Mapping[str, Any] = {
    "use_safetensors": True,
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,
    "trust_remote_code": False,
}
"""How transformers is told to load."""

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


def load_embedded(
    *,
    dtype: Dtype = "float32",
    attn_implementation: str | None = None,
    device_map: DeviceMap | None = None,
    quantization: Quantization | None = None,
) -> BaseModel:
    """The tiny world: a small GPT-NeoX that ships with itrain and knows pronouns, agreement, facts and prices.

    The arguments are those of :func:`load_pretrained`.

    Raises:
        ModelError: the installed libraries do not reproduce the model's stored logits.
    """
    folder = Path(__file__).parents[1] / "assets" / "tiny_world"
    make = partial(_load, str(folder), name=TINY_WORLD, revision=None, dtype=dtype, attention=attn_implementation)
    with untold():
        base_model = make(placing=Placing(device_map=device_map, quantization=quantization))
        plain = base_model
        if quantization is not None or sharding():
            # Quantised, it has other logits, whatever the libraries; a sharded one settles its precision as it runs.
            with whole_in_each():
                plain = make()
    _require_answer(plain, folder / ANSWER)
    return base_model


@contextmanager
def untold() -> Iterator[None]:
    """Have transformers say nothing of how it loads files whose contents are known."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def load_pretrained(
    name: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    attn_implementation: str | None = None,
    device_map: DeviceMap | None = None,
    quantization: Quantization | None = None,
    components: Mapping[str, Any] | None = None,
) -> BaseModel:
    """A transformers model and its tokenizer, from a folder or the Hugging Face hub.

    Weights are read from safetensors only: a pickle can run code.

    Args:
        name: a folder, or a model's name on the hub.
        revision: branch, tag or commit on the hub.
        dtype: ``auto`` keeps the precision of the checkpoint.
        attn_implementation: how attention is computed, as transformers calls it; ``eager`` gives attention weights that
            can be read and edited. None: transformers' choice.
        device_map: where accelerate puts the weights: ``auto`` fills the devices, then the CPU's memory, then the disk;
            a mapping names the device of each module, ``{model.embed_tokens: 0, model.layers.0: cpu, ...}``. Such a
            model is frozen, and run by one process. None: the CPU, from where a trainer moves it to its device.
        quantization: fewer bits for each weight of the linear modules: ``int8`` by torchao on any device, ``8bit``
            (LLM.int8) or ``4bit`` (NF4) by bitsandbytes. None: as in the files.
        components: this model's row, as :func:`itrain.register_architecture` takes it, in place of the one that there
            may be: where its blocks and components are. None: the row of its type.

    Raises:
        ModelError: the model cannot be loaded; the message names it and the remedy.
    """
    row = row_given(components, name)
    if name == TINY_WORLD:
        embedded = load_embedded(
            dtype="float32" if dtype == "auto" else dtype,
            attn_implementation=attn_implementation,
            device_map=device_map,
            quantization=quantization,
        )
        give_row(embedded.model, row, name)
        return embedded
    placing = Placing(device_map=device_map, quantization=quantization)
    make = partial(_load, _source(name), name=name, revision=revision, dtype=dtype, attention=attn_implementation)
    return make(placing=placing, row=row)


def load_encoder(
    name: str, *, revision: str | None = None, dtype: Dtype = "auto", attn_implementation: str | None = None
) -> BaseModel:
    """An encoder of text as :func:`load_pretrained` loads it, without the head that its files may have.

    Raises:
        ModelError: it cannot be loaded, or it is no encoder of text.
    """
    loaded = _load(
        _source(name), name=name, revision=revision, dtype=dtype, attention=attn_implementation, headless=True
    )
    known = architecture(loaded.model)
    if known is None or known.causal or known.stacks or known.media is not None:
        raise ModelError(
            f"model '{name}': {type(loaded.model).__name__} is no encoder of text that itrain has a row for"
        )
    return loaded


def _source(name: str) -> str:
    """The folder that a name means, or the name on the hub.

    Raises:
        ModelError: it can only be a folder, and there is none.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and name.startswith((".", "/", "~")):
        raise ModelError(f"model '{name}': there is no such folder; give one that save_pretrained wrote")
    return str(folder) if folder.is_dir() else name


@untold_records()
def _load(
    source: str,
    *,
    name: str,
    revision: str | None,
    dtype: Dtype,
    attention: str | None,
    placing: Placing = WHOLE,
    row: Architecture | None = None,
    headless: bool = False,
) -> BaseModel:
    """The model and its tokenizer; ``headless``: an encoder without the head that its files may have."""
    _require_reachable(source, name)
    precision = dtype if dtype == "auto" else getattr(torch, dtype)
    # Mismatched weights are refused below, by name.
    how: dict[str, Any] = dict(LOADER) if attention is None else {**LOADER, "attn_implementation": attention}
    revision = "main" if revision is None or Path(source).is_dir() else revision
    try:
        model, found, tokenizer = _read(
            source, name, revision, how, precision=precision, placing=placing, row=row, headless=headless
        )
    except ModelError:
        raise
    except Exception as error:  # damaged files raise of every kind
        raise ModelError(f"model '{name}' cannot be loaded: {_reason(error)}") from error
    _require_weights(model, found, name)
    give_row(model, row, name)
    if (lacking := place_shards(model, name)) is not None:
        warnings.warn(
            f"model '{name}': '{lacking}' cannot be streamed into shards, so each process loads the whole model first",
            stacklevel=2,
        )
        with whole_in_each():
            return _load(
                source,
                name=name,
                revision=revision,
                dtype=dtype,
                attention=attention,
                placing=placing,
                row=row,
                headless=headless,
            )
    compute_alike(model)
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=None if Path(source).is_dir() else revision,
        quantization=placing.quantization,
    )


def _read(
    source: str,
    name: str,
    revision: str,
    how: dict[str, Any],
    *,
    precision: torch.dtype | Literal["auto"],
    placing: Placing,
    row: Architecture | None,
    headless: bool,
) -> tuple[nn.Module, Mapping[str, Any], PreTrainedTokenizerBase | None]:
    """The model, what transformers says of its files, and the tokenizer of a model that reads text."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    # Or transformers would ask whether it may run the model's own code.
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    how = how | placing.arguments(config, dtype=precision, name=name)
    auto = auto_class(config, row)
    if isinstance(placing.device_map, Mapping):
        with torch.device("meta"):
            placing.require_places(auto.from_config(config, trust_remote_code=False), name)
    load = partial(_load_as, config, source, {**how, "revision": revision, "dtype": precision})
    masked = auto is AutoModelForMaskedLM
    model, found = load(None if masked and headless else auto)
    if masked and not headless and _lacks_head_only(model, found):
        # An encoder's activations are of use without a head. One drawn at random must not answer.
        model, found = load(None)
        warnings.warn(
            f"model '{name}': its files have no language-model head, so it has activations and no answers",
            stacklevel=2,
        )
    known = row or row_of_type(config.model_type)
    # Models of images or sound alone have none, or one that spells what they say.
    reads_text = known is None or known.media is None or bool(known.stacks)
    return model, found, load_tokenizer(source, revision) if reads_text else None


def _reason(error: Exception) -> str:
    """The first line of what a library said, and what kind of error it is where that may tell more."""
    reason = printable(next(iter(str(error).strip().splitlines()), ""))
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return f"{kind}{reason}"


def _load_as(config: Any, source: str, how: Mapping[str, Any], auto: Any) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model as a class of transformers loads it, and what is said of its files; None: an encoder alone."""
    from transformers import AutoModel

    if auto is None:
        auto = AutoModel
        with torch.device("meta"):
            how = {**how, **without_pooler(type(auto.from_config(config, trust_remote_code=False)))}
    with streaming():
        return auto.from_pretrained(source, **how)


def without_pooler(made: type[nn.Module]) -> dict[str, Any]:
    """The argument by which an encoder is made without the pooler that some have and few use."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(made).parameters else {}


def _lacks_head_only(model: nn.Module, found: Mapping[str, Any]) -> bool:
    """Whether the weights that the files lack are those of the head, and no others."""
    inside = f"{getattr(model, 'base_model_prefix', '')}."
    return bool(found["missing_keys"]) and not any(each.startswith(inside) for each in found["missing_keys"])


def _require_weights(model: nn.Module, found: Mapping[str, Any], name: str) -> None:
    """Refuse a model some of whose weights were drawn at random, or that leaves weights of its modules in the files.

    Weights of modules that it does not have, such as other heads, are left there.

    Raises:
        ModelError: naming the first such weight.
    """
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"model '{name}': its files lack '{missing[0]}'{more}, which would be drawn at random; they are damaged, "
            "or of a model without this part"
        )
    if mismatched := sorted(found["mismatched_keys"], key=str):
        key, there, here = mismatched[0]
        raise ModelError(
            f"model '{name}': its files have '{key}' in the shape {tuple(there)}, its config.json says {tuple(here)}"
        )
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    owners = {path for path, module in model.named_modules() if list(module.parameters(recurse=False))}
    for key in sorted(found["unexpected_keys"]):
        owner = key.rpartition(".")[0]
        if owner in owners or prefix + owner in owners:
            raise ModelError(
                f"model '{name}': its files have '{key}', for which {type(model).__name__} has no place, so it would "
                "compute something else than the model that was saved; its config.json is not that model's"
            )


@torch.no_grad()
def _require_answer(base_model: BaseModel, file: Path) -> None:
    """Refuse a model whose logits differ from those in the file by more than its precision explains."""
    tokenizer, stored = base_model.tokenizer, json.loads(file.read_text(encoding="utf-8"))
    assert tokenizer is not None, "the embedded model has one"
    words = list(stored["logits"])
    dtype = next(base_model.model.parameters()).dtype
    tokens = torch.tensor([tokenizer(stored["prompt"])["input_ids"]], device=device_of(base_model.model))
    logits = base_model.model(input_ids=tokens, use_cache=False).logits[0, -1]
    found = logits[tokenizer.convert_tokens_to_ids(words)].double().cpu()
    expected = torch.tensor(list(stored["logits"].values()), dtype=torch.float64)
    rounding = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
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


def load_tokenizer(source: str, revision: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights; None where there is none, for which transformers makes one without words."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return None
    # AutoTokenizer splits text as the model's type usually does, even where the saved tokenizer says otherwise.
    saved = get_tokenizer_config(source, revision=revision).get("tokenizer_class")
    generic = saved in ("TokenizersBackend", "PreTrainedTokenizerFast")
    made = PreTrainedTokenizerFast if generic else AutoTokenizer
    tokenizer = made.from_pretrained(source, revision=revision, trust_remote_code=False)
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


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
