"""Which methods swap an attribute of an entity best, in the order that was published: SAE, neurons, DAS, MDAS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from itrain.cli import main

METHODS = {
    "dropped": ["recipe=mask_sae_entity", "intervention.featurizer.error=drop"],
    "kept": ["recipe=mask_sae_entity"],
    "neurons": ["recipe=mask_entity"],
    "das": ["recipe=das_entity"],
    "mdas": ["recipe=mdas_entity"],
}


@pytest.mark.slow
def test_features_of_an_autoencoder_are_behind_neurons_and_these_behind_das_and_mdas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chaudhary and Geiger 2024: SAEs at most as good as neurons, below DAS; Huang et al. 2024: SAE below MDAS."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for name, words in METHODS.items():
        assert main(["fit", *words, f"output={tmp_path / name}", "--quiet"]) == 0
        (figures,) = (tmp_path / name).rglob("metrics.json")
        found[name] = json.loads(figures.read_text())["test/disentangle_argmax"]
    assert max(found["dropped"], found["kept"]) + 0.05 < found["neurons"]
    assert found["neurons"] + 0.05 < found["das"] < found["mdas"]
    (trained,) = (tmp_path / "outputs" / "saes").iterdir()
    assert json.loads((trained / "figures.json").read_text())["explained"] > 0.95
