"""Models that are quantised, in half precision, or placed by a device map: frozen, they are trained on as ever."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from itrain.cli import main
from itrain.devices import device_of, is_dispatched
from itrain.inputs import ModelInputs
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.models import (
    BaseModel,
    ModelError,
    fingerprint,
    load_embedded,
    load_pretrained,
    placing,
    with_random_weights,
)
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.probes import LinearProbe
from itrain.quantized import count_weights, quantized_weights
from itrain.sharing import export, load
from itrain.sharing.merging import MergeError, merge
from itrain.sharing.reading import ExportError
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from itrain.training.base import Training
from itrain.training.iit import InterchangeInterventionTraining
from itrain.weights import weights
from tests.models import COMMON, pairs
from tests.replaying import answer_and_gradients, distance, examples, replayed

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
]

SITES = ["layer0.block_output@2", "layer1.query_output.head1@last", "layer1.mlp_activation@word"]
LORA: dict[str, Any] = {"lora_rank": 2, "lora_targets": ["q_proj", "down_proj"]}
METHODS = {"int8": "torchao", "8bit": "bitsandbytes", "4bit": "bitsandbytes"}
PLACED = {"cpu": ["embed_tokens", "rotary_emb", "norm", "layers.1"], "disk": ["layers.0"]}

quantized = pytest.mark.parametrize(
    "quantization",
    [
        pytest.param(method, marks=pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed"))
        for method, package in METHODS.items()
    ],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A llama in a folder, as wide as kernels of 4 bits need it."""
    config = AutoConfig.for_model(
        "llama", **{**COMMON, "hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}
    )
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return str(place)


def placed(folder: str, **settings: Any) -> BaseModel:
    """The model with a block on the disk."""
    where = {f"model.{path}": device for device, paths in PLACED.items() for path in paths}
    return load_pretrained(folder, device_map={**where, "lm_head": "disk"}, **settings)


def search(model: nn.Module, **settings: Any) -> AlignmentSearch:
    network = make_network(model, **settings)
    return AlignmentSearch(
        network=network, sites=SITES[:1], intervention=partial(DAS, rank=2), optimizer=partial(torch.optim.Adam, lr=0.1)
    )


def fit(training: Training) -> None:
    batches = [pairs(examples(), examples(seed=1))] * 2
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet)
    trainer.fit(training, torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=lambda each: each))


# --- quantised


@quantized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_model_computes_with_the_values_that_are_compared(
    quantization: Any, dtype: Any, folder: str
) -> None:
    base_model = load_pretrained(folder, quantization=quantization, dtype=dtype)
    plain = load_pretrained(folder, dtype=dtype).model
    found = dict(weights(base_model.model))
    assert {f"{name}.weight" for name, each in plain.named_modules() if isinstance(each, nn.Linear)} - {
        "lm_head.weight"
    } == set(quantized_weights(base_model.model))
    assert count_weights(base_model.model) == count_weights(plain)
    assert fingerprint(base_model.model) == base_model.fingerprint != fingerprint(plain)
    for name, weight in plain.named_parameters():
        assert not torch.equal(found[name].to(weight.dtype), weight) or name not in quantized_weights(base_model.model)
        weight.data.copy_(found[name])
    ours, theirs = (
        answer_and_gradients(HookedNetwork(model), SITES, examples(), examples(seed=1))
        for model in (base_model.model, plain)
    )
    if dtype == "float32" and quantization != "8bit":
        assert distance(ours, theirs) < 1e-4
    else:  # activations are rounded too, and gradients that are nearly 0 differ most
        assert distance(ours[:1], theirs[:1]) < 0.1
    assert fingerprint(base_model.model) == base_model.fingerprint


@quantized
def test_a_quantised_model_is_named_in_inference_mode(quantization: Any, folder: str) -> None:
    """In which a trainer tests."""
    base_model = load_pretrained(folder, quantization=quantization)
    with torch.inference_mode():
        assert fingerprint(base_model.model) == base_model.fingerprint


