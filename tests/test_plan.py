"""`itrain plan`: what a run takes, without weights, and the same refusals as a fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from itrain.cli import main
from itrain.models import load_embedded
from itrain.models.skeleton import SHIPPED, skeleton


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
    assert main(["plan", "recipe=das_gender_pythia", "model=llama-3.1-8b"]) == 0
    said = capsys.readouterr().out
    assert "8,030,261,248 parameters" in said
    assert "14.96 GiB" in said
    assert not list(tmp_path.iterdir())


def test_every_shipped_configuration_makes_a_skeleton() -> None:
    found = sorted(str(file.parent.relative_to(SHIPPED)) for file in SHIPPED.glob("*/*/config.json"))
    assert found
    for name in found:
        assert sum(each.numel() for each in skeleton(name).parameters()) > 5e7


def test_a_site_that_is_not_there_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=das_gender", "site=layer9.block_output@name"]) in (1, 2)
    assert "layer 9 does not exist" in capsys.readouterr().err
