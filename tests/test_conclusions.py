"""What a sweep comes to: what stands first on screen and page, and what stands in the report alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from runpy import run_path
from typing import Any

import pandas
import pytest
from rich.console import Console

from itrain.cli import main
from itrain.reports.html import save_report
from itrain.reports.sweeps import show_sweep
from itrain.reports.tables import print_table
from itrain.results.columns import FIGURES, IIA, ODDS
from itrain.results.conclusions import read_beyond
from itrain.results.parts import Table
from itrain.results.summary import SweepSummary
from tests.pages import HOME
from tests.tables import finished, summary_of, table, with_controls

SWEEP_PAGE = "reference/configuration/sweep.md"


def rows(method: str, shares: dict[tuple[int, str], float], figure: str = IIA, **others: Any) -> list[dict[str, Any]]:
    """The fits of a method, one at each layer and position."""
    counted = {"pairs_changing": 64.0} if figure == IIA else {"examples": 64.0, "majority_accuracy": 0.5}
    return [
        {"method": method, "component": "block_output", "layer": layer, "position": position, "rank": 1, "seed": 0}
        | {"command": f"{method} {layer} {position} {others}", figure: share, **counted, **others, "flag": ""}
        for (layer, position), share in shares.items()
    ]


def swept(folder: Path, *fits: list[dict[str, Any]]) -> SweepSummary:
    return summary_of(finished(folder, pandas.DataFrame([row for part in fits for row in part])))


def shares(*values: float) -> dict[tuple[int, str], float]:
    return dict(zip([(0, "name"), (0, "last"), (2, "name"), (2, "last")], values, strict=True))


def usual(folder: Path) -> SweepSummary:
    """DAS, the mean difference, a probe and both controls, with odds."""
    return swept(
        folder,
        rows("das", shares(0.8, 0.0, 0.6, 0.0), odds=9.0, odds_spread=1.0),
        rows("mean_difference", shares(1.0, 0.0, 0.9, 0.0), odds=15.0, odds_spread=1.0),
        rows("random_subspace", shares(0.0, 0.0, 0.1, 0.0), odds=0.1, odds_spread=1.0),
        rows("full_vector", shares(1.0, 0.2, 1.0, 0.4), odds=16.0, odds_spread=1.0),
        rows("probing", shares(1.0, 0.5, 1.0, 0.9), "probe_accuracy", selectivity=0.3),
    )


def said_of(summary: SweepSummary, capsys: pytest.CaptureFixture[str]) -> str:
    show_sweep(summary)
    return capsys.readouterr().out


def test_best_sites_flags_and_what_probes_read_stand_before_the_maps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    said = said_of(usual(tmp_path / "s"), capsys)
    order = ["best sites: IIA", "best sites: accuracy", "No fit is flagged", "read by probing beyond", "maps: IIA"]
    order += ["controls, highest of all layers: IIA", "in the report alone", "20 fits"]
    assert sorted(order, key=said.index) == order
    assert "read by probing beyond das and mean difference: 2@last +0.80" in said


def test_a_flag_is_told_with_its_reason_and_names_few_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = table(layers=6).assign(flag="control passes")
    told = said_of(summary_of(finished(tmp_path / "s", frame)), capsys)
    assert "control passes: das 0@name; das 0@verb;" in told and "; and 40 more" in told
    assert "so no learned direction is needed" in " ".join(told.split())
    assert "These controls were not run: random model" in told and "No fit is flagged" not in told


@pytest.mark.parametrize("width", [80, 120])
def test_maps_that_are_compared_stand_beside_each_other(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    said = said_of(usual(tmp_path / "s"), capsys)
    assert re.search(r"^ +das +probing +mean difference$", said, re.MULTILINE)
    assert re.search(r"^2 +0\.60  0\.00 +1\.00  0\.90 +0\.90  0\.00$", said, re.MULTILINE)
    assert re.search(r"^random subspace  0\.10  0\.00$", said, re.MULTILINE), "the highest of all layers"
    assert re.search(r"^full vector +1\.00  0\.40$", said, re.MULTILINE)


def test_odds_and_the_maps_of_controls_stand_in_the_report_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    summary = usual(tmp_path / "s")
    said = said_of(summary, capsys)
    assert "15.0" not in said and "16.0" not in said
    (where,) = [line for line in said.splitlines() if line.startswith("in the report alone")]
    assert f"{FIGURES[ODDS]} (4); selectivity (1); best sites by odds" in where and f"{FIGURES[IIA]} (2)" in where
    save_report([summary.folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    # The method, then its figure.
    maps = re.findall(r"<caption>([^<]+)<br><small>([^<]+)", page)
    names = ["das", "probing", "mean difference", "random subspace", "full vector", *["das"] * 2]
    assert [method for method, _ in maps[:5]] == names[:5] and len(maps) == len(summary.maps) + 2
    assert sum(figure.startswith("odds (nats)") for _, figure in maps) == 4
    assert "<td>15.00 (" in page, "the best sites by odds"


def test_the_report_says_conclusions_before_it_draws_maps(tmp_path: Path) -> None:
    save_report([usual(tmp_path / "s").folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    order = ['id="summary"', "No fit is flagged", "Read by probing beyond das", 'id="controls"', 'id="maps"']
    order += ['id="differences"', 'id="fits"']
    assert sorted(order, key=page.index) == order
    links = re.findall(r'<a href="#(\w+)">', page[page.index("<nav") : page.index("</nav>")])
    assert links == re.findall(r'<section id="([\w-]+)"', page)


def test_odds_are_a_conclusion_where_a_control_task_judges_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged: dict[str, Any] = {ODDS: 9.0, "odds_spread": 1.0, "control_task/odds": 2.0, "odds_selectivity": 7.0}
    said = said_of(swept(tmp_path / "s", rows("das", shares(0.8, 0.0, 0.6, 0.0), **judged)), capsys)
    assert said.index(f"best sites: {FIGURES[ODDS]}") < said.index("das: IIA") and "best sites by odds" not in said


def test_of_several_ranks_the_best_has_its_map_on_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summary_of(finished(tmp_path / "s", with_controls(table(ranks=(1, 2, 4)))))
    assert [each.method for each in summary.leading] == ["das, rank 2", "probing"]
    said = said_of(summary, capsys)
    assert {"das, rank 1", "das, rank 2", "das, rank 4"} <= set(re.findall(r"^das, rank \d", said, re.MULTILINE))


def test_the_whole_vector_alone_has_its_map_on_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [
        rows("full_vector", shares(1.0, 0.2, 1.0, 0.4)),
        rows("probing", shares(1.0, 0.5, 1.0, 0.9), "probe_accuracy"),
    ]
    summary = swept(tmp_path / "s", *both)
    assert [each.method for each in summary.leading] == ["full vector", "probing"]
    assert summary.beyond == [] and "controls, highest" not in said_of(summary, capsys)


def test_a_probe_that_reads_nothing_more_is_told_so(tmp_path: Path) -> None:
    fits = [
        rows("das", shares(1.0, 0.0, 1.0, 0.9)),
        rows("probing", shares(1.0, 0.5, 1.0, 0.95), "probe_accuracy"),
    ]
    assert swept(tmp_path / "s", *fits).beyond == ["read by probing beyond das: nowhere"]


def test_many_sites_and_methods_are_counted_and_those_without_intervals_left_out(tmp_path: Path) -> None:
    sites = {(layer, "name"): 1.0 for layer in range(9)}
    methods = ["a", "b", "c", "d"]
    nothing = [rows(name, dict.fromkeys(sites, 0.0)) for name in methods]
    (line,) = swept(tmp_path / "many", *nothing, rows("probing", sites, "probe_accuracy")).beyond
    assert line.startswith("read by probing beyond all 4 learned methods: 0@name +1.00") and "and 3 more" in line
    uncounted = [{**row, "examples": float("nan")} for row in rows("probing", sites, "probe_accuracy")]
    assert read_beyond(swept(tmp_path / "uncounted", nothing[0], uncounted).maps) == []


def test_a_flagged_probe_reads_nothing_beyond(tmp_path: Path) -> None:
    probes = rows("probing", shares(1.0, 0.9, 1.0, 0.9), "probe_accuracy")
    probes[1]["flag"] = "random model passes"
    summary = swept(tmp_path / "s", rows("das", shares(1.0, 0.0, 1.0, 0.0)), probes)
    assert summary.beyond == ["read by probing beyond das: 2@last +0.80"]


def test_a_group_of_columns_that_is_too_wide_continues_below_its_head(capsys: pytest.CaptureFixture[str]) -> None:
    heads = [("" if number else "das", f"head {number}") for number in range(12)]
    print_table(Console(width=50), Table(title="t", heads=heads, rows={"0": ["0.50"] * 12}, corner="layer"))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 50 and said.count("0.50") == 12
    assert said.count("das") == said.count("layer") > 1


def test_keys_that_a_run_writes_down_itself_are_not_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["sweep", "--help", "recipe=das_gender"]) == 0
    listed = re.findall(r"^  sweep\.(\w+)=", capsys.readouterr().out, re.MULTILINE)
    assert {"layers", "seeds"} <= set(listed) and not {"words", "named"} & set(listed)
    with monkeypatch.context() as patched:
        # As the builder of the site runs it.
        patched.syspath_prepend(str(HOME / "scripts" / "docs"))
        page = run_path(str(HOME / "scripts" / "docs" / "configuration_pages.py"))["pages"]()[SWEEP_PAGE]
    sys.modules.pop("words")
    assert "<code>layers</code>" in page and not re.search("<code>(words|named)<", page)