@quantized
def test_replay_serves_a_quantised_model_or_says_why_not(quantization: Any, folder: str) -> None:
    model = load_pretrained(folder, quantization=quantization).model
    network, sites = make_network(model), [Site.parse(site) for site in SITES[:1]]
    how = network.prepare([sites], [examples()], [examples(seed=1)])
    if quantization == "8bit":
        assert how == "the whole model, under plain hooks (its 8-bit modules round the tokens of a run together)"
        return
    assert isinstance(network, ReplayNetwork)
    expected = answer_and_gradients(network.hooked, SITES[:1], examples(), examples(seed=1))
    for _ in range(2):
        found = answer_and_gradients(network, SITES[:1], examples(), examples(seed=1))
        assert distance(found, expected) < 1e-4
    assert replayed(network, SITES[:1], "suffix")


@quantized
def test_what_was_trained_on_a_quantised_model_is_loaded_onto_its_like_alone(
    quantization: Any, folder: str, tmp_path: Path
) -> None:
    base_model, plain = load_pretrained(folder, quantization=quantization), load_pretrained(folder)
    training = search(base_model.model)
    before = fingerprint(base_model.model)
    fit(training)
    assert fingerprint(base_model.model) == before
    export(training, tmp_path / "quantised", base_model=base_model)
    loaded = load(tmp_path / "quantised")
    assert quantized_weights(loaded.network.model)
    for ours, theirs in zip(loaded.exported.parameters(), training.exported.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ExportError, match=f"those were quantised; load it with quantization={quantization}$"):
        load(tmp_path / "quantised", plain)
    export(search(plain.model), tmp_path / "plain", base_model=plain)
    with pytest.raises(ExportError, match="its weights are quantised, and those were not; load it without"):
        load(tmp_path / "plain", base_model)


@quantized
def test_adapters_alone_are_trained_over_quantised_weights(quantization: Any, folder: str, tmp_path: Path) -> None:
    def train(model: nn.Module, **settings: Any) -> InterchangeInterventionTraining:
        network = make_network(model, trainable=True)
        optimizer = partial(torch.optim.Adam, lr=0.01)
        return InterchangeInterventionTraining(
            network=network, sites=SITES[:1], intervention=partial(DAS, rank=2), optimizer=optimizer, **settings
        )

    base_model = load_pretrained(folder, quantization=quantization)
    with pytest.raises(ValueError, match=r"q_proj.weight' and 13 more weights of LlamaForCausalLM are quantised and"):
        train(base_model.model)
    with pytest.raises(ValueError, match=r"parts: 'model.layers.1' holds '.*weight', which is quantised"):
        train(load_pretrained(folder, quantization=quantization).model, parts=["model.layers.1"])
    assert train(load_pretrained(folder, quantization=quantization).model, parts=["*.input_layernorm"])
    values = {name: each.clone() for name, each in weights(base_model.model)}
    training = train(base_model.model, **LORA)
    fit(training)
    trained = [each for each in training.network.parameters() if each.requires_grad]
    assert len(trained) == 8 and all(bool(each.count_nonzero()) for each in trained)
    for name, each in weights(base_model.model):
        if "lora" not in name:
            assert torch.equal(each, values[name.replace(".base_layer", "")]), name
    with pytest.raises(MergeError, match="are quantised, so nothing can be folded"):
        merge(training)
    export(training, tmp_path, base_model=load_pretrained(folder, quantization=quantization))
    assert isinstance(load(tmp_path), InterchangeInterventionTraining)


