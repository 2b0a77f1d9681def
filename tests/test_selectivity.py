"""Agreement in CausalGym's schema on the embedded model: odds of learned and closed-form directions; selectivity."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pandas
import pytest
import torch
import yaml

from itrain.cli import main
from itrain.data import CounterfactualDataModule
from itrain.interventions.clusters import ClusterDifference
from itrain.interventions.controls import FullVector, RandomSubspace
from itrain.interventions.das import DAS
from itrain.interventions.directions import LinearDiscriminant, MeanDifference, PrincipalDirections
from itrain.interventions.probed import ProbeDirections
from itrain.models import load_embedded
from itrain.networks.choose import make_network
from itrain.opening import Opened
from itrain.results.summary import summarise
from itrain.results.tasks import over_tasks
from itrain.tasks.causalgym import CausalGym
from itrain.tasks.gender import Gender
from itrain.trainers import RunError
from itrain.training.alignment import AlignmentSearch
from itrain.training.cohort import Cohort
from tests.tables import finished
from tests.test_interchange import QUIET

RECIPE = Path(__file__).parents[1] / "recipes" / "das_vs_directions_agreement.yaml"
CLOSED_FORM: Mapping[str, Any] = {
    "means": MeanDifference,
    "clusters": ClusterDifference,
    "principal": PrincipalDirections,
    "discriminant": LinearDiscriminant,
    "probe": ProbeDirections,
}
METHODS = {"das": DAS, **CLOSED_FORM, "random": RandomSubspace, "full": FullVector}


def agreement() -> CausalGym:
    task = CausalGym(**yaml.safe_load(RECIPE.read_text())["task"])
    task.bind(load_embedded().tokenizer)
    return task


def odds_of(task: CausalGym, layer: int, seed: int) -> dict[str, float]:
    """The odds of each method at the subject, on held-out sentences, with the published settings of DAS."""
    network = make_network(load_embedded().model)
    sizes: dict[str, Any] = {"batch_size": 4, "eval_batch_size": 100, "keep": "all", "seed": seed}
    data = CounterfactualDataModule(task=task, network=network, **sizes)
    members = {}
    for name, method in METHODS.items():
        lightning.seed_everything(seed, verbose=False)
        members[name] = AlignmentSearch(
            network=network, sites=f"layer{layer}.block_output@subject", intervention=method
        )
    cohort = Cohort(members=members, optimizer=partial(torch.optim.Adam, lr=5e-3), warmup=0.1)
    trainer = lightning.Trainer(max_epochs=1, **QUIET)
    trainer.fit(cohort, datamodule=data)
    trainer.test(cohort, datamodule=data, verbose=False)
    return {name: cohort.found[f"{name}/test/odds"] for name in METHODS}


def require_published_order(layer: int, seed: int, *, below: float) -> None:
    """DAS above each closed-form direction, a random one about 0, and the control task below a share of the task."""
    task = agreement()
    found, control = odds_of(task, layer, seed), odds_of(task.control_task(), layer, seed)
    print(f"layer {layer}, seed {seed}: task {found}, control {control}")
    for name in CLOSED_FORM:
        assert found["das"] > found[name], name
    assert abs(found["random"]) < 0.1 * found["das"]
    assert control["das"] < below * found["das"]


def test_das_moves_agreement_further_than_closed_form_directions() -> None:
    require_published_order(3, seed=0, below=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("layer", "below"), [(3, 0.5), (4, 1.0)])
def test_das_moves_agreement_further_in_the_middle_layers(layer: int, below: float, seed: int) -> None:
    """Not in layers 0 to 2, where one direction has all of the noun's number and the mean difference is the ceiling.

    In layer 4, where little of it is left at the noun, DAS moves arbitrary words nearly as far.
    """
    require_published_order(layer, seed, below=below)


# --- selectivity in sweeps

SMALL = [
    "recipe=das_vs_directions_agreement",
    "trainer=cpu",
    "trainer.max_steps=20",
    "sweep.methods=[das,mean_difference]",
    "sweep.layers=[2,3]",
    "sweep.positions=[subject]",
]


def test_one_command_prints_selectivity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["sweep", *SMALL]) == 0
    said = capsys.readouterr().out
    assert "selectivity" in said and "odds above the control task" in " ".join(said.split())
    (file,) = tmp_path.rglob("results.parquet")
    frame = pandas.read_parquet(file)
    assert len(frame) == 4
    selectivity = frame["odds"] - frame["control_task/odds"]
    pandas.testing.assert_series_equal(frame["odds_selectivity"], selectivity, check_names=False)
    (summary,) = summarise([file.parent])
    for row in summary.odds:
        assert {"mean over layers", "control task", "selectivity", "its mean over layers"} <= set(row.beside)
        fits = frame[frame.method == row.method.replace(" ", "_")]
        assert row.beside["its mean over layers"] == f"{fits['odds_selectivity'].mean():.2f}"
    assert not [column for column in frame if column.startswith("control_task/pairs")]
    page = (file.parent / "report.html").read_text()
    assert "control task" in page and "its mean over layers" in page


def test_a_control_task_is_needed_and_all_pairs() -> None:
    def opened(task: Any, keep: Any) -> Opened:
        base_model = load_embedded()
        task.bind(base_model.tokenizer)
        network = make_network(base_model.model)
        data = CounterfactualDataModule(task=task, network=network, keep=keep)
        given: dict[str, Any] = {"base_model": base_model, "network": network, "task": task, "data": data}
        return Opened(**given, open_network=lambda model: network, open_data=lambda task: data, threads="1")

    with pytest.raises(RunError, match=r"sweep\.control_task: task Gender has no control task"):
        _ = opened(Gender(), "all").control_twin
    with pytest.raises(RunError, match=r"sweep\.control_task needs all pairs.*data\.keep=all"):
        _ = opened(agreement(), "pairwise").control_twin


# --- averages


def swept(odds: Mapping[tuple[int, str], float], control: float) -> pandas.DataFrame:
    rows = [
        {
            **{"method": "das", "component": "block_output", "layer": layer, "position": position, "seed": 0},
            **{"command": f"{layer} {position}", "odds": value, "control_task/odds": control},
            **{"odds_spread": 1.0, "odds_selectivity": value - control, "pairs_changing": 101, "flag": ""},
        }
        for (layer, position), value in odds.items()
    ]
    return pandas.DataFrame(rows)


def test_a_task_has_the_mean_over_layers_of_its_best_positions_and_tasks_their_mean(tmp_path: Path) -> None:
    one = swept({(0, "a"): 1.0, (0, "b"): 3.0, (1, "a"): 2.0, (1, "b"): -4.0}, control=0.5)
    other = swept({(0, "a"): 5.0, (0, "b"): 3.0, (1, "a"): 4.0, (1, "b"): 7.0}, control=1.0)
    table = over_tasks([one, other])
    assert table is not None and table.rows == {"das": ["4.25", "3.50"]}  # ((3 + 2) / 2 + (5 + 7) / 2) / 2
    assert over_tasks([one]) is None
    (summary,) = summarise([finished(tmp_path / "sweep", one)])
    (row,) = summary.odds
    assert row.site == "0@b" and row.value.value == 3.0 and row.beside["mean over layers"] == "2.50"
    low, high = row.value.interval or (0.0, 0.0)
    assert high - low == pytest.approx(2 * 1.984 / 10, rel=0.01), "Student's over pairs"
    maps = {each.column: each for each in summary.maps}
    assert set(maps) == {"odds", "odds_selectivity"} and maps["odds"].scale == (-4.0, 3.0)
