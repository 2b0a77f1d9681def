"""The layouts of files in which sparse autoencoders are shared; they are read as tensors and plain data alone."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple, get_args

import numpy
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from itrain.checkpoints import read_tensors
from itrain.interventions.sae import Dictionary, Normalization
from itrain.trust import QuotingError, TrustError, read_json, shown

Tensors = Mapping[str, Tensor]
LOOSE = 4
"""How many times larger than their file arrays may be."""


class SAEError(QuotingError):
    """A sparse autoencoder cannot be found or read; the message is one line that names the file."""


class Layout(NamedTuple):
    """The files of a layout, and what reads them."""

    name: str
    settings: str | None
    """The file with the settings."""
    weights: tuple[str, ...]
    """The names that the file with the weights may have."""
    read: Callable[[Mapping[str, Any], Tensors, str], Dictionary]


def read_dictionary(folder: str | Path) -> Dictionary:
    """The weights of the sparse autoencoder in a folder, in fp32, in whichever layout it is.

    Raises:
        SAEError: there is none, or a file is damaged, lacks a tensor, has one of another shape or one that is not
            finite, or is of an architecture that is not read.
    """
    folder = Path(folder)
    layout = next((each for each in LAYOUTS if (folder / (each.settings or each.weights[0])).is_file()), None)
    if layout is None:
        raise SAEError(f"'{folder}' holds no SAE: it has none of {markers()}")
    file = next((folder / name for name in layout.weights if (folder / name).is_file()), None)
    if file is None:
        raise SAEError(f"'{folder}' has a {layout.settings} and no {' or '.join(layout.weights)}; fetch it too")
    try:
        settings = read_json(folder / layout.settings) if layout.settings else {}
        if not isinstance(settings, dict):
            raise SAEError(f"'{folder / str(layout.settings)}' is damaged: it holds no object")
        return _checked(layout.read(settings, _tensors(file), f"'{file}'"), f"'{file}'")
    except TrustError as error:
        raise SAEError(str(error)) from error


def markers() -> str:
    """The files by which a folder is known to hold an SAE."""
    return ", ".join(f"{each.settings or each.weights[0]} ({each.name})" for each in LAYOUTS)


def _tensors(file: Path) -> Tensors:
    """What a file holds, by name; a pickle is read as tensors alone."""
    if file.suffix == ".npz":
        return _arrays(file)
    if file.suffix == ".pt":
        found = read_tensors(file, "file of tensors")
        if not isinstance(found, Mapping) or not all(isinstance(each, Tensor) for each in found.values()):
            raise SAEError(f"'{file}' holds something else than tensors by their names")
        return found
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise SAEError(f"'{file}' is damaged: {error}") from error


def _arrays(file: Path) -> Tensors:
    try:
        with zipfile.ZipFile(file) as parts:
            if sum(each.file_size for each in parts.infolist()) > LOOSE * file.stat().st_size:
                raise SAEError(f"'{file}' takes far more memory than its size, as no weights do")
        with numpy.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(numpy.asarray(arrays[name])) for name in arrays.files}
    except (zipfile.BadZipFile, ValueError, TypeError, OSError, EOFError) as error:
        if isinstance(error, SAEError):
            raise
        raise SAEError(f"'{file}' is damaged: {error}") from error


def _sae_lens(settings: Mapping[str, Any], tensors: Tensors, place: str) -> Dictionary:
    """SAELens: ``W_enc`` (hidden, features), ``W_dec`` (features, hidden); older files name a TopK another way."""
    kind = settings.get("architecture") or "standard"
    activation = settings.get("activation_fn_str") or settings.get("activation_fn") or "relu"
    kind = "topk" if activation == "topk" else kind
    if kind not in ("standard", "jumprelu", "topk") or activation not in ("relu", "topk"):
        raise _unread(place, kind if kind not in ("standard", "jumprelu", "topk") else activation)
    normalization = settings.get("normalize_activations") or "none"
    if normalization is True or normalization == "expected_average_only_in":
        raise SAEError(
            f"{place} expects activations that were scaled by a factor which it does not hold (normalize_activations "
            "expected_average_only_in); fold the factor into its weights and save it again"
        )
    if _is_centred(settings):
        if normalization != "none":
            raise SAEError(f"{place} is of a model with centred writing weights, and normalises too, which is not read")
        normalization = "centred"
    elif normalization not in get_args(Normalization):
        raise SAEError(f"{place}: normalize_activations is {shown(normalization)}, which is not known")
    if (scaling := tensors.get("scaling_factor")) is not None and not bool((scaling == 1).all()):
        raise SAEError(f"{place} has a scaling_factor that is not 1; fold it into W_dec and save it again")
    found = _plain(tensors, place)._replace(
        threshold=_named(tensors, "threshold", place) if kind == "jumprelu" else None,
        k=_count(settings, place) if kind == "topk" else None,
        subtracts=bool(settings.get("apply_b_dec_to_input", True)),
        normalization=normalization,
    )
    if not settings.get("rescale_acts_by_decoder_norm"):
        return found
    norms = found.decoder.norm(dim=1)
    return found._replace(
        encoder=found.encoder * norms, encoder_bias=found.encoder_bias * norms, decoder=found.decoder / norms[:, None]
    )


def _is_centred(settings: Mapping[str, Any]) -> bool:
    """Whether what the model writes to its stream had its mean taken away in training, as TransformerLens may do."""
    metadata = settings.get("metadata")
    known = {**settings, **(metadata if isinstance(metadata, Mapping) else {})}
    model, hook = known.get("model_from_pretrained_kwargs"), str(known.get("hook_name") or known.get("hook_point"))
    writes = "resid" in hook or hook.endswith("_out")
    return writes and isinstance(model, Mapping) and model.get("center_writing_weights") is True


def _gemma_scope(settings: Mapping[str, Any], tensors: Tensors, place: str) -> Dictionary:
    """Gemma Scope: a JumpReLU, and nothing is subtracted from the input.

    Its transcoders and its autoencoders of embeddings have the same file, and are told by their folders alone.
    """
    folders = PurePath(place.strip("'")).parent.parts
    if any("transcoder" in each for each in folders):
        raise SAEError(f"{place} is a transcoder, from what an MLP reads to what it writes, and no SAE")
    if "embedding" in folders:
        raise SAEError(
            f"{place} is of embeddings before the model multiplies them by sqrt(hidden size), and sites are behind "
            "that; name the SAE of a layer"
        )
    return _jumprelu(tensors, place)


def _jumprelu(tensors: Tensors, place: str) -> Dictionary:
    return _plain(tensors, place)._replace(threshold=_named(tensors, "threshold", place), subtracts=False)


def _dictionary_learning(settings: Mapping[str, Any], tensors: Tensors, place: str) -> Dictionary:
    """dictionary_learning: ``encoder.weight`` (features, hidden), ``decoder.weight`` (hidden, features), or SAELens's.

    A BatchTopK has a threshold for all features, which stands for its k at inference.
    """
    found = settings.get("trainer")
    trainer: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    kind = trainer.get("dict_class")
    if kind == "JumpReluAutoEncoder":
        return _jumprelu(tensors, place)
    if kind == "MatryoshkaBatchTopKSAE":
        return _plain(tensors, place)._replace(threshold=_of_all(tensors, place))
    biases = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "AutoEncoderTopK": "b_dec"}
    biases |= {"BatchTopKSAE": "b_dec"}
    if kind not in biases:
        raise _unread(place, kind)
    return Dictionary(
        encoder=_named(tensors, "encoder.weight", place).T,
        encoder_bias=_named(tensors, "encoder.bias", place),
        decoder=_named(tensors, "decoder.weight", place).T,
        decoder_bias=_named(tensors, biases[kind], place),
        threshold=_of_all(tensors, place) if kind == "BatchTopKSAE" else None,
        k=_count(trainer, place) if kind == "AutoEncoderTopK" else None,
        subtracts=kind != "AutoEncoderNew",
    )


LAYOUTS = (
    Layout("SAELens", "cfg.json", ("sae_weights.safetensors",), _sae_lens),
    Layout("Gemma Scope", None, ("params.npz",), _gemma_scope),
    Layout("dictionary_learning", "config.json", ("ae.safetensors", "ae.pt"), _dictionary_learning),
)


def _plain(tensors: Tensors, place: str) -> Dictionary:
    encoder, encoder_bias, decoder, decoder_bias = (
        _named(tensors, name, place) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    return Dictionary(encoder, encoder_bias, decoder, decoder_bias)


def _named(tensors: Tensors, name: str, place: str) -> Tensor:
    if name not in tensors:
        raise SAEError(f"{place} has no tensor '{name}'; it has {', '.join(map(str, tensors)) or 'none'}")
    if not tensors[name].is_floating_point():
        raise SAEError(f"{place}: '{name}' is of {tensors[name].dtype}, and no floating point number")
    return tensors[name].float()


def _of_all(tensors: Tensors, place: str) -> Float[Tensor, " features"]:
    """One threshold, for each feature; one that is negative was never set, and holds back nothing."""
    threshold = _named(tensors, "threshold", place)
    bias = _named(tensors, "encoder.bias" if "encoder.bias" in tensors else "b_enc", place)
    if threshold.numel() != 1:
        raise SAEError(f"{place}: 'threshold' has the shape {tuple(threshold.shape)}, and is not one number")
    return threshold.clamp(min=0).flatten().expand_as(bias).clone()


def _count(settings: Mapping[str, Any], place: str) -> int:
    older = settings.get("activation_fn_kwargs")
    k = settings.get("k", older.get("k") if isinstance(older, Mapping) else None)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise SAEError(f"{place}: the settings beside it say that k is {shown(k)}, and not how many features it keeps")
    return k


def _unread(place: str, kind: Any) -> SAEError:
    return SAEError(f"{place} has the architecture {shown(kind)}; itrain reads ReLU, JumpReLU and TopK autoencoders")


def _checked(found: Dictionary, place: str) -> Dictionary:
    """Refuse shapes that do not fit each other, and numbers that are none."""
    if found.encoder.ndim != 2:
        raise SAEError(f"{place}: the encoder has the shape {tuple(found.encoder.shape)}, and is no matrix")
    hidden, features = found.encoder.shape
    expected = {"encoder_bias": (features,), "decoder": (features, hidden), "decoder_bias": (hidden,)}
    expected |= {} if found.threshold is None else {"threshold": (features,)}
    for name, shape in expected.items():
        if (got := tuple(getattr(found, name).shape)) != shape:
            raise SAEError(f"{place}: the {name} has the shape {got}; the encoder {(hidden, features)} needs {shape}")
    if found.k is not None and found.k > features:
        raise SAEError(f"{place}: k is {found.k}, and it has {features} features")
    for name in ("encoder", *expected):
        if not getattr(found, name).isfinite().all():
            raise SAEError(f"{place}: the {name} is not finite; the file is damaged, or its training went wrong")
    return found
