"""On an accelerator: quantised models, and models of which a half is offloaded to the CPU's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from itrain.cli import main
from itrain.models import load_pretrained
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from tests.commands import SMALL
from tests.models import COMMON
from tests.replaying import answer_and_gradients, distance, examples

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

DEVICE = "cuda"
SITES = ["layer0.block_output@2", "layer1.query_output.head1@last"]
PACKAGES = {"int8": "torchao", "8bit": "bitsandbytes", "4bit": "bitsandbytes"}
QUICK = [word for word in SMALL if not word.startswith("trainer.accelerator")] + ["trainer=gpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = AutoConfig.for_model("llama", **{**COMMON, "hidden_size": 64, "num_key_value_heads": 2})
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return str(place)


def step(network: Any) -> list[torch.Tensor]:
    return answer_and_gradients(network, SITES, examples().to(DEVICE), examples(seed=1).to(DEVICE))


@pytest.mark.parametrize("quantization", PACKAGES)
def test_quantised_models_are_edited_and_replayed(quantization: Any, folder: str) -> None:
    pytest.importorskip(PACKAGES[quantization])
    base_model = load_pretrained(folder, quantization=quantization, device_map={"": 0}, dtype="float16")
    network = make_network(base_model.model)
    expected = step(HookedNetwork(base_model.model))
    for _ in range(3):
        assert distance(step(network), expected) < 0.02


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_half_that_is_offloaded_is_computed_on_the_device(gradient_checkpointing: bool, folder: str) -> None:
    where = {"model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "cpu"}
    where |= {f"model.{path}": 0 for path in ("embed_tokens", "rotary_emb", "norm")}
    base_model, plain = load_pretrained(folder, device_map=where), load_pretrained(folder)
    assert base_model.fingerprint == plain.fingerprint
    expected = step(HookedNetwork(plain.model.to(DEVICE)))
    network = make_network(base_model.model, replay="on", gradient_checkpointing=gradient_checkpointing)
    for _ in range(3):
        assert distance(step(network), expected) < 1e-4


@pytest.mark.parametrize("words", [["model.quantization=int8"], ["model.device_map=auto"]], ids=["int8", "auto"])
def test_a_recipe_runs(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "int8" in words[0]:
        pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "recipe=das_gender", *QUICK, *words]) == 0
