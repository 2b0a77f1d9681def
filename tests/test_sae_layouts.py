"""Sparse autoencoders are read from the files of three libraries, as their formulas say, and refused in one line."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from itrain.saes import SAE, SAEError, read_dictionary
from tests.sae_files import FEATURES, HIDDEN, Arrays, arrays, dictionary_learning, gemma_scope, sae_lens

H = numpy.random.default_rng(5).normal(size=(7, HIDDEN)) * 3


def relu(before: numpy.ndarray) -> numpy.ndarray:
    return numpy.maximum(before, 0)


def jump(before: numpy.ndarray, threshold: numpy.ndarray) -> numpy.ndarray:
    return relu(before) * (before > threshold)


def top(before: numpy.ndarray, k: int) -> numpy.ndarray:
    found = numpy.zeros_like(before)
    for row, each in zip(found, before, strict=True):
        kept = numpy.argsort(each)[-k:]
        row[kept] = relu(each[kept])
    return found


def pre(w: Arrays, inputs: numpy.ndarray = H, *, subtracts: bool = True) -> numpy.ndarray:
    w = {name: each.astype(numpy.float64) for name, each in w.items()}
    return (inputs - w["b_dec"] * subtracts) @ w["W_enc"] + w["b_enc"]


def out(w: Arrays, features: numpy.ndarray) -> numpy.ndarray:
    return features @ w["W_dec"].astype(numpy.float64) + w["b_dec"]


def linear(w: Arrays, bias: str) -> dict[str, numpy.ndarray]:
    """The same weights as two linear layers of torch have them."""
    return {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        bias: w["b_dec"],
    }


def layer_norm(w: Arrays) -> numpy.ndarray:
    mean, size = H.mean(1, keepdims=True), H.std(1, ddof=1, keepdims=True)
    return out(w, relu(pre(w, (H - mean) / (size + 1e-5)))) * size + mean


def constant_norm(w: Arrays) -> numpy.ndarray:
    size = numpy.linalg.norm(H, axis=1, keepdims=True) / HIDDEN**0.5
    return out(w, relu(pre(w, H / size))) * size


def rescaled(w: Arrays) -> numpy.ndarray:
    norms = numpy.linalg.norm(w["W_dec"].astype(numpy.float64), axis=1)
    return out(w, top(pre(w) * norms, 3) / norms)


Write, Formula = Callable[[Path, Arrays], Path], Callable[[Arrays], numpy.ndarray]
CENTRED = {
    "hook_name": "blocks.1.hook_resid_pre",
    "model_from_pretrained_kwargs": {"center_writing_weights": True},
}
ONE = numpy.float32(0.7)
CASES: dict[str, tuple[Write, Formula]] = {
    "SAELens ReLU": (lambda to, w: sae_lens(to, w, architecture="standard"), lambda w: out(w, relu(pre(w)))),
    "SAELens, nothing subtracted": (
        lambda to, w: sae_lens(to, w, architecture="standard", apply_b_dec_to_input=False),
        lambda w: out(w, relu(pre(w, subtracts=False))),
    ),
    "SAELens JumpReLU": (
        lambda to, w: sae_lens(to, w, architecture="jumprelu"),
        lambda w: out(w, jump(pre(w), w["threshold"])),
    ),
    "SAELens TopK": (lambda to, w: sae_lens(to, w, architecture="topk", k=3), lambda w: out(w, top(pre(w), 3))),
    "SAELens TopK, an older file": (
        lambda to, w: sae_lens(to, w, activation_fn_str="topk", activation_fn_kwargs={"k": 5}),
        lambda w: out(w, top(pre(w), 5)),
    ),
    "SAELens TopK by decoder norms": (
        lambda to, w: sae_lens(to, w, architecture="topk", k=3, rescale_acts_by_decoder_norm=True),
        rescaled,
    ),
    "SAELens, not normalised in an older file": (
        lambda to, w: sae_lens(to, w, normalize_activations=False),
        lambda w: out(w, relu(pre(w))),
    ),
    "SAELens, scaled by 1": (
        lambda to, w: sae_lens(
            to, {**w, "scaling_factor": numpy.ones_like(w["b_enc"])}, finetuning_scaling_factor=False
        ),
        lambda w: out(w, relu(pre(w))),
    ),
    "SAELens layer norm": (lambda to, w: sae_lens(to, w, normalize_activations="layer_norm"), layer_norm),
    "SAELens constant norm": (
        lambda to, w: sae_lens(to, w, normalize_activations="constant_norm_rescale"),
        constant_norm,
    ),
    "SAELens, of a model with centred writing weights": (
        lambda to, w: sae_lens(to, w, metadata=CENTRED),
        lambda w: out(w, relu(pre(w, H - H.mean(1, keepdims=True)))) + H.mean(1, keepdims=True),
    ),
    "Gemma Scope": (gemma_scope, lambda w: out(w, jump(pre(w, subtracts=False), w["threshold"]))),
    "dictionary_learning AutoEncoder": (
        lambda to, w: dictionary_learning(to, linear(w, "bias"), "pt", dict_class="AutoEncoder"),
        lambda w: out(w, relu(pre(w))),
    ),
    "dictionary_learning AutoEncoderNew": (
        lambda to, w: dictionary_learning(to, linear(w, "decoder.bias"), "safetensors", dict_class="AutoEncoderNew"),
        lambda w: out(w, relu(pre(w, subtracts=False))),
    ),
    "dictionary_learning AutoEncoderTopK": (
        lambda to, w: dictionary_learning(to, linear(w, "b_dec"), "pt", dict_class="AutoEncoderTopK", k=4),
        lambda w: out(w, top(pre(w), 4)),
    ),
    "dictionary_learning BatchTopKSAE": (
        lambda to, w: dictionary_learning(
            to, {**linear(w, "b_dec"), "threshold": ONE}, "safetensors", dict_class="BatchTopKSAE", k=4
        ),
        lambda w: out(w, jump(pre(w), ONE)),
    ),
    "dictionary_learning MatryoshkaBatchTopKSAE": (
        lambda to, w: dictionary_learning(to, {**w, "threshold": ONE}, "pt", dict_class="MatryoshkaBatchTopKSAE"),
        lambda w: out(w, jump(pre(w), ONE)),
    ),
    "dictionary_learning JumpReluAutoEncoder": (
        lambda to, w: dictionary_learning(to, w, "pt", dict_class="JumpReluAutoEncoder"),
        lambda w: out(w, jump(pre(w, subtracts=False), w["threshold"])),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_decoded_is_the_formula_of_the_library_in_fp64(case: str, tmp_path: Path) -> None:
    write, formula = CASES[case]
    weights = arrays()
    sae = SAE(HIDDEN, source=str(write(tmp_path, weights)), error="drop").double()
    features, error = sae.encode(torch.from_numpy(H))
    # Decoder norms are folded into weights in fp32, once.
    close = 2e-5 if "norms" in case else 1e-9
    torch.testing.assert_close(sae.decode(features, error).numpy(), formula(weights), rtol=close, atol=close)
    assert 0 < (features != 0).sum(-1).double().mean() < FEATURES


def test_a_threshold_that_was_never_set_holds_back_nothing(tmp_path: Path) -> None:
    tensors = {**linear(arrays(), "b_dec"), "threshold": numpy.float32(-1)}
    found = read_dictionary(dictionary_learning(tmp_path, tensors, "pt", dict_class="BatchTopKSAE"))
    assert found.threshold is not None and bool((found.threshold == 0).all())


def without(name: str) -> Arrays:
    return {each: value for each, value in arrays().items() if each != name}


def with_nan() -> Arrays:
    found = arrays()
    found["W_dec"][3, 2] = numpy.nan
    return found


def packed(folder: Path) -> Path:
    numpy.savez_compressed(folder / "params.npz", W_enc=numpy.zeros((4000, 4000), numpy.float32))
    return folder


def objects(folder: Path) -> Path:
    numpy.savez(folder / "params.npz", W_enc=numpy.array([{}], dtype=object))
    return folder


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code was run",)


def code(folder: Path) -> Path:
    dictionary_learning(folder, {}, "pt", dict_class="AutoEncoder")
    torch.save({"bias": Runs()}, folder / "ae.pt")
    return folder


def old_pickle(folder: Path) -> Path:
    dictionary_learning(folder, {}, "pt", dict_class="AutoEncoder")
    (folder / "ae.pt").write_bytes(pickle.dumps(Runs()))
    return folder


def settings_alone(folder: Path) -> Path:
    (folder / "cfg.json").write_text("{}")
    return folder


def no_object(folder: Path) -> Path:
    sae_lens(folder, arrays())
    (folder / "cfg.json").write_text("[1]")
    return folder


def cut(folder: Path) -> Path:
    file = sae_lens(folder, arrays()) / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return folder


def whole_numbers(folder: Path) -> Path:
    sae_lens(folder, arrays())
    tensors = {name: torch.from_numpy(each).int() for name, each in arrays().items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an empty folder": (lambda to: to, "holds no SAE: it has none of cfg.json"),
    "settings without weights": (settings_alone, "has a cfg.json and no sae_weights.safetensors; fetch it too"),
    "settings that are no object": (no_object, "cfg.json' is damaged: it holds no object"),
    "a cut file": (cut, "sae_weights.safetensors' is damaged"),
    "whole numbers": (whole_numbers, "'W_enc' is of torch.int32"),
    "a missing tensor": (lambda to: sae_lens(to, without("b_enc")), "has no tensor 'b_enc'; it has"),
    "a missing threshold": (lambda to: gemma_scope(to, without("threshold")), "has no tensor 'threshold'"),
    "other shapes": (
        lambda to: sae_lens(to, {**arrays(), "b_enc": arrays()["b_dec"]}),
        r"the encoder_bias has the shape \(6,\); the encoder \(6, 16\) needs \(16,\)",
    ),
    "NaN": (lambda to: sae_lens(to, with_nan()), "the decoder is not finite"),
    "another architecture": (lambda to: sae_lens(to, arrays(), architecture="gated"), "has the architecture 'gated'"),
    "another activation": (lambda to: sae_lens(to, arrays(), activation_fn="tanh-relu"), "architecture 'tanh-relu'"),
    "another class": (
        lambda to: dictionary_learning(to, arrays(), "pt", dict_class="GatedAutoEncoder"),
        "has the architecture 'GatedAutoEncoder'",
    ),
    "a transcoder": (lambda to: sae_lens(to, arrays(), architecture="transcoder"), "has the architecture 'transcoder'"),
    "a transcoder of Gemma Scope": (
        lambda to: gemma_scope(to / "models--google--gemma-scope-2b-pt-transcoders" / "layer_3", arrays()),
        "is a transcoder, from what an MLP reads to what it writes",
    ),
    "embeddings of Gemma Scope": (
        lambda to: gemma_scope(to / "embedding" / "width_4k", arrays()),
        "is of embeddings before the model multiplies them by sqrt",
    ),
    "a factor that is not in the file, in an older file": (
        lambda to: sae_lens(to, arrays(), normalize_activations=True),
        "fold the factor into its weights",
    ),
    "a factor that is not in the file": (
        lambda to: sae_lens(to, arrays(), normalize_activations="expected_average_only_in"),
        "fold the factor into its weights",
    ),
    "another normalisation": (
        lambda to: sae_lens(to, arrays(), normalize_activations="batch"),
        "normalize_activations is 'batch'",
    ),
    "centred and normalised": (
        lambda to: sae_lens(to, arrays(), metadata=CENTRED, normalize_activations="layer_norm"),
        "centred writing weights, and normalises too",
    ),
    "a scaling factor": (
        lambda to: sae_lens(to, {**arrays(), "scaling_factor": arrays()["b_enc"]}),
        "scaling_factor that is not 1",
    ),
    "no k": (lambda to: sae_lens(to, arrays(), architecture="topk"), "say that k is 'None'"),
    "a k that is too large": (lambda to: sae_lens(to, arrays(), architecture="topk", k=17), "k is 17, and it has 16"),
    "arrays of objects": (objects, "params.npz' is damaged: .*allow_pickle=False"),
    "arrays that are packed": (packed, "takes far more memory than its size"),
    "a pickle that runs code": (code, "cannot be read as a file of tensors: it asks for code to be run"),
    "an old pickle": (old_pickle, "cannot be read as a file of tensors"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_file_is_refused_in_one_line(fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write, line = WRONG[fault]
    with pytest.raises(SAEError, match=line) as found:
        read_dictionary(write(tmp_path))
    assert "\n" not in str(found.value)
    assert "code was run" not in capfd.readouterr().out


def test_arrays_that_are_packed_a_little_are_read(tmp_path: Path) -> None:
    numpy.savez_compressed(tmp_path / "params.npz", **arrays())  # type: ignore[arg-type]
    with zipfile.ZipFile(tmp_path / "params.npz") as parts:
        assert all(each.compress_type == zipfile.ZIP_DEFLATED for each in parts.infolist())
    assert read_dictionary(tmp_path).encoder.shape == (HIDDEN, FEATURES)


def test_settings_of_a_file_by_others_are_data(tmp_path: Path) -> None:
    folder = sae_lens(tmp_path, arrays())
    (folder / "cfg.json").write_text(json.dumps({"architecture": "\x1b[2Jstandard"}))
    with pytest.raises(SAEError) as found:
        read_dictionary(folder)
    assert "\x1b" not in str(found.value)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("SAELens") and "centred" not in case])
def test_what_is_read_agrees_with_sae_lens(case: str, tmp_path: Path) -> None:
    sae_lens_itself = pytest.importorskip("sae_lens")
    folder = CASES[case][0](tmp_path, arrays())
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({"dtype": "float32", "device": "cpu", **cfg}))
    theirs, ours = sae_lens_itself.SAE.load_from_disk(folder), SAE(HIDDEN, source=str(folder), error="drop")
    inputs = torch.from_numpy(H).float()
    features, error = ours.encode(inputs)
    torch.testing.assert_close(ours.decode(features, error), theirs(inputs), atol=1e-4, rtol=1e-4)
