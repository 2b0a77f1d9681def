"""The table of reproductions: rows, what is run again and what is not, verdicts, and what is left of a stop."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from itrain import cli, config, experiment
from itrain.reproducing import runs as running
from itrain.reproducing.figures import figures_of
from itrain.reproducing.rows import missing, read_rows, words_of
from itrain.results.reproduction import Expected, Found, Row
from itrain.signatures import ConfigError
from tests.pages import DOCS, blocks

ROWS = read_rows()
SMALL = "data.train_pairs=32 data.validation_pairs=16 data.test_pairs=16 trainer.max_epochs=1"
ROW: dict[str, Any] = {
    "title": "A row.",
    "paper": "none",
    "command": f"fit recipe=das_gender {SMALL} seed={{seed}}",
    "seeds": [0],
    "figures": {"test/iia_argmax": {"published": 0.9, "at_least": 0.5}},
    "minutes": 0.1,
    "quick": True,
}
HOME = Path("outputs/reproduce")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write a row of one's own to ./rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()

    def put(name: str = "mine", **changed: Any) -> None:
        (tmp_path / "rows" / f"{name}.yaml").write_text(yaml.safe_dump({**ROW, **changed}))

    return put


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A stand-in for fits: the figure is 0.6 and a tenth of the seed; returns the folders of those that ran."""
    ran: list[str] = []

    def fit(configuration: Any, folder: Path) -> None:
        print("as every run prints")
        if configuration.seed == 9:
            raise KeyError("a bug")
        if configuration.seed == 8:
            os.kill(os.getpid(), signal.SIGINT)
        ran.append(str(folder))
        (folder / "metrics.json").write_text(json.dumps({"test/iia_argmax": 0.6 + configuration.seed / 10, "x": None}))

    monkeypatch.setattr(experiment, "fit", fit)
    # A shell has its background commands ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield ran
    signal.signal(signal.SIGINT, before)


def reproduce(*words: str) -> int:
    return cli.main(["reproduce", "rows=rows", *words])


def table() -> dict[str, Any]:
    return {row["name"]: row for row in json.loads((HOME / "table.json").read_text())["rows"]}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_composes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    verb, *words = words_of(ROWS[name].command_of(ROWS[name].seeds[0]))
    assert config.compose(words, sweeps=verb == "sweep").training._target_.startswith("itrain.training.")


def test_there_are_rows_that_run_and_rows_that_need_weights() -> None:
    runnable = [row for row in ROWS.values() if row.needs is None]
    assert len(runnable) >= 15 and any(row.quick for row in runnable) and len(runnable) < len(ROWS)
    assert [row.quick for row in ROWS.values()] == sorted((row.quick for row in ROWS.values()), reverse=True)
    assert all(row.minutes <= 1 / 3 for row in runnable if row.quick)


def test_a_row_is_run_once_and_shown_with_its_spread(
    write: Callable[..., None], fits: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(seeds=[0, 1])
    assert reproduce() == 0
    assert [Path(folder).parent.name for folder in fits] == ["seed0", "seed1"]
    said = capsys.readouterr().out
    assert "0.650 ± 0.071" in said and ">= 0.5" in said and "holds" in said and "as every run prints" not in said
    assert (HOME / "mine/seed0/log.txt").read_text() == "as every run prints\n"
    found = table()["mine"]
    assert found["state"] == "holds" and found["figures"][0]["published"] == 0.9
    assert found["figures"][0]["values"] == [0.6, 0.7]
    assert found["runs"][1]["command"].endswith("seed=1") and Path(found["runs"][1]["folder"]).samefile(fits[1])
    assert {"cpu", "cores", "gpu", "torch", "itrain"} <= set(found["runs"][0]["made_with"])
    page = (HOME / "report.html").read_text()
    assert "0.650 ± 0.071" in page and "A row." in page and found["runs"][0]["folder"] in page
    assert reproduce() == 0 and len(fits) == 2
    assert table()["mine"] == found


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({"title": "Another title", "minutes": 3}, 0),
        ({"figures": {"test/iia_argmax": {"at_most": 0.9}}}, 0),
        ({"seeds": [1, 0]}, 1),
        ({"command": f"fit recipe=das_gender {SMALL} intervention.rank=2 seed={{seed}}"}, 1),
    ],
)
def test_an_edited_row_runs_again_what_the_edit_changes(
    changed: dict[str, Any], again: int, write: Callable[..., None], fits: list[str]
) -> None:
    write()
    reproduce()
    write(**changed)
    assert reproduce() == 0
    assert len(fits) == 1 + again
    assert [run["seed"] for run in table()["mine"]["runs"]] == changed.get("seeds", [0])


