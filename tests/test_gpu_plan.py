"""`itrain plan` on a GPU: the planned peak is what the allocator reports of the fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from itrain import config, experiment
from itrain.models import load_embedded
from itrain.planning import estimate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama with random weights and a billion parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    shape = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        dtype="bfloat16",
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(shape).to(torch.bfloat16)
    model.save_pretrained(folder)
    load_embedded().tokenizer.save_pretrained(folder)  # type: ignore[union-attr]
    return folder


@pytest.mark.parametrize("replay", ["auto", "off"])
def test_the_planned_peak_is_that_of_the_device(llama: Path, replay: str, tmp_path: Path) -> None:
    words = ["recipe=das_gender", "trainer=gpu", "trainer.devices=1", "model=hf", f"model.name={llama}"]
    words += ["data.keep=all", "data.train_pairs=256", "data.batch_size=64", "trainer.max_epochs=4"]
    words.append(f"network.replay={replay}")
    planned = estimate(config.request(words)).peak
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    experiment.fit(config.request(words), tmp_path)
    measured = torch.cuda.max_memory_allocated() - before
    print(f"planned {planned:,} of {measured:,} bytes measured: {planned / measured:.4f}")
    assert planned == pytest.approx(measured, rel=0.1)
