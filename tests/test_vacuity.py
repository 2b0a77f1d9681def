"""A trained map that is not linear is fitted to controls too, and their figures stand beside its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pandas
import pytest

from itrain.cli import main
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.interventions.featurizers import Rotation
from itrain.interventions.masking import Mask
from itrain.interventions.revnet import RevNet, RevNetDAS
from itrain.placements import Placement
from itrain.results.flags import flagged
from itrain.results.run import summarise_run
from itrain.results.vacuity import above_chance, is_vacuous, passing, vacuity_lines
from itrain.tasks.arbitrary import with_arbitrary_labels
from itrain.tasks.contract import check_task
from itrain.tasks.hierarchical_equality import HierarchicalEquality
from itrain.vacuity import _linear, _weakened, lower, sites_changed
from tests.commands import SMALL

FIT = [
    *("fit", "recipe=revnet_hierarchical_equality", "model.steps=20", "trainer=cpu", "threads=1"),
    *("data.train_pairs=64", "data.validation_pairs=16", "data.test_pairs=32", "trainer.max_epochs=1"),
]


def run(tmp_path: Path, *words: str) -> dict[str, float]:
    assert main([*words, f"output={tmp_path}", "trainer.enable_progress_bar=false"]) == 0
    (file,) = tmp_path.rglob("metrics.json")
    return json.loads(file.read_text())


def test_a_nonlinear_map_has_controls_unless_they_are_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path / "with", *FIT)
    said = capfd.readouterr().out
    for name in ("false_variable", "random_model", "linear_map", "num_blocks_1", "num_blocks_3"):
        assert 0 <= found[f"vacuity/{name}/iia_argmax"] <= 1
        assert name.replace("_", " ") in said
    assert found["vacuity/checked"] == 1 and "vacuity/vacuous" in found
    assert "5 control fits follow" in said
    without = run(tmp_path / "without", *FIT, "vacuity=false")
    assert [key for key in without if key.startswith("vacuity")] == ["vacuity/checked"]
    assert "vacuity not checked" in capfd.readouterr().out
    own = {key: value for key, value in found.items() if not key.startswith("vacuity")}
    assert own == {key: value for key, value in without.items() if not key.startswith("vacuity")}, "same fit"


@pytest.mark.slow
def test_a_rotation_has_controls_where_they_are_asked_for(tmp_path: Path) -> None:
    found = run(tmp_path, "fit", "recipe=das_gender", *SMALL, "vacuity=true", "trainer=cpu")
    assert {"vacuity/arbitrary_labels/iia_argmax", "vacuity/labels_by_heart/iia_argmax"} <= set(found)
    assert "vacuity/random_model/iia_argmax" in found


def test_a_linear_map_has_none_unasked(tmp_path: Path) -> None:
    assert not [key for key in run(tmp_path, "fit", "recipe=das_gender", *SMALL) if key.startswith("vacuity")]


def test_controls_of_a_probe_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "recipe=probe_gender", *SMALL, "vacuity=true", f"output={tmp_path}"]
    assert main(words) == 1
    assert "vacuity=true: controls are fitted beside AlignmentSearch" in capfd.readouterr().err


def figures(own: float, **controls: float) -> dict[str, float]:
    """IIA of a run and of its controls on 1000 pairs, of which half change the label."""
    places = {"test": own} | {f"vacuity/{name}": iia for name, iia in controls.items()}
    counts = {f"{place}/{kind}": 500.0 for place in places for kind in ("pairs_changing", "pairs_preserving")}
    return {f"{place}/iia_argmax": iia for place, iia in places.items()} | counts | {"vacuity/checked": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("asked", [True, False])
def test_a_sweep_heeds_whether_controls_are_asked_for(tmp_path: Path, asked: bool) -> None:
    words = ["sweep.methods=[revnet,das]", "sweep.layers=[1]", "sweep.positions=[name]", "sweep.random_model=false"]
    words += [f"vacuity={str(asked).lower()}", f"output={tmp_path}"]
    assert main(["sweep", "recipe=das_gender", *SMALL, *words]) == 0
    (file,) = tmp_path.rglob("results.parquet")
    frame = pandas.read_parquet(file)
    searches = frame[frame["method"].isin(["revnet", "das"])]
    column = searches.get("false_variable/iia_changing_argmax")
    assert len(searches) == 2 and (column is not None and column.notna().all()) == asked


@pytest.mark.parametrize(
    ("results", "vacuous", "line"),
    [
        (figures(0.99, false_variable=0.51, random_model=0.97), ["random_model"], "vacuous: random model align"),
        (figures(0.99, false_variable=0.98, random_model=0.5), ["false_variable"], "vacuous: false variable align"),
        (figures(0.99, false_variable=0.51, random_model=0.6), [], "not vacuous by these controls"),
        (figures(0.51, false_variable=0.51, random_model=0.51), [], "no alignment, so that controls say nothing"),
        (figures(0.99, arbitrary_labels=0.5, labels_by_heart=1.0, num_blocks_1=0.99, random_model=0.5), [], "not vac"),
        (figures(0.99, false_variable=0.51), [], "not vacuous by these controls"),
        (figures(0.99, random_model=0.51, linear_map=0.91), ["linear_map"], "not vacuous by these controls"),
        (figures(0.99, random_model=0.51, linear_map=0.5), [], "vacuous: a linear map does not align"),
        (figures(0.51, random_model=0.51, linear_map=0.5), [], "no alignment, so that controls say nothing"),
    ],
)
def test_a_control_that_aligns_halfway_speaks_against_the_map(
    results: Mapping[str, float], vacuous: list[str], line: str
) -> None:
    assert passing(results) == vacuous and is_vacuous(results) == line.startswith("vacuous")
    lines = vacuity_lines(results)
    assert lines[0].startswith(line)
    no_twin = not any("random_model" in key for key in results)
    assert ("vacuity not checked on a random model: there is none" in lines) == no_twin


def test_chance_is_what_a_map_that_looks_at_no_value_has() -> None:
    """Of many answers, one that always changes the answer is seldom right: pairs that all change it tell a lot."""
    counts = {"test/pairs_changing": 1000.0, "test/pairs_preserving": 0.0}
    at_twin = {"vacuity/random_model/pairs_changing": 1000.0, "vacuity/random_model/iia_argmax": 0.97}
    found = {"test/iia_argmax": 0.99, **counts, **at_twin, "vacuity/checked": 1.0}
    assert is_vacuous({**found, "vacuity/answers": 26.0})
    assert not is_vacuous({**found, "vacuity/answers": 26.0, "vacuity/random_model/iia_argmax": 0.04})
    assert not is_vacuous({**found, "vacuity/answers": 2.0}), "of two, the other answer is always right"
    mostly = {"test/pairs_changing": 900.0, "test/pairs_preserving": 100.0, "test/iia_argmax": 0.7}
    twin = {"vacuity/random_model/pairs_changing": 900.0, "vacuity/random_model/pairs_preserving": 100.0}
    many = {**found, **mostly, **twin, "vacuity/random_model/iia_argmax": 0.6, "vacuity/answers": 11.0}
    assert above_chance(many, "test") == pytest.approx((0.7 - 0.1) / 0.9) and is_vacuous(many)
    assert above_chance({**many, "vacuity/answers": 2.0}, "test") == pytest.approx((0.7 - 0.9) / 0.1)


def test_controls_stand_beside_the_run_in_its_table() -> None:
    rules = {f"{figure}_{rule}": 0.5 for figure in ("iia", "iia_changing", "iia_preserving") for rule in RULES}
    counts = {"pairs_changing": 10.0, "pairs_preserving": 10.0}
    places = ("test", "vacuity/random_model", "vacuity/num_blocks_3")
    results = {f"{place}/{key}": value for place in places for key, value in (rules | counts).items()}
    summary = summarise_run({**results, "vacuity/checked": 1.0, "vacuity/vacuous": 0.0})
    (table,) = summary.tables
    assert list(table.rows) == ["trained", "random model", "num blocks 3"]
    assert summary.bars is not None and set(summary.bars.names) == set(table.rows)


RULES = ("argmax", "pairwise")


def test_the_false_variable_is_the_identity_of_the_first_argument() -> None:
    task = HierarchicalEquality(objects=200)
    false, named = task.false_task(), HierarchicalEquality(objects=200, hypothesis="first_argument")
    assert false is not None and false.variables == task.variables and named.false_task() is None
    check_task(false)
    for seed in range(50):
        one, other = false.sample(Random(seed), "test"), named.sample(Random(seed), "test")
        assert list(one.sources.values()) == list(other.sources.values()) and list(one.sources) == ["left"]
        assert false.counterfactual(one) == named.counterfactual(other)
    assert task.sample(Random(3), "test") == HierarchicalEquality(objects=200).sample(Random(3), "test")


def test_arbitrary_labels_are_fixed_and_follow_no_variable() -> None:
    task = HierarchicalEquality(objects=200)
    arbitrary, again = with_arbitrary_labels(task), with_arbitrary_labels(HierarchicalEquality(objects=200))
    check_task(arbitrary)
    pairs = [task.sample(Random(seed), "train") for seed in range(400)]
    labels = [arbitrary.counterfactual(pair) for pair in pairs]
    assert labels == [again.counterfactual(pair) for pair in pairs]
    agree = sum(label == task.counterfactual(pair) for label, pair in zip(labels, pairs, strict=True))
    assert 150 < agree < 250


def test_lower_capacities_reach_the_class_that_has_them() -> None:
    assert [lower(most) for most in (1, 2, 3, 8, 10)] == [[], [1], [1], [1, 2], [1, 3]]
    weaken: Any = partial(_weakened, name="num_blocks", value=2)
    assert weaken(RevNetDAS)(8).num_blocks == 2
    assert weaken(partial(RevNetDAS, num_blocks=5))(8).num_blocks == 2
    assert weaken(partial(Mask, featurizer=partial(RevNet, num_blocks=5)))(8).featurizer.num_blocks == 2
    das = partial(DAS, rank=2)
    assert weaken(das) is das
    rotation = _linear(partial(RevNetDAS, blocks={"a": 2}, num_blocks=3))(8)
    assert isinstance(rotation, FullRotationDAS) and rotation.blocks == {"a": 2}
    masked = _linear(partial(Mask, featurizer=partial(RevNet, num_blocks=5), sparsity=0.5))(8)
    assert isinstance(masked.featurizer, Rotation) and masked.sparsity == 0.5 and _linear(das) is das
    (own, plain) = sites_changed(
        [Placement(write="layer0.mlp_output", intervention=RevNetDAS), "layer1.mlp_output"],  # type: ignore[arg-type]
        weaken,
    )
    assert isinstance(own, Placement) and own.intervention(8).num_blocks == 2  # type: ignore[misc]
    assert plain == "layer1.mlp_output"


def test_a_sweep_fits_a_nonlinear_map_to_the_false_variable_too(tmp_path: Path) -> None:
    words = ["sweep.methods=[revnet,das]", "sweep.layers=[1]", "sweep.positions=[name]", "sweep.random_model=false"]
    assert main(["sweep", "recipe=das_gender", *SMALL, *words, f"output={tmp_path}"]) == 0
    (file,) = tmp_path.rglob("results.parquet")
    frame = pandas.read_parquet(file)
    found = dict(zip(frame["method"], frame["false_variable/iia_changing_argmax"].tolist(), strict=True))
    assert 0 <= found["revnet"] <= 1 and found["das"] != found["das"], "a linear map has none"


def test_a_fit_whose_false_variable_passes_is_flagged() -> None:
    place = {"layer": 1, "component": "block_output", "position": "last", "seed": 0, "method": "revnet", "rank": 2}
    column = "iia_changing_argmax"
    rows = [{**place, column: 0.99, f"false_variable/{column}": each} for each in (0.9, 0.5)]
    assert list(flagged(pandas.DataFrame(rows))["flag"]) == ["false variable passes", ""]
    kept = f"false_variable/{column.replace('changing', 'preserving')}"
    alike = [{**rows[0], kept: each} for each in (0.1, 0.9)]
    assert list(flagged(pandas.DataFrame(alike))["flag"]) == ["", "false variable passes"], "swapped alike in all pairs"
