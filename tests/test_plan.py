"""`itrain plan`: what a run takes, without weights, and the same refusals as a fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from itrain import config, experiment, opening
from itrain.cli import main
from itrain.models import BaseModel, load_embedded
from itrain.models.skeleton import SHIPPED, skeleton
from itrain.planning import estimate
from itrain.planning.memory import Memory

SMALL = ("recipe=das_gender", "trainer.max_epochs=2", "data.train_pairs=64", "data.validation_pairs=32")
CHECKPOINTED = ("network.replay=off", "network.gradient_checkpointing=true")


def peaks(words: Sequence[str], folder: Path, patch: pytest.MonkeyPatch) -> tuple[int, int]:
    """The planned peak of a fit, and that of its tensors as it runs, counted alike."""
    memory, load = Memory(), opening.base_model_of

    def loaded(*arguments: Any) -> BaseModel:
        made = load(*arguments)
        memory.hold([*made.model.parameters(), *made.model.buffers()])
        return made

    planned = estimate(config.request([*words])).peak
    patch.setattr(opening, "base_model_of", loaded)
    with memory:
        experiment.fit(config.request([*words]), folder)
    return planned, memory.peak


@pytest.mark.parametrize(
    "how",
    [
        pytest.param((), id="replay"),
        pytest.param(("network.replay=off",), id="hooks", marks=pytest.mark.slow),
        pytest.param(CHECKPOINTED, id="checkpointing", marks=pytest.mark.slow),
    ],
)
def test_the_planned_peak_is_that_of_the_run(
    how: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, measured = peaks([*SMALL, *how], tmp_path, monkeypatch)
    print(f"planned {planned:,} of {measured:,} bytes measured: {planned / measured:.4f}")
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("network.replay=off",), CHECKPOINTED], ids=["replay", "hooks", "checkpointing"])
def test_the_planned_peak_of_gpt2s_size_is_that_of_the_run(
    how: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(SHIPPED / "openai-community/gpt2")).save_pretrained(
        tmp_path / "model"
    )
    load_embedded().tokenizer.save_pretrained(tmp_path / "model")  # type: ignore[union-attr]
    words = [*SMALL, "model=hf", f"model.name={tmp_path / 'model'}", "data.keep=all", *how]
    planned, measured = peaks(words, tmp_path / "run", monkeypatch)
    print(f"planned {planned:,} of {measured:,} bytes measured: {planned / measured:.4f}")
    assert planned == pytest.approx(measured, rel=0.1)


def test_skeletons_have_the_shapes_and_types_of_loaded_models() -> None:
    loaded, made = load_embedded().model, skeleton(str(SHIPPED.parent / "tiny_world"))
    for kind in ("named_parameters", "named_buffers"):
        found, expected = ([(n, p.shape, p.dtype) for n, p in getattr(m, kind)()] for m in (made, loaded))
        assert found == expected
    assert all(each.is_meta for each in made.parameters())


def test_a_model_that_outgrows_this_machine_is_planned_without_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "recipe=das_gender_pythia", "model=llama-3.1-8b", "trainer=fsdp", "rate=300"]) == 0
    said = capsys.readouterr().out
    assert "8,030,261,248 parameters" in said
    assert "7.48 GiB" in said or "no GPU is seen here" not in said
    assert "at 300 TFLOP/s (as given)" in said
    assert not list(tmp_path.iterdir())


def test_a_cache_beyond_the_limit_is_planned_for_the_disk_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["recipe=das_gender", "trainer.accelerator=cpu"]
    whole, spilled = (estimate(config.request([*words, f"network.budget_gib={each}"])) for each in (1, 1e-6))
    assert whole.caches > 5 << 20 > spilled.caches
    assert "the rest in the run's folder" in spilled.replay
    assert not list(tmp_path.iterdir())


def test_operations_are_those_of_the_matrix_products_and_attention() -> None:
    left, memory = torch.ones(2, 4, 8, 16), Memory()
    with memory:
        left @ left.mT
    assert memory.flops == 8 * (2 * 8 * 8 * 16)
    with memory:
        nn.functional.scaled_dot_product_attention(left, left, left)
    assert memory.flops == 3 * 8 * (2 * 8 * 8 * 16)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model.quantization=int8",), "plan does not know model.quantization"),
        (("model.device_map=auto",), "plan does not know model.device_map"),
        (("network=nnsight",), "plan does not know itrain.networks.nnsight"),
        (("rate=fast",), "rate=fast: give one number of TFLOP/s above 0"),
        (("trainer=fsdp_tp", "trainer.devices=3"), "3 devices cannot be split into groups of 2"),
    ],
)
def test_what_is_not_counted_is_refused(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=das_gender", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe", ["boundless_das_price", "reft_style", "lora_style", "iit_lora_gender", "steer_story"]
)
def test_each_training_with_steps_is_planned(recipe: str) -> None:
    found = estimate(config.request([f"recipe={recipe}"]))
    assert found.flops and found.step and found.evaluation


@pytest.mark.parametrize("recipe", ["probe_gender", "trace_facts"])
def test_a_training_that_looks_at_values_first_is_refused(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"recipe={recipe}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "looks at values of the base model's activations" in line


def test_every_shipped_configuration_makes_a_skeleton() -> None:
    found = sorted(str(file.parent.relative_to(SHIPPED)) for file in SHIPPED.glob("*/*/config.json"))
    assert found
    for name in found:
        assert sum(each.numel() for each in skeleton(name).parameters()) > 5e7


def test_a_site_that_is_not_there_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=das_gender", "site=layer9.block_output@name"]) in (1, 2)
    assert "layer 9 does not exist" in capsys.readouterr().err