@quantized
def test_edits_are_attached_to_and_probes_read_a_quantised_model(quantization: Any) -> None:
    ours, theirs = load_embedded(quantization=quantization), load_embedded()
    values = dict(weights(ours.model))
    for name, weight in theirs.model.named_parameters():
        weight.data.copy_(values[name])
    theirs = BaseModel(model=theirs.model, tokenizer=theirs.tokenizer, name="dequantised")
    tokenizer = ours.tokenizer
    assert tokenizer is not None
    texts = [tokenizer.bos_token + text for text in ("Lisa waited because", "John jumped because")]
    tokens = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    answers, scores = [], []
    for each in (ours, theirs):
        network = make_network(each.model)
        swap = AlignmentSearch(network=network, sites=["layer2.block_output@1"], intervention=FullVector)
        before = each.model(input_ids=tokens[0]).logits
        with swap.attach(each, source="John jumped because"):
            answers.append(each.model(input_ids=tokens[0]).logits)
        assert torch.equal(each.model(input_ids=tokens[0]).logits, before)
        assert not torch.allclose(answers[-1], before, atol=0.1)
        probe, site = LinearProbe(80, num_classes=2), Site.parse("layer2.block_output@1")
        read = network.read(ModelInputs(arguments={"input_ids": tokens[1]}), [site])[site]
        nn.init.constant_(probe.scores.weight, 0.1)
        scores.append(probe(read) - probe.scores.bias)
    rounding = 0.5 if quantization == "8bit" else 1e-3  # it rounds activations, too
    torch.testing.assert_close(*answers, atol=rounding, rtol=1e-3)
    torch.testing.assert_close(*scores, atol=rounding, rtol=1e-3)


@quantized
def test_the_random_twin_is_quantised_alike(quantization: Any, folder: str) -> None:
    base_model = load_pretrained(folder, quantization=quantization)
    twins = [with_random_weights(base_model, seed=seed) for seed in (5, 5, 6)]
    assert twins[0].fingerprint == twins[1].fingerprint not in (twins[2].fingerprint, base_model.fingerprint)
    assert quantized_weights(twins[0].model) == quantized_weights(base_model.model)
    assert base_model.model.config.quantization_config is not None


def test_what_cannot_be_quantised_is_refused_in_a_line(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("5bit", ["int8"]):
        with pytest.raises(ModelError, match=r"quantization=.* is unknown; use int8, 8bit, 4bit"):
            load_pretrained(folder, quantization=given)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="device_map=everywhere is none of auto"):
        load_pretrained(folder, device_map="everywhere")
    monkeypatch.setattr(placing, "find_spec", lambda package: None)
    with pytest.raises(ModelError, match=r"needs bitsandbytes: pip install 'itrain\[quantization\]'"):
        load_pretrained(folder, quantization="4bit")


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_files_that_are_quantised_are_loaded_as_they_are(folder: str, tmp_path: Path) -> None:
    base_model = load_pretrained(folder, quantization="int8")
    try:
        base_model.model.save_pretrained(tmp_path)
    except ValueError as error:
        pytest.skip(f"this torchao saves no such weights: {error}")
    again = load_pretrained(str(tmp_path))
    assert again.fingerprint == base_model.fingerprint and quantized_weights(again.model)
    with pytest.raises(ModelError, match=r"quantised already \(torchao\); leave quantization out"):
        load_pretrained(str(tmp_path), quantization="int8")


# --- placed by a device map


