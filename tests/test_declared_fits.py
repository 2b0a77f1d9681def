"""Fits of tasks without Python: from a file to weights, a sweep, its report and exports, and the figures they reach."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from itrain import cli
from itrain.results.table import read_results
from tests.commands import SMALL
from tests.test_declared import FOLDER

ADDITION = Path(__file__).parents[1] / "configs" / "task" / "addition.yaml"
WORDS = f"model.words={[str(number) for number in range(20)] + ['+', '=']}".replace(" ", "")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    shutil.copy(ADDITION, tmp_path / "my" / "addition.yaml")
    return tmp_path


def run(*words: str) -> None:
    assert cli.main(list(words)) == 0, words


def figures(name: str) -> dict[str, float]:
    (file,) = Path("outputs", name).rglob("metrics.json")
    return json.loads(file.read_text())


def everything(*fit: str, sweep: tuple[str, ...] = ()) -> None:
    """Teach a model addition, write it as a model, find the carry in it by a sweep, and show the sweep again."""
    run("fit", "task=my/addition.yaml", "model=untrained", WORDS, "training=iit", "data.keep=all", "name=taught",
        "intervention=fixed_blocks", "intervention.blocks={carry:16}", "site=layer0.block_output@last",
        *fit)  # fmt: skip
    (taught,) = Path("outputs", "taught").iterdir()
    run("test", f"export={taught / 'export'}", "name=tested")
    run("export", f"export={taught / 'export'}", "merge=true", "output=merged")
    run("sweep", "task=my/addition.yaml", "model=hf", "model.name=merged", "name=swept",
        "sweep.methods=[das,random_subspace]", "sweep.ranks=[2]", "sweep.positions=[last]", "data.keep=all",
        *sweep)  # fmt: skip
    (swept,) = Path("outputs", "swept").iterdir()
    run("report", str(swept), "output=again.html")
    assert "carry" in Path("again.html").read_text()


def test_addition_with_carry_goes_from_a_file_to_a_report_without_python() -> None:
    everything("model.hidden_size=16", *SMALL, sweep=("sweep.layers=[0]", *SMALL))
    tested, fitted = figures("tested"), figures("taught")
    assert tested["test/iia_argmax"] == fitted["test/iia_argmax"], "an untrained model is made anew by its seed"


@pytest.mark.slow
def test_iit_teaches_addition_and_das_finds_its_carry() -> None:
    sizes = ["data.train_pairs=4096", "data.validation_pairs=512", "data.test_pairs=512", "data.batch_size=64"]
    everything(
        *sizes,
        "trainer.max_epochs=10",
        "training.optimizer.lr=3e-3",
        sweep=("sweep.layers=[0,1]", "data.test_pairs=256"),
    )
    assert figures("taught")["test/iia_changing_argmax"] > 0.95
    (swept,) = Path("outputs", "swept").iterdir()
    found = read_results(swept)
    best = {name: rows["iia_changing_argmax"].max() for name, rows in found.groupby("method")}
    assert best["das"] > 0.95 and best["random_subspace"] < 0.2


@pytest.mark.slow
def test_das_finds_in_a_declared_task_what_it_finds_in_the_class() -> None:
    for name, task in (("declared", [f"task={FOLDER / 'gender.yaml'}"]), ("class", [])):
        run("fit", "recipe=das_gender", f"name={name}", "trainer.enable_progress_bar=false", *task)
    declared, expected = figures("declared"), figures("class")
    for key in ("test/iia_changing_argmax", "test/iia_preserving_argmax", "test/random_subspace/iia_changing_argmax"):
        assert abs(declared[key] - expected[key]) < 0.03, key
