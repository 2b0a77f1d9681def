"""Sweeps of detectors: a row for each detector and site, with its controls and shifts, as its fit alone has them."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import pytest

from itrain.cli import main
from itrain.config import ConfigError, compose
from itrain.loggers.runs import identify_fit
from itrain.metrics import auroc_interval
from itrain.results.columns import COMMAND
from itrain.results.flags import flagged
from itrain.results.intervals import estimated
from itrain.results.peaks import peak_of
from itrain.results.summary import summarise
from itrain.results.table import read_configuration, read_results
from itrain.sweeps.grid import Grid
from itrain.training.monitoring import Monitoring

TEXTS = ["data.train_texts=96", "data.validation_texts=64", "data.test_texts=64"]
SMALL = ["recipe=monitor_gender", "trainer=cpu", "trainer.max_epochs=1", *TEXTS]
DETECTORS = ["monitoring_mean_difference", "monitoring_probe"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "140")
        assert main(["sweep", *SMALL, "training.l2=0.1", "sweep.layers=[2]"]) == 0
    (file,) = folder.rglob("results.parquet")
    return file.parent


def test_each_detector_is_a_method_at_each_site(swept: Path) -> None:
    frame = read_results(swept)
    assert list(dict.fromkeys(frame.method)) == DETECTORS
    # Of positions the sweep takes itself, none that is a special token, which no detector counts.
    assert list(dict.fromkeys(frame.position)) == ["all", "name", "verb", "connective"]
    assert len(frame) == 8 and frame["random_direction/auroc_spread"].notna().all()
    needed = {"auroc", "control_auroc", "auroc_selectivity", "threshold", "gap", "random_model/auroc"}
    assert needed | {"shift/discourse/auroc", "random_direction/auroc"} <= set(frame)
    pandas.testing.assert_series_equal(frame.auroc_selectivity, frame.auroc - frame.control_auroc, check_names=False)
    assert (frame.positives + frame.negatives == 64).all()


def test_a_row_is_what_its_command_finds_alone(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = read_results(swept)
    monkeypatch.chdir(tmp_path)
    row = frame[(frame.method == "monitoring_mean_difference") & (frame.layer == 2) & (frame.position == "all")].iloc[0]
    words = shlex.split(row.command)[3:]
    assert "training.l2=0.1" in words and "site=layer2.block_output@all" in words and words[0] == "fit"
    assert main([*words, "logger=csv", "trainer.enable_progress_bar=false"]) == 0
    (file,) = tmp_path.rglob("metrics.json")
    alone = pandas.read_json(file, typ="series")
    name = "gender=female mean_difference layer2.block_output@all"
    for figure in ("auroc", "threshold", "true_positive_rate", "control_auroc", "shift/discourse/auroc"):
        assert alone[f"test/{figure}/{name}"] == pytest.approx(row[figure], abs=1e-6), figure


def test_maps_best_sites_and_pages_speak_of_detectors(swept: Path) -> None:
    (summary,) = summarise([swept])
    maps = {(each.method, each.column): each for each in summary.maps}
    figures = ("auroc", "auroc_selectivity")
    assert set(maps) == {(name.replace("_", " "), figure) for name in DETECTORS for figure in figures}
    assert all(each.caption == "AUROC, chance 0.50" for each in summary.maps if each.column == "auroc")
    for row in summary.best:
        assert row.figure == "AUROC" and row.value.over == "64 texts"
        beside = {"control task", "selectivity", "random directions", "lowest shift", "random model", "gap"}
        assert beside <= set(row.beside) and "random subspace" not in row.beside
        assert "discourse" in str(row.beside["lowest shift"]) and "±" in str(row.beside["random directions"])
    assert summary.absent == [], "no control of interventions is missed where nothing is edited"
    page = " ".join((swept / "report.html").read_text(encoding="utf-8").split())
    assert "0.5 is chance" in page and "random subspace and the whole vector." not in page
    assert "all" not in summary.example.tokens and "name" in summary.example.tokens


def test_runs_in_trackers_carry_the_detector_and_the_training_that_acted(swept: Path) -> None:
    frame, configuration = read_results(swept), read_configuration(swept)
    row: dict[str, Any] = frame.iloc[0].to_dict()
    settings = {key: row[key] for key in list(row)[: list(row).index(COMMAND) + 1]}
    found = identify_fit("group", settings, configuration)
    assert found.name == "monitoring_mean_difference 2@all s0"
    assert found.config["training"]["l2"] == 0.1 and found.config["training"]["_target_"].endswith(".Monitoring")
    assert not found.config.get("intervention")


def test_a_sweep_of_a_training_that_reads_is_of_itself_and_joins_no_sites() -> None:
    assert list(compose(["recipe=monitor_gender"], sweeps=True).sweep.methods) == ["monitoring"]
    assert list(compose(["recipe=probe_gender"], sweeps=True).sweep.methods) == ["probing"]
    cfg = compose(["recipe=detect_concept", "sweep.methods=[monitoring]"], sweeps=True)
    assert cfg.sweep.methods.monitoring.pooling == "max", "the recipe's own settings"
    with pytest.raises(ConfigError, match="there is no method 'monitorin', did you mean 'monitoring'"):
        compose(["recipe=monitor_gender", "sweep.methods=[monitorin]"], sweeps=True)
    with pytest.raises(ValueError, match="join_sites: a sweep compares sites"):
        Grid(methods={"monitoring": partial(Monitoring, join_sites=True)})


# --- statistics


def detected(areas: list[float], **columns: Any) -> pandas.DataFrame:
    place = {"method": "monitoring_probe", "component": "block_output", "position": "all", "rank": None}
    given = {"positives": 30.0, "negatives": 50.0, **columns}
    rows = [{**place, "layer": 1, "seed": seed, "auroc": area, **given} for seed, area in enumerate(areas)]
    return pandas.DataFrame(rows)


def test_the_interval_of_an_auroc_is_newcombes_over_the_texts_of_all_seeds() -> None:
    one = estimated(detected([0.8]), "auroc")
    assert one.interval == pytest.approx(auroc_interval(0.8, 30, 50)) and one.over == "80 texts"
    equal = estimated(detected([0.8, 0.8, 0.8]), "auroc")
    assert equal.interval == pytest.approx(auroc_interval(0.8, 90, 150)) and equal.over == "3 seeds, 240 texts in all"
    apart = estimated(detected([0.6, 0.8, 1.0]), "auroc")
    assert apart.interval is not None and equal.interval is not None
    assert apart.interval[0] < equal.interval[0] and apart.interval[1] == 1.0, "seeds differ by more than their texts"
    assert estimated(detected([0.8], positives=float("nan")), "auroc").interval is None, "means over concepts"


def test_a_detector_at_chance_has_no_best_site_and_a_random_model_as_good_is_flagged() -> None:
    assert str(peak_of(detected([0.5]), "auroc")) == "none" and str(peak_of(detected([0.6]), "auroc")) == "1@all"
    for area, twin, flag in ((0.95, 0.93, "random model passes"), (0.95, 0.6, ""), (0.52, 0.6, "")):
        (found,) = flagged(detected([area], **{"random_model/auroc": twin})).flag
        assert found == flag, (area, twin)
