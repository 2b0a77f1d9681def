"""The scripts that compare methods run, and write the tables that they print."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The scripts can be imported, and are asked for one short fit of each method that is left."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", ["script", "--seeds", "0", "--steps", "3", "--output", str(tmp_path)])
    warnings.simplefilter("ignore")
    import fit_common

    monkeypatch.setattr(fit_common, "TRAIN_PAIRS", 32)
    monkeypatch.setattr(fit_common, "TEST_PAIRS", 32)


def test_price_tagging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import price_tagging

    monkeypatch.setattr(price_tagging, "METHODS", dict(list(price_tagging.METHODS.items())[:1]))
    price_tagging.main()
    rows = json.loads((tmp_path / "price_tagging.json").read_text())
    assert list(rows) == [
        "Boundless DAS",
        "full vector (beside Boundless DAS)",
        "random subspace (beside Boundless DAS)",
    ]
    assert 0 <= rows["Boundless DAS"][0]["rank"] <= 80
    assert "± " not in (tmp_path / "price_tagging.md").read_text(), "one seed has no spread"


def test_entity_attributes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import entity_attributes

    monkeypatch.setattr(entity_attributes, "WORLDS", {("geography", "entity"): ["MDAS"]})
    entity_attributes.main()
    rows = json.loads((tmp_path / "geography_entity.json").read_text())
    assert list(rows) == ["MDAS", "full vector", "random subspace of rank 8"]
    for (run,) in rows.values():
        mean = (run["test/cause_argmax"] + run["test/isolate_argmax"]) / 2
        # The mean over the attributes of what is a mean in each.
        assert run["test/disentangle_argmax"] == pytest.approx(mean, abs=1e-6)