def test_another_recipe_or_version_runs_a_row_again(
    write: Callable[..., None], fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("recipes").mkdir()
    recipe = Path("recipes/mine.yaml")
    recipe.write_text("seed: 0\n")
    write(command="fit recipe=mine seed={seed}")
    reproduce()
    recipe.write_text("seed: 0\ntrainer: {max_epochs: 2}\n")
    reproduce()
    assert len(fits) == 2
    monkeypatch.setattr(running, "__version__", "9.9")
    reproduce()
    assert len(fits) == 3


def test_a_missed_bound_and_a_failure_are_told_and_others_go_on(
    write: Callable[..., None], fits: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write("bug", seeds=[9, 0])
    write("high", seeds=[0, 1], figures={"x": {}, "test/iia_argmax": {"at_least": 0.9}})
    write("none", figures={"x": {"at_least": 0.9}})
    write("typo", figures={"test/iia_argmx": {}})
    write("wrong", command="fit recipe=das_gendr seed={seed}")
    write("zoo")
    assert reproduce() == 1
    said = capsys.readouterr()
    assert said.err == "itrain: missed: high, none; failed: bug, typo, wrong\n"
    assert "bug: seed 9: KeyError: 'a bug'" in said.out
    assert "no figure 'test/iia_argmx', did you mean 'test/iia_argmax'?" in said.out
    assert "wrong: there is no recipe 'das_gendr', did you mean 'das_gender'?" in said.out
    assert "a bug" in (HOME / "bug/seed9/log.txt").read_text()
    states = {name: row["state"] for name, row in table().items()}
    assert states == {
        "bug": "failed",
        "high": "missed",
        "none": "missed",
        "typo": "failed",
        "wrong": "failed",
        "zoo": "holds",
    }
    assert table()["none"]["figures"][0]["mean"] is None


def test_a_stop_keeps_what_is_done_and_the_next_call_goes_on(
    write: Callable[..., None], fits: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(seeds=[0, 8, 1])
    assert reproduce("mine") == 130
    assert "to go on: itrain reproduce rows=rows mine" in capsys.readouterr().err
    assert table()["mine"]["state"] == "1 of 3 seeds" and len(fits) == 1
    write(seeds=[0, 1])
    assert reproduce() == 0 and len(fits) == 2


def test_a_row_that_needs_what_is_not_here_is_listed_and_not_run(
    write: Callable[..., None], fits: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(needs="weights of Gemma-2-2B")
    write("extra", package="no-such-package")
    assert reproduce() == 0 and not fits
    said = capsys.readouterr().out
    assert "mine needs weights of Gemma-2-2B: itrain fit recipe=das_gender" in said
    assert "extra needs package no-such-package" in said and "2 rows: 2 not run" in said
    assert table()["mine"]["state"] == "not run" and table()["mine"]["needs"] == "weights of Gemma-2-2B"
    assert reproduce("--list") == 0 == reproduce("list")
    assert "not run, needs weights of Gemma-2-2B" in capsys.readouterr().out


def test_rows_are_chosen_by_name_or_as_quick(write: Callable[..., None], fits: list[str]) -> None:
    write("slow", quick=False)
    write("fast")
    assert reproduce("quick") == 0
    assert table()["fast"]["state"] == "holds" and table()["slow"]["state"] == "not run"
    assert reproduce("slow") == 0
    assert [row["state"] for row in table().values()] == ["holds", "holds"] and len(fits) == 2


def test_quick_of_slow_rows_alone_is_refused_and_not_an_empty_table(
    write: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    write("slow", quick=False)
    for words in (["quick"], ["quick", "slow"]):
        assert reproduce(*words) == 2
        assert "leave quick out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mien"], "there is no row 'mien', did you mean 'mine'?"),
        (["row=mine"], "'row=mine' is not for 'reproduce', did you mean 'rows'?"),
        (["--lst"], "'--lst' is not for 'reproduce', did you mean '--list'?"),
        (["rows=."], "rows: there is no .yaml file of a row in '.'"),
    ],
)
def test_a_wrong_word_is_refused(
    words: list[str], message: str, write: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    assert reproduce(*words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"titel": "x"}, "titel: no such key, did you mean 'title'?"),
        ({"seeds": []}, "seeds: give one or more"),
        ({"seeds": [1, 1]}, "seeds: one is listed twice"),
        ({"minutes": "few"}, 'minutes: expected a number or null, not "few"'),
        ({"figures": {"a": {"atleast": 1}}}, "figures.a: atleast: no such key, did you mean 'at_least'?"),
        ({"figures": {"a": {"at_least": 1, "at_most": 0}}}, "figures.a: nothing is >= 1, <= 0; swap the bounds"),
        ({"command": "fit recipe=das_gender", "seeds": [0, 1]}, "so that all seeds would be one run; add seed={seed}"),
        ({"command": "test ckpt=x seed={seed}"}, "command: it begins with fit or sweep, not with 'test'"),
        ({"command": "fit 'recipe={seed}"}, "command: no closing quotation"),
        ({"command": "fit output=x seed={seed}"}, "'output=x' is given by 'itrain reproduce'"),
    ],
)
def test_a_row_that_is_none_is_refused_by_file_and_key(
    changed: dict[str, Any], message: str, write: Callable[..., None]
) -> None:
    write(**changed)
    with pytest.raises(ConfigError) as error:
        read_rows(Path("rows"))
    assert str(error.value).startswith("row 'rows/mine.yaml': ") and message in str(error.value)


