"""Tables on the screen: at any width every name, head and number is there, and numbers end below each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from itrain.reports.sweeps import show_sweep
from itrain.reports.tables import print_table
from itrain.reports.terminal import aligned, only_results, show, suggest, typed
from itrain.results.parts import Table
from itrain.results.run import summarise_run
from tests.tables import finished, summary_of, table, with_controls

WIDE = Table(
    title="wide",
    heads=[("odds", "mean"), ("", "95%"), ("logit gap", "clean"), ("", "edited"), ("pairs", "flipped pairs")],
    rows={f"a rather long name {n}": ["15.69", "±0.33", "8.28", "-7.42", "0.992\n0.9-1.0"] for n in range(2)},
    note="Odds: 0 is no effect.",
)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_no_cell_of_a_table_is_cut(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(Console(width=width), WIDE)
    told = capsys.readouterr().out
    assert "…" not in told and all(told.count(cell) == 2 for cell in ("15.69", "±0.33", "-7.42", "0.992", "0.9-1.0"))
    assert all(head in told for head in ("odds", "logit gap", "mean", "edited", "flipped", "How to read: Odds:"))


def test_a_wide_table_continues_below_with_the_names_of_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(Console(width=50), WIDE)
    lines = capsys.readouterr().out.split("How to read")[0].splitlines()
    assert max(map(len, lines)) <= 50
    assert sum(line.startswith("a rather long name 0") for line in lines) == 2


def test_numbers_end_below_each_other_and_wide_letters_count_double(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"名前": ["1.00"], "b": ["-12.00"]}
    print_table(Console(width=80), Table(title="", heads=[("", "value")], rows=rows, corner="layer"))
    head, _, first, second = capsys.readouterr().out.rstrip().splitlines()[-4:]
    assert (head, first, second) == ("layer   value", "名前     1.00", "b      -12.00")


def test_the_methods_of_a_sweep_have_their_names_at_eighty_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    frame = with_controls(table(positions=("first", "connective"))).assign(
        window=1, divergence=0.0203, natural_divergence=0.00509
    )
    show_sweep(summary_of(finished(tmp_path / "sweep", frame)), tmp_path / "report.html")
    told = capsys.readouterr().out
    best = told[told.index("best sites") :]
    assert "…" not in told and "random subspace" in best and "0.0203 (0.00509)" in best
    assert "How to read: The best site is layer@position" in best and "next: itrain report" in best


def test_names_of_any_length_stand_apart_from_their_values() -> None:
    assert aligned({"test sets": "16 test", "model": "m"}) == ["test sets 16 test", "model     m"]
    assert aligned({"model": "m"}) == ["model   m"]


def test_what_comes_next_is_told_but_not_among_results_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ITRAIN_QUIET", raising=False)
    assert typed(tmp_path / "my run") == "'my run'" and typed(Path("/elsewhere")) == "/elsewhere"
    suggest({"itrain report a": "a page", "itrain test export=a": "tests it"})
    assert capsys.readouterr().out.splitlines() == [
        "next: itrain report a       # a page",
        "      itrain test export=a  # tests it",
    ]
    with only_results():
        suggest({"itrain report a": "a page"})
    assert capsys.readouterr().out == ""


def test_generated_texts_stand_before_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show({"test/exact_match": 1.0, "test/perplexity": 1.2}, tmp_path, {"prompt": ["The"], "after": ["cat"]})
    told = capsys.readouterr().out
    assert told.index("greedy generations") < told.index("folder: ")


def test_a_picture_says_how_to_read_it_and_what_its_marks_are(tmp_path: Path) -> None:
    probe = {f"test/{name}/gender": 0.9 for name in ("probe_accuracy", "control_accuracy", "selectivity")}
    (tmp_path / "metrics.csv").write_text("step,train/loss,validation/probe_accuracy\n0,1,\n1,,0.5\n")
    summary = summarise_run(probe | {"test/majority_accuracy/gender": 0.5}, tmp_path / "metrics.csv")
    said = "Dotted: most frequent class. Grey: the loss of each training step. Blue dots: validation"
    assert said in summary.caption and summary.curve is not None and summary.curve.figure == "validation accuracy"
    detector = {f"test/{name}/a": 0.9 for name in ("auroc", "true_positive_rate", "false_positive_rate", "f1")}
    bars = summarise_run(detector).bars
    assert bars is not None and bars.mark == "chance", "0.5 is no class's share"
