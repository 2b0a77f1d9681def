"""Sweeps: what they go over, that each row is the fit that its command makes, and that they go on after a stop."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pandas
import pytest
import torch
from omegaconf import OmegaConf

from itrain.causal_model import Setting
from itrain.cli import main
from itrain.config import compose
from itrain.data import CounterfactualBatch, CounterfactualDataModule
from itrain.inputs import ModelInputs
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.networks.hooks import HookedNetwork
from itrain.opening import open_model
from itrain.results.flags import flagged, shown_untrained
from itrain.results.table import read_results
from itrain.sites import Site
from itrain.sweeps.grid import Fit, Grid, tokens_of
from itrain.sweeps.jobs import CohortJob
from itrain.sweeps.run import open_part
from itrain.tasks.base import Pair, Split
from tests.commands import SMALL, only_run
from tests.planted import Bits, Planted, opened_with

ROOT = Path(__file__).parents[1]
GRID = ["sweep.layers=[2,4]", "sweep.positions=[name,connective]", "sweep.ranks=[1,2]", "seed=0"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def settled(frame: pandas.DataFrame) -> pandas.DataFrame:
    """What does not depend on the time or folder of a sweep."""
    return frame.drop(columns=["seconds", "command"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    assert main(["sweep", "recipe=das_vs_probe_gender", *SMALL, *GRID, f"output={folder}"]) == 0
    return only_run(folder)


def test_a_sweep_has_a_row_for_every_fit(finished: Path) -> None:
    frame = read_results(finished)
    counts = frame.groupby("method").size().to_dict()
    ranked = {"das", "mean_difference", "principal_directions", "random_subspace"}
    assert counts == {**dict.fromkeys(ranked, 8), "full_vector": 4, "probing": 4}
    assert {"heat_maps.png", "heat_maps.svg", "report.html", "results.parquet"} <= {f.name for f in finished.iterdir()}
    at = frame[frame.method == "full_vector"].set_index(["layer", "position"]).iia_changing_argmax
    assert at[2, "name"] > 0.95 and at[4, "name"] < 0.05
    assert at[4, "connective"] > 0.95 and at[2, "connective"] < 0.05
    probes = frame[frame.method == "probing"]
    assert (probes[probes.position == "name"].probe_accuracy > 0.8).all()


def test_a_row_s_command_makes_its_fit(finished: Path) -> None:
    """Trained alone it is the same fit: same data, same start, same steps."""
    frame = read_results(finished)
    row = frame[(frame.method == "das") & (frame.layer == 2) & (frame["rank"] == 2)].iloc[0]
    words = shlex.split(row.command)
    assert words[:4] == ["python", "-m", "itrain", "fit"]
    assert main([*words[3:], "output=alone"]) == 0
    alone = json.loads((only_run(Path("alone")) / "metrics.json").read_text())
    for figure in ("iia_argmax", "iia_changing_pairwise", "pairs_changing"):
        assert alone[f"test/{figure}"] == pytest.approx(row[figure], abs=1 / 64), figure
    probe = frame[(frame.method == "probing") & (frame.layer == 4) & (frame.position == "name")].iloc[0]
    assert main([*shlex.split(probe.command)[3:], "output=probe"]) == 0
    alone = json.loads((only_run(Path("probe")) / "metrics.json").read_text())
    assert alone["test/probe_accuracy"] == pytest.approx(probe.probe_accuracy, abs=1 / 64)


def test_a_killed_sweep_goes_on_and_repeats_nothing(finished: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "itrain", "sweep", "recipe=das_vs_probe_gender", *SMALL, *GRID, "output=killed"]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(Path("killed").rglob("jobs/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    folder = only_run(Path("killed"))
    kept = {file: file.stat().st_mtime_ns for file in folder.rglob("jobs/*.json")}
    assert 0 < len(kept) < 3
    with pytest.raises(FileNotFoundError, match="itrain sweep resume="):
        read_results(folder)
    assert main(["sweep", f"resume={folder}"]) == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    pandas.testing.assert_frame_equal(settled(read_results(folder)), settled(read_results(finished)))


def test_what_was_begun_is_not_changed_on_the_way(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", f"resume={finished}", "seed=1"]) == 2
    assert "a resumed sweep keeps its configuration" in capsys.readouterr().err
    assert main(["sweep", "resume=nowhere"]) == 2


def test_a_job_that_fails_is_told_and_stops_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    # Probes without an optimizer fail when they are fitted, and only then.
    wrong = (
        "++sweep.methods={probing:{_target_:itrain.training.probing.ProbeTraining,_partial_:true},"
        "full_vector:{_target_:itrain.interventions.controls.FullVector,_partial_:true}}"
    )
    assert main(["sweep", "recipe=das_gender", *SMALL, "sweep.positions=[name]", "sweep.layers=[2,3]", wrong]) == 1
    told = capsys.readouterr()
    assert "1 of the jobs failed" in told.err and "probing" in told.err
    assert len(read_results(only_run(Path("outputs")))) == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sweep.methods=[dass]", "did you mean 'das'"),
        ("sweep.layers=some", "none of all, every(2)"),
        ("sweep.layers=[9]", "there is no layer 9"),
        ("sweep.positions=[]", "sweep.positions is empty"),
        ("sweep.layer=[3]", "did you mean 'sweep.layers'"),
    ],
)
def test_a_wrong_grid_is_refused(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "recipe=das_gender", *SMALL, word]) in (1, 2)
    assert message in capsys.readouterr().err


def test_positions_are_the_tokens_that_the_task_names() -> None:
    inputs = ModelInputs(
        arguments={"input_ids": torch.zeros(2, 6, dtype=torch.long)},
        tokens=torch.tensor([[0, 6], [1, 6]]),
        spans={
            "end": torch.tensor([[5, 6], [5, 6]]),
            "two": torch.tensor([[1, 3], [2, 3]]),
            "one": torch.tensor([[3, 4], [4, 5]]),
        },
    )
    assert tokens_of(inputs) == ["first", "two.last", "one", "end"]


@pytest.mark.parametrize(("layers", "expected"), [("all", [0, 1, 2, 3, 4, 5]), ("every(2)", [1, 3, 5]), ([3], [3])])
def test_layers(layers: Any, expected: list[int], finished: Path) -> None:
    opened = open_model(OmegaConf.load(finished / "config.yaml"), finished)  # type: ignore[arg-type]
    opened.data.setup("fit")
    grid = Grid(methods={"das": DAS}, layers=layers, positions=["name"])
    assert [site.layer for site in grid.all_sites(opened)] == expected


def test_the_controls_of_a_fit_stand_in_its_row(finished: Path) -> None:
    frame = read_results(finished)
    trained = frame[frame.method == "das"]
    columns = ["gap", "random_model/iia_changing_argmax", "random_model/iia_changing_pairwise", "random_model/gap"]
    assert trained[columns].notna().all(axis=None)
    assert not [column for column in frame if column.startswith("random_model/pairs")]
    untrained = frame[frame.method.isin(["random_subspace", "full_vector"])]
    assert untrained.gap.notna().all() and untrained[columns[1:]].isna().all(axis=None)
    probes = frame[frame.method == "probing"]
    assert probes[["gap", "random_model/probe_accuracy", "random_model/selectivity"]].notna().all(axis=None)
    assert (probes.examples == 64).all() and (probes.majority_accuracy == 0.5).all()
    assert (frame.pairs_changing.dropna() == 32).all()


def test_a_fit_that_passes_on_the_model_fails_on_a_random_one() -> None:
    enough = ["trainer.max_epochs=6", "data.train_pairs=256", "data.test_pairs=128"]
    where = ["sweep.methods=[das,probing]", "sweep.layers=[2]", "sweep.positions=[name]"]
    assert main(["sweep", "recipe=das_gender", *SMALL, *enough, *where]) == 0
    frame = read_results(only_run(Path("outputs"))).set_index("method")
    assert frame.at["das", "iia_changing_argmax"] > 0.95
    chance = frame.at["das", "data/majority_label"]
    assert chance == 0.5 and frame.at["das", "random_model/iia_changing_argmax"] < shown_untrained(chance)
    assert frame.at["probing", "probe_accuracy"] > 0.95
    assert frame.at["probing", "random_model/probe_accuracy"] < 0.8
    assert (frame.flag == "").all()


def test_the_random_model_can_be_spared_and_changes_no_other_figure(finished: Path) -> None:
    few = ["sweep.methods=[das,probing]", "sweep.layers=[2]", "sweep.random_model=false"]
    assert main(["sweep", "recipe=das_vs_probe_gender", *SMALL, *GRID, *few]) == 0
    spared, whole = read_results(only_run(Path("outputs"))), read_results(finished)
    assert not [column for column in spared if column.startswith("random_model")]
    place = ["method", "layer", "position", "rank"]
    both = spared.merge(whole, on=place, suffixes=("", "_whole"))
    assert len(both) == len(spared) == 6
    for figure in ("iia_changing_argmax", "gap", "probe_accuracy"):
        difference = (both[figure] - both[f"{figure}_whole"]).abs().dropna()
        assert len(difference) and difference.max() <= 1 / 32, figure


def test_the_gap_is_the_training_pairs_figure_minus_the_test_s(tmp_path: Path) -> None:
    """Whole vectors at the first layer answer as the source, whose bits are rendered as their opposites in the test."""

    class Shifted(Bits):
        def __init__(self) -> None:
            super().__init__()
            self.causal_model.inputs["shifted"] = [False, True]

        def sample(self, random: Random, split: Split) -> Pair:
            pair = super().sample(random, split)
            sources = {name: {**source, "shifted": split == "test"} for name, source in pair.sources.items()}
            return Pair(base={**pair.base, "shifted": False}, sources=sources)

        def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
            shifted = torch.tensor([[float(setting["shifted"])] for setting in settings])
            return ModelInputs(arguments={"bits": (super().inputs(settings).arguments["bits"] - shifted).abs()})

    task, network = Shifted(), HookedNetwork(Planted())
    data = CounterfactualDataModule(task=task, network=network, keep="all")
    data.setup("fit")
    opened = opened_with(task, network, data)
    site = Site.parse("module:embed.output")
    fit = Fit(group="intervention", method="full_vector", site=site, sites=[site], rank=None, seed=0)
    search = {"_target_": "itrain.training.alignment.AlignmentSearch", "_partial_": True}
    quiet = {"_target_": "lightning.Trainer", "_partial_": True, "accelerator": "cpu"}
    cfg = OmegaConf.create({"training": search, "trainer": quiet})
    (row,) = CohortJob(name="one", fits=[fit]).run(cfg, opened, Grid(methods={"full_vector": FullVector}))

    def share(pairs: CounterfactualBatch) -> float:
        answers = pairs.sources["left"].arguments["bits"].prod(1).long()
        return float((answers == pairs.counterfactual_label)[pairs.changes].float().mean())

    train, test = (data.datasets[split].examples for split in ("train", "test"))
    assert row["iia_changing_argmax"] == pytest.approx(share(test))
    assert row["gap"] == pytest.approx(share(train) - share(test)) and row["gap"] > 0.2


def test_controls_mark_what_they_speak_against() -> None:
    def row(method: str, position: str, rank: int | None, iia: float) -> dict[str, Any]:
        place = {"layer": 1, "component": "block_output", "position": position, "seed": 0}
        return {"method": method, **place, "rank": rank, "iia_changing_argmax": iia}

    frame = flagged(
        pandas.DataFrame(
            [
                row("das", "a", 1, 0.9), row("random_subspace", "a", 1, 0.1), row("full_vector", "a", None, 0.95),
                row("das", "b", 1, 0.9), row("random_subspace", "b", 1, 0.0), row("full_vector", "b", None, 0.1),
                row("das", "c", 8, 0.9), row("random_subspace", "c", 8, 0.7), row("full_vector", "c", None, 1.0),
            ]
        )
    )  # fmt: skip
    flags = frame[frame.method == "das"].set_index("position").flag.to_dict()
    assert flags == {"a": "", "b": "above the whole vector", "c": "control passes"}
    assert set(frame[frame.method != "das"].flag) == {""}


def test_a_random_model_marks_what_needs_no_learned_model() -> None:
    place = {"layer": 1, "component": "block_output", "seed": 0}

    def search(position: str, iia: float, twin: float) -> dict[str, Any]:
        figures = {"iia_changing_argmax": iia, "random_model/iia_changing_argmax": twin}
        return {"method": "das", **place, "position": position, "rank": 1, **figures}

    def probe(position: str, accuracy: float, twin: float) -> dict[str, Any]:
        figures = {"probe_accuracy": accuracy, "random_model/probe_accuracy": twin}
        return {
            "method": "probing", **place, "position": position, **figures, "majority_accuracy": 0.5, "examples": 256.0
        }  # fmt: skip

    searches = [search("a", 0.95, 0.5), search("b", 0.95, 0.8)]
    # Of 256 examples, 0.9 may be 0.86 to 0.93, and 0.52 is no better than the most frequent class.
    probes = [probe("a", 0.9, 0.7), probe("b", 0.9, 0.88), probe("c", 0.52, 0.52)]
    passes = "random model passes"
    for rows, flags in (
        (searches, ["", passes]),
        (probes, ["", passes, ""]),
        (searches + probes, ["", passes] * 2 + [""]),
    ):
        assert flagged(pandas.DataFrame(rows)).flag.tolist() == flags


def test_seeds_share_what_one_model_shows(tmp_path: Path) -> None:
    """One store of keys and values serves them all, unless a seed has weights of its own."""
    first = open_part(compose(["recipe=das_gender", *SMALL, *GRID], sweeps=True), tmp_path, 0)
    second = open_part(first.cfg, tmp_path, 1, first)
    assert second.opened.network is first.opened.network
    assert second.opened.data.seed == 1
    other = replace(first, opened=first.opened.random_twin)
    assert open_part(first.cfg, tmp_path, 1, other).opened.network is not other.opened.network


def change_first(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**rows[0], "layer": 5}, *rows[1:]]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda rows: "{}", "holds no rows of fits"),
        (lambda rows: json.dumps(rows)[:-9], "is damaged"),
        (lambda rows: json.dumps(rows[1:]), "holds other fits"),
        (lambda rows: json.dumps(change_first(rows)), "holds other fits"),
    ],
    ids=["empty", "cut off", "a row less", "rows of other fits"],
)
def test_a_file_of_a_job_that_holds_other_fits_is_refused_by_name(
    damage: Callable[[list[dict[str, Any]]], str], said: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, "copy")
    file = Path("copy/jobs/seed0 layer2.json")
    file.write_text(damage(json.loads(file.read_text())))
    assert main(["sweep", "resume=copy"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "seed0 layer2.json" in error and said in error
    if said != "holds other fits":
        assert main(["report", "copy"]) == 2
        assert "seed0 layer2.json" in capsys.readouterr().err


def test_rows_of_no_job_of_the_sweep_are_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, "copy")
    shutil.copy("copy/jobs/seed0 layer2.json", "copy/jobs/seed7 layer2.json")
    assert main(["report", "copy"]) == 2
    assert "the jobs of the sweep have" in capsys.readouterr().err
    assert main(["sweep", "resume=copy"]) == 1
    assert "'seed7 layer2.json' belongs to no job" in capsys.readouterr().err.replace(
        f"{Path('copy').absolute()}/jobs/", ""
    )
