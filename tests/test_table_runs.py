"""A user's table through the command line: fit, sweep, report, export, test, resume, without a line of Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from itrain.cli import main
from tests.commands import SMALL
from tests.listed import gender_rows, three, write_csv, write_jsonl

QUIET = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return gender_rows()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> Path:
    """A working folder with the table ``my.jsonl``."""
    write_jsonl(tmp_path / "my.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def folder_of(output: Path) -> Path:
    (folder,) = {file.parent for file in output.rglob("config.yaml")}
    return folder


def task_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())["task"]


def test_a_table_is_fitted_exported_and_tested(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """200 own pairs, as the task class would make them, give what the task class gives."""
    assert main(["fit", "recipe=das_gender", "data.pairs=my.jsonl", *QUIET, "output=one"]) == 0
    said = capfd.readouterr().out
    assert "140 train" in said and "table   my.jsonl, 200 rows, splits of the column split" in said
    folder = folder_of(here / "one")
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["test/iia_changing_argmax"] > 0.9 > 0.1 > figures["test/random_subspace/iia_changing_argmax"]
    task = task_of(folder)
    assert (
        task["_target_"] == "itrain.tasks.table.table"
        and task["pairs"] == "my.jsonl"
        and len(task["fingerprint"]) == 16
    )

    export = (folder / "export" / "intervention_config.json").read_text()
    assert json.loads(export)["configuration"]["task"]["fingerprint"] == task["fingerprint"]
    texts = {row["base"] for row in gender_rows({"train": 5, "validation": 1, "test": 1})}
    kept = "".join(file.read_text(errors="replace") for file in (folder / "export").iterdir())
    assert not any(text in kept for text in texts), "an export carries none of the user's data"

    assert main(["test", f"export={folder / 'export'}", *QUIET, "output=two"]) == 0
    again = json.loads((folder_of(here / "two") / "metrics.json").read_text())
    assert again["test/iia_changing_argmax"] == figures["test/iia_changing_argmax"]
    assert main(["export", f"ckpt={folder}", "output=three"]) == 0

    with (here / "my.jsonl").open("a") as file:
        file.write("\n")
    capfd.readouterr()
    assert main(["test", f"export={folder / 'export'}", *QUIET]) == 1
    assert "'my.jsonl' has changed since: its fingerprint is" in capfd.readouterr().err
    assert main(["fit", f"ckpt={folder}", "trainer.max_epochs=20", *QUIET]) == 1
    assert main(["test", f"export={folder / 'export'}", "data.pairs=my.jsonl", *QUIET]) == 0
    (here / "my.jsonl").unlink()
    capfd.readouterr()
    assert main(["test", f"export={folder / 'export'}", *QUIET]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "there is no file 'my.jsonl'" in line


def test_a_table_is_swept_and_reported(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["sweep.layers=[2]", "sweep.positions=[name,last]", "sweep.methods=[das,probing]", "data.control=name"]
    sizes = ["data.train_pairs=100", "data.test_pairs=64", "trainer.max_epochs=2", *QUIET]
    assert main(["sweep", "recipe=das_gender", "data.pairs=my.jsonl", *words, *sizes, "output=one"]) == 0
    folder = folder_of(here / "one")
    assert "probing" in (folder / "report.html").read_text()
    assert main(["report", str(folder), "output=r.html"]) == 0
    assert "data.pairs=my.jsonl" in (here / "r.html").read_text()
    write_csv(here / "my.jsonl", three())
    capfd.readouterr()
    assert main(["sweep", f"resume={folder}"]) == 1
    assert "has changed since" in capfd.readouterr().err


@pytest.mark.slow
def test_a_plan_counts_the_rows_of_a_table(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=das_gender", "data.pairs=my.jsonl"]) == 0
    assert "32 examples on each" in capfd.readouterr().out


def test_a_task_beside_the_table_reads_its_rows(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common = {"template": "{name} {verb} {connective}", "connective": "because", "other": "Mary", "other_verb": "ran"}
    names = ("Mary", "Lisa", "Anna", "Emma", "Sarah", "Laura")
    pairs = [
        {"base": {**common, "name": name, "verb": verb}, "source": {**common, "name": "John", "verb": verb}}
        for name in names
        for verb in ("walked", "jumped", "slept", "sang", "ran")
    ]
    write_csv(here / "inputs.csv", pairs)
    words = ["data.pairs=inputs.csv", "data.disjoint=[base.name]", "trainer.max_epochs=2", *QUIET]
    assert main(["fit", "recipe=das_gender", "task=gender", "task.changing=1.0", *words, "output=one"]) == 0
    assert "6 groups that share base.name" in capfd.readouterr().out
    task = task_of(folder_of(here / "one"))
    assert task["of"]["_target_"] == "itrain.tasks.gender.Gender" and task["of"]["changing"] == 1.0
    assert main(["fit", "recipe=das_gender", *words]) == 1
    assert "rows of a task's inputs need task=<task> beside data.pairs" in capfd.readouterr().err
    assert main(["fit", "recipe=das_gender", "task=gender", "data.pairs=my.jsonl", *QUIET]) == 1
    assert "of rows with texts and labels, leave task=<task> out" in capfd.readouterr().err

    recipe: dict[str, Any] = {"defaults": [{"override /task": "gender"}], "data": {"pairs": "inputs.csv"}}
    (here / "own.yaml").write_text(yaml.safe_dump({**recipe, "site": "layer2.block_output@name"}))
    assert main(["show", "recipe=own.yaml"]) == 0
    assert yaml.safe_load(capfd.readouterr().out)["task"]["of"]["_target_"] == "itrain.tasks.gender.Gender"
    (here / "own.yaml").write_text(yaml.safe_dump({"data": {"pairs": "my.jsonl", "disjoint": ["base"]}}))
    assert main(["show", "recipe=own.yaml"]) == 0
    shown = yaml.safe_load(capfd.readouterr().out)["task"]
    assert shown["of"] is None and shown["disjoint"] == ["base"]


def test_a_pair_in_the_recipe_may_be_replaced(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Settings of the recipe's table and its task stay."""
    write_jsonl(here / "other.jsonl", three())
    (here / "own.yaml").write_text(yaml.safe_dump({"data": {"pairs": "my.jsonl", "control": "name"}}))
    assert main(["show", "recipe=own.yaml", "data.pairs=other.jsonl"]) == 0
    shown = yaml.safe_load(capfd.readouterr().out)["task"]
    assert (shown["pairs"], shown["control"]) == ("other.jsonl", "name")
    assert main(["show", "task=table", "task.pairs=my.jsonl"]) == 0
    assert yaml.safe_load(capfd.readouterr().out)["task"]["pairs"] == "my.jsonl"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["data.pairs=no.jsonl"], 2, "data.pairs: there is no file 'no.jsonl'"),
        (
            ["data.pairs=my.jsonl", "data.disjont=[base]"],
            2,
            "data.disjont: no such setting .*, did you mean 'disjoint'",
        ),
        (["data.disjoint=[base]"], 2, "data.disjoint is said of a table, and none is named; add data.pairs=<file>"),
        (["data.pairs=my.jsonl", "data.rows=many"], 2, "task.rows"),
        (["data.pairs=my.jsonl", "site=layer2.block_output@subject"], 1, "subject"),
        (["data.pairs=my.jsonl", "data.test_pairs=0"], 1, "data.test_pairs=0 takes no pairs"),
        (["data.pairs=my.jsonl", "training=probing", "data.control=nam"], 1, "did you mean 'name'"),
    ],
)
def test_a_wrong_request_is_one_line(
    words: list[str], code: int, message: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(["fit", "recipe=das_gender", *words, *QUIET]) == code
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_a_table_without_values_trains_no_probe(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With one class, any probe would be right."""
    bare = [{k: v for k, v in row.items() if k not in ("base_values", "source_values")} for row in gender_rows()]
    write_jsonl(here / "bare.jsonl", bare)
    assert main(["fit", "recipe=das_gender", "training=probing", "data.pairs=bare.jsonl", *SMALL]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "'gender' has 1 value" in line and "base_values.gender" in line
    sweep = ["sweep", "recipe=das_gender", "data.pairs=bare.jsonl", "sweep.methods=[das,probing]", "sweep.layers=[2]"]
    assert main([*sweep, "sweep.random_model=false", "output=swept", *SMALL]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("or leave probes out: sweep.methods=[das]"), "before anything is fitted"
