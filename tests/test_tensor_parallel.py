"""Runs whose processes split each block: they learn and measure what one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from itrain.cli import main
from itrain.models import load_embedded
from tests.commands import only_run
from tests.sharded import DESCENT, EXAMPLES, PAIRS, STEPS, figures, fit, require_alike, state

ROUNDING = 1e-4
"""Sums over features are made in another order in each layer, and not only sums over examples as in sharded runs."""
RUNS = {
    "das_gender": ["recipe=das_gender", "site=layer1.block_output@name", *PAIRS],
    "iit": ["recipe=das_gender", "site=layer0.mlp_output@name", "training=iit", *PAIRS, *DESCENT],
    "probe_gender": ["recipe=probe_gender", "site=layer1.attention_output@last", *PAIRS],
    "reft_style": ["recipe=reft_style", "site=layer1.block_output@last", *EXAMPLES, "training.optimizer.lr=0.01"],
}


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A random Llama that two processes can split, with the embedded model's tokenizer."""
    monkeypatch.chdir(tmp_path)
    embedded = load_embedded()
    assert embedded.tokenizer is not None
    config = LlamaConfig(
        vocab_size=embedded.model.config.vocab_size,  # type: ignore[union-attr]
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=embedded.tokenizer.bos_token_id,
        eos_token_id=embedded.tokenizer.eos_token_id,
        pad_token_id=embedded.tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    embedded.tokenizer.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_processes_that_split_blocks_learn_and_measure_what_one_does(name: str, llama: str) -> None:
    words = [
        *STEPS,
        *RUNS[name],
        "model=hf",
        f"+model.name={llama}",
        *(["data.keep=all"] if "style" not in name else []),
    ]
    assert main(["fit", *words, "trainer=cpu", "output=one"]) == 0
    one, two = only_run(Path("one")), fit("two", *words, "trainer=fsdp_tp_cpu")
    losses = [json.loads((run / "losses.json").read_text()) for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=ROUNDING)
    require_alike(state(two), state(one), rel=ROUNDING)
    # Counts too: each example is that of both processes.
    assert figures(two) == pytest.approx(figures(one), rel=1e-5, abs=1e-6)
    require_alike(*(load_file(run / "export" / "intervention.safetensors") for run in (two, one)), rel=ROUNDING)
