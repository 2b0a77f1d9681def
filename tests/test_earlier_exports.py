"""Exports of itrain 0.1, format 2, load and reproduce their figures; so do the class paths that they name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hydra.utils import get_object

import itrain
from itrain.cli import main
from itrain.exporting import fetched
from itrain.sharing import read_config
from itrain.sharing.hub import export_in

FOLDERS = sorted((Path(__file__).parent / "exports").iterdir())
EARLIER = [
    "itrain.data.CounterfactualDataModule",
    "itrain.networks.replay.make_network",
    "itrain.reports.tensorboard.TensorBoard",
    "itrain.reports.trackio.Trackio",
    "itrain.reports.wandb.Wandb",
    "itrain.responses.ResponseDataModule",
    "itrain.sweeps.grid.Grid",
    "itrain.sweeps.results.read_results",
]


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_an_earlier_export_reproduces_its_figures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = read_config(folder)
    loaded = itrain.load(folder)
    assert [str(site) for site in loaded.sites] == saved.get("sites", [])
    assert main(["test", f"export={folder}", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]) == 0
    (metrics,) = tmp_path.rglob("metrics.json")
    found = json.loads(metrics.read_text())
    figures = {name: value for name, value in saved["metrics"].items() if name.startswith("test/")}
    assert figures and figures.keys() <= found.keys()
    for name, value in figures.items():
        # One of the pairs may stand on the edge in another release of torch.
        assert found[name] == pytest.approx(value, abs=0.01, rel=0.01, nan_ok=True), name


@pytest.mark.parametrize("path", EARLIER)
def test_a_class_path_of_an_earlier_configuration_is_importable(path: str) -> None:
    assert callable(get_object(path))


def test_the_folder_of_a_run_stands_for_the_export_in_it(tmp_path: Path) -> None:
    copied = tmp_path / "run" / "export"
    shutil.copytree(FOLDERS[0], copied)
    assert export_in(tmp_path / "run") == copied and export_in(copied) == copied
    assert fetched(str(tmp_path / "run")) == str(copied) and fetched(str(tmp_path)) == str(tmp_path)
    loaded = itrain.load(tmp_path / "run")
    assert [str(site) for site in loaded.sites] == read_config(copied).get("sites", [])