def test_a_row_runs_on_one_device(write: Callable[..., None], fits: list[str]) -> None:
    write(command=f"{ROW['command']} trainer=ddp_cpu trainer.devices=2")
    assert reproduce() == 1 and not fits
    assert "a row runs in one process" in table()["mine"]["error"]


def test_bounds_hold_at_the_mean_over_seeds() -> None:
    expected = Expected(at_least=0.5, at_most=0.75)
    for values, holds in {(0.25, 1.0): True, (0.0, 0.5): False, (0.8,): False, (): False}.items():
        assert Found(name="x", expected=expected, values=values).holds is holds
    assert expected.bounds == ">= 0.5, <= 0.75" and not expected.holds(float("nan"))


def test_figures_of_a_sweep_are_named_by_method_and_site(tmp_path: Path) -> None:
    frame = pandas.DataFrame(
        {
            "method": ["das", "das", "das", "probing"],
            "component": "block_output",
            "layer": [0, 0, 1, 0],
            "position": ["name", "last", "name", "last"],
            "rank": [1.0, 1.0, 1.0, None],
            "seed": 0,
            "iia_changing_pairwise": [0.25, 0.75, 0.5, None],
            "probe_accuracy": [None, None, None, 1.0],
        }
    )
    frame.to_parquet(tmp_path / "results.parquet")
    wanted = {
        "das/best/iia_changing_pairwise": 0.75,
        "das/mean_over_layers/iia_changing_pairwise": 0.625,
        "das/layer0.block_output@name/iia_changing_pairwise": 0.25,
        "probing/layer0.block_output@last/probe_accuracy": 1.0,
    }
    assert figures_of(tmp_path, wanted, sweeps=True) == wanted
    for name, message in {
        "ads/best/odds": "no method 'ads', did you mean 'das'",
        "das/layer2.block_output@name/iia_changing_pairwise": "no site 'layer2.block_output@name', did you mean",
        "das/best/iia": "das has no figure 'iia'",
        "das/best": "is no <method>/<site>/<figure>",
    }.items():
        with pytest.raises(ConfigError, match=message):
            figures_of(tmp_path, [name], sweeps=True)


@pytest.mark.parametrize(
    ("command", "figure", "message"),
    [
        ("fit", "test/iia_argmaxx", "no figure 'test/iia_argmaxx', did you mean 'test/iia_argmax'?"),
        ("sweep", "das/best/ia_changing_pairwise", "did you mean 'das/best/iia_changing_pairwise'?"),
        ("sweep", "dass/best/iia_argmax", "the sweep has no method 'dass', did you mean 'das'?"),
        ("sweep", "das/iia_argmax", "is no <method>/<site>/<figure>"),
    ],
)
def test_a_misspelt_figure_is_refused_before_the_run(
    command: str, figure: str, message: str, write: Callable[..., None], fits: list[str]
) -> None:
    recipe = "das_gender seed={seed}" if command == "fit" else "das_vs_probe_gender sweep.seeds=[{seed}]"
    write(command=f"{command} recipe={recipe}", figures={figure: {"at_least": 0.5}})
    assert reproduce() == 1 and not fits
    assert message in table()["mine"]["error"]


def test_a_figure_of_one_s_own_is_not_taken_for_a_misspelt_one(write: Callable[..., None], fits: list[str]) -> None:
    write(figures={"x": {}})
    reproduce()
    assert fits and table()["mine"]["error"] is None


def test_a_sweep_is_a_row_too(write: Callable[..., None]) -> None:
    grid = "sweep.methods=[full_vector] sweep.layers=[2] sweep.positions=[name] sweep.random_model=false"
    write(
        command=f"sweep recipe=das_gender {grid} {SMALL} sweep.seeds=[{{seed}}]",
        seeds=[3],
        figures={"full_vector/layer2.block_output@name/iia_changing_pairwise": {"at_least": 0.9}},
    )
    assert reproduce() == 0
    (run,) = table()["mine"]["runs"]
    assert (Path(run["folder"]) / "results.parquet").is_file()


def test_what_is_missing_is_asked_of_the_installed_packages(write: Callable[..., None]) -> None:
    write(package="torch")
    assert missing(read_rows(Path("rows"))["mine"]) is None


def test_the_guide_s_row_and_keys_are_understood(tmp_path: Path) -> None:
    (block,) = [each for each in blocks("results/reproduce.md") if each.file]
    (tmp_path / Path(str(block.file)).name).write_text(block.code)
    (row,) = read_rows(tmp_path).values()
    assert config.compose(words_of(row.command_of(0))[1:], sweeps=True).sweep.layers == [2, 5]
    page = (DOCS / "results" / "reproduce.md").read_text(encoding="utf-8")
    keys = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert keys == [field.name for field in fields(Row) if field.name != "name"]
