"""Sweeps of trainings whose fits share no run: each row is the fit that its command makes, of trained models too."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from itrain.cli import main
from itrain.config import compose
from itrain.results.table import read_results
from itrain.sweeps.jobs import CohortJob, jobs_of
from itrain.sweeps.run import open_part
from itrain.training.alignment import AlignmentSearch

REFT = [
    "recipe=reft_style", "data.train_examples=16", "data.test_examples=8", "data.validation_examples=4",
    "trainer.max_epochs=2", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "threads=1",
]  # fmt: skip
IIT = [
    "recipe=iit_hierarchical_equality", "model.steps=100", "data.keep=all", "data.train_pairs=128",
    "data.validation_pairs=32", "data.test_pairs=64", "data.batch_size=64", "trainer.max_epochs=2",
    "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "threads=1",
]  # fmt: skip
GRIDS = {
    "reft": [*REFT, "sweep.layers=[1,3]", "sweep.positions=[last]", "sweep.ranks=[2]"],
    "iit": [*IIT, "sweep.sites=[module:hidden1.output,module:hidden2.output]"],
}
FIGURES = {"reft": ["perplexity", "exact_match"], "iit": ["iia_changing_argmax", "task_accuracy", "strict_accuracy"]}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", GRIDS)
def test_each_row_is_the_fit_that_its_command_makes(kind: str) -> None:
    """Of a model that is trained, the second fit starts from the model as loaded, not as the first has left it."""
    assert main(["sweep", *GRIDS[kind], "output=swept"]) == 0
    (table,) = Path("swept").rglob("results.parquet")
    frame = read_results(table.parent)
    assert len(frame) == 2 and (frame.method == {"reft": "loreft", "iit": "fixed_blocks"}[kind]).all()
    twins = frame.filter(like="random_model/")
    assert twins["random_model/perplexity"].notna().all() if kind == "reft" else twins.isna().all(axis=None)
    last = frame.iloc[-1]
    assert main([*shlex.split(last.command)[3:], "output=fitted"]) == 0
    (metrics,) = Path("fitted").rglob("metrics.json")
    fitted = json.loads(metrics.read_text())
    for figure in FIGURES[kind]:
        assert last[figure] == pytest.approx(fitted[f"test/{figure}"], abs=1e-6), figure
    assert frame[FIGURES[kind][0]].nunique() == 2


@pytest.mark.parametrize("setting", ["control_task=true", "patience=2"])
def test_what_only_fits_side_by_side_have_is_refused(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *GRIDS["reft"], f"sweep.{setting}"]) != 0
    assert f"sweep.{setting.split('=')[0]} is for fits that are trained side by side" in capsys.readouterr().err


def test_a_search_with_steps_of_its_own_is_not_trained_as_others_are() -> None:
    """A cohort takes the steps of AlignmentSearch, whatever a subclass makes of them."""

    class Own(AlignmentSearch):
        pass

    words = ["recipe=das_gender", "sweep.layers=[2]", "sweep.positions=[name]", "data.train_pairs=8"]
    part = open_part(compose([*words, "sweep.methods=[das]"], sweeps=True), Path("."), 0)
    kinds = [[type(job) for job in jobs_of(part.grid, 0, part.opened, each)] for each in (AlignmentSearch, Own)]
    assert kinds[0] == [CohortJob] and CohortJob not in kinds[1]
