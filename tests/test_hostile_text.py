"""Names of folders, tasks, tokens and classes reach the screen, pictures and pages as they are written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from itrain.reports.curves import save_curves
from itrain.reports.figures import save_run_figure
from itrain.reports.generations import print_generations
from itrain.reports.heat_maps import draw
from itrain.reports.html import save_report
from itrain.reports.sweeps import SweepProgress, show_sweep
from itrain.reports.terminal import show
from itrain.reports.text import drawn, listed, plain
from itrain.trust import printable
from tests.tables import curves, finished, summary_of, table

HOSTILE = [
    "x[/b]",
    "[v2]",
    "a\\",
    ":smile:",
    "$$",
    "$x^{",
    r"\frac{1}{0}$ $",
    "_under_",
    "<script>alert(1)</script>",
    "^",
]
RUN = {"test/own": 1.0, "test/[v2]": 0.5, "test/$$": 0.25, "test/_u": 0.125}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_screen_shows_a_name_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Console().print(plain(name))
    assert capsys.readouterr().out == f"{name}\n"


def test_the_screen_acts_on_no_character_of_a_name() -> None:
    assert plain("a\x1b[2Jb\rc\u202ed").plain == r"a\x1b[2Jb\rc\u202ed"
    assert printable("naïve 名前 ok\n") == "naïve 名前 ok\\n"


@pytest.mark.parametrize("folder", ["x[/b]", "[v2]"])
def test_a_run_in_a_folder_of_any_name_is_shown(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(RUN, Path(folder))
    said = capsys.readouterr().out
    assert f"folder: {folder}" in said and "[v2]  " in said


def test_a_sweep_with_any_names_is_shown_drawn_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    frame = table(layers=5, positions=tuple(HOSTILE))
    trained = curves(frame).replace({"method": {"das": "x[/b]"}})
    frame = frame.replace({"method": {"das": "x[/b]", "full_vector": "$x^{", "probing": "[/]"}})
    folder = finished(tmp_path / "[v2]", frame, name="x[/b]", trained=trained)
    (folder / "tokens.json").write_text(
        json.dumps({"text": "[/b]", "tokens": dict(zip(HOSTILE, HOSTILE, strict=True))})
    )
    summary = summary_of(folder)
    figure = draw(summary.maps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
        save_curves(summary)
    texts = [text for axes in figure.axes for text in (*axes.get_xticklabels(), axes.title)]
    lines = {line for text in texts for line in text._preprocess_math(text.get_text())[0].split("\n")}
    assert set(HOSTILE) <= lines
    show_sweep(summary)
    said = capsys.readouterr().out
    assert "[v2]" in said and all(name in said for name in HOSTILE)
    save_report([folder], tmp_path / "report.html")
    assert "<script>alert" not in (tmp_path / "report.html").read_text()


def test_the_figure_of_a_run_shows_any_names(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,val$$\n0,1,2\n1,1,2\n")
    save_run_figure(tmp_path / "metrics.csv", {f"test/{name}": 0.5 for name in HOSTILE}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_names_of_lines_stay_in_the_list() -> None:
    assert not listed("_das").startswith("_") and listed("das") == "das"
    assert drawn("$a$\n\x07") == "\\$a\\$\n\\x07"


def test_progress_and_generations_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_generations({"prompt": ["x[/b]", "[v2] :smile:"], "after": ["[/]", "\x1b[2J"]})
    said = capsys.readouterr().out
    assert "x[/b]" in said and "[v2] :smile:" in said and "\x1b" not in said
    with SweepProgress(quiet=False) as progress:
        progress.say("threads [/x]")
        progress.done([{"method": "x[/b]", "layer": 0, "position": "[v2]", "iia_changing_argmax": 0.5}])
    assert "threads [/x]" in capsys.readouterr().out
