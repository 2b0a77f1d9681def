"""Presets named after their source: they read the public files' schemas, and hold the published settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from itrain.config import compose
from itrain.sites import Site

BATCHES = {"loreft_commonsense": 32, "loreft_math": 32, "loreft_alpaca_eval": 128}
EPOCHS = {"loreft_commonsense": 6, "loreft_math": 12, "loreft_alpaca_eval": 9}
RANKS = {"loreft_commonsense": 8, "loreft_math": 8, "loreft_alpaca_eval": 4}
RESPONSES = {
    "loreft_commonsense": "the correct answer is true",
    "loreft_math": "the sum is 2",
    "loreft_alpaca_eval": "the sum is 2",
}


def written(file: Path) -> str:
    """Rows in the schema of LLM-Adapters' files, with instructions of this file's own."""
    row = {"input": "", "output": "the sum is 2", "answer": "true"}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([{"instruction": f"{file.parent.name} asks {number}", **row} for number in range(10)]))
    return str(file)


@pytest.mark.parametrize("name", RESPONSES)
def test_loreft_s_presets_read_their_files_and_have_their_settings(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = compose([f"recipe={name}"])
    for file in [cfg.task.file] if isinstance(cfg.task.file, str) else cfg.task.file.values():
        written(tmp_path / file)
    task: Any = instantiate(cfg.task, _convert_="all")
    (setting, *_) = task.settings("test")
    assert setting["response"] == RESPONSES[name] and " asks " in setting["prompt"]
    assert setting["prompt"].endswith("\n") and ("### Response" in setting["prompt"]) == (name != "loreft_commonsense")
    assert cfg.data.batch_size * cfg.trainer.accumulate_grad_batches == BATCHES[name]
    assert (cfg.trainer.max_epochs, cfg.intervention.rank, cfg.training.optimizer.lr) == (
        EPOCHS[name],
        RANKS[name],
        9e-4,
    )
    sites = [Site.parse(site) for site in cfg.site]
    layers = {site.layer for site in sites}
    assert layers == ({3, 9, 18, 24} if name == "loreft_alpaca_eval" else set(range(32)))
    # Shared by first and last tokens, or one for each of the two.
    assert len(sites) == len(layers) * (2 if name == "loreft_alpaca_eval" else 1)


def test_a_preset_s_former_name_is_the_same_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    now, before = compose(["recipe=boundless_alpaca"]), compose(["recipe=boundless_das_alpaca"])
    assert before.name == "boundless_das_alpaca"
    before.name = now.name
    assert before == now and now.intervention.temperature == [50.0, 0.1] and now.trainer.max_epochs == 3


def test_masks_of_ravel_differ_in_what_they_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rotation, both, cause = (compose([f"recipe={name}"]) for name in ("mdas_ravel", "mdbm_ravel", "dbm_ravel"))
    assert (both.task.isolate, cause.task.isolate) == (rotation.task.isolate, 0) and cause.task.cause == both.task.cause
    assert cause.intervention == both.intervention
    for part in ("model", "task", "data", "training", "trainer", "site"):
        assert both[part] == rotation[part], part