def test_a_placed_model_is_read_edited_and_trained_as_the_whole_one(folder: str, tmp_path: Path) -> None:
    base_model, plain = placed(folder), load_pretrained(folder)
    assert base_model.fingerprint == plain.fingerprint and is_dispatched(base_model.model)
    assert device_of(base_model.model).type == "cpu"
    whole, ours = HookedNetwork(plain.model), make_network(base_model.model, replay="on")
    assert isinstance(ours, ReplayNetwork)
    expected = answer_and_gradients(whole, SITES, examples("left"), examples("left", seed=1))
    assert (
        distance(answer_and_gradients(ours.hooked, SITES, examples("left"), examples("left", seed=1)), expected) < 1e-6
    )
    for _ in range(3):
        found = answer_and_gradients(ours, SITES, examples("left"), examples("left", seed=1))
        assert distance(found, expected) < 1e-4
    assert replayed(ours, SITES, "suffix") and any(store.used for store in ours.stores)
    edit = [(Site.parse("layer0.block_output@last"), lambda base: 2 * base)]
    tokens = [each.generate(examples(), edit, max_new_tokens=3) for each in (whole, ours)]
    assert torch.equal(*tokens)
    training, other = search(base_model.model), search(plain.model)
    other.load_state_dict(deepcopy(training.state_dict()))
    fit(training)
    fit(other)
    for one, two in zip(training.exported.parameters(), other.exported.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert base_model.model.model.layers[0].mlp.up_proj.weight.is_meta
    export(training, tmp_path, base_model=base_model)
    load(tmp_path, plain)
    load(tmp_path, placed(folder))


def test_what_is_taken_away_again_is_there_when_blocks_are_computed_again(folder: str) -> None:
    base_model, plain = placed(folder), load_pretrained(folder)
    network = make_network(base_model.model, gradient_checkpointing=True, replay="off")
    expected = answer_and_gradients(HookedNetwork(plain.model), SITES, examples(), examples(seed=1))
    assert distance(answer_and_gradients(network, SITES, examples(), examples(seed=1)), expected) < 1e-6
    block = base_model.model.model.layers[0]
    assert all(parameter.is_meta for parameter in block.parameters())


def test_a_placed_model_is_neither_moved_nor_trained_nor_run_by_several_processes(folder: str) -> None:
    model = placed(folder).model
    training = search(model)
    training.to(torch.float64)
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="placed by a device_map, by which its weights come and go"):
        InterchangeInterventionTraining(network=HookedNetwork(model, trainable=True), sites=SITES[:1], **LORA)
    with pytest.raises(MergeError, match="placed by a device_map"):
        merge(search(model))
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False)
    training = search(model)
    training.trainer = trainer
    with pytest.raises(ValueError, match="device_map places the model for one process, and DDPStrategy shares"):
        training.setup("fit")


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"model": "cpu", "lm_hea": "cpu"}, "there is no module 'lm_hea', did you mean 'lm_head'"),
        ({"model.layers.7": "cpu"}, "there is no module 'model.layers.7', did you mean 'model.layers.[01]'"),
        ({"modules": "cpu"}, "there is no module 'modules', did you mean 'model'"),
        ({"model": "cpu"}, "gives no device for 'lm_head.weight'"),
        ({"model": "cpus", "lm_head": "cpu"}, r"device_map\['model'\]=cpus is no device .*, did you mean 'cpu'"),
        (
            {"model": "meta", "lm_head": "cpu"},
            r"device_map\['model'\]=meta is no device for weights; there is cpu, disk",
        ),
        ({"": "cpu", "lm_head": "disk"}, "places 'lm_head', and the whole model, which holds it"),
        ({"model": "cpu", "model.layers.0": "disk"}, "places 'model.layers.0', and 'model', which holds it"),
    ],
)
def test_a_map_that_does_not_fit_the_model_is_refused_in_a_line(places: dict[str, str], said: str, folder: str) -> None:
    with pytest.raises(ModelError, match=said):
        load_pretrained(folder, device_map=places)


# --- from the command line


@pytest.mark.slow
@pytest.mark.parametrize("words", [["model.dtype=bfloat16"], ["model.quantization=int8"]], ids=["bf16", "int8"])
def test_das_finds_on_less_memory_what_it_finds_in_full_precision(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0].endswith("int8"):
        pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    found = []
    for number, more in enumerate(([], words)):
        given = ["fit", "recipe=das_gender", "trainer=cpu", "trainer.enable_progress_bar=false", f"output={number}"]
        assert main([*given, *more]) == 0
        (file,) = Path(str(number)).rglob("metrics.json")
        found.append(json.loads(file.read_text())["test/iia_argmax"])
    assert found[1] == pytest.approx(found[0], abs=0.02)
