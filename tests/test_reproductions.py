"""The rows of the table that can be run here hold: the shortest in every run of the suite, the others with -m slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from itrain.reproducing.rows import missing, read_rows
from itrain.reproducing.runs import Runs
from itrain.results.reproduction import Run

ROWS = {name: row for name, row in read_rows().items() if row.needs is None}
SHORTEST = ("detect_concept", "monitor_gender")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORTEST else pytest.mark.slow) for name in ROWS]
)
def test_a_row_keeps_to_its_bounds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = ROWS[name]
    if (needed := missing(row)) is not None:
        pytest.skip(f"needs {needed}")
    run = Runs(row, tmp_path / "out").run(row.seeds[0])
    assert isinstance(run, Run), run
    assert {
        figure: run.figures[figure] for figure, each in row.figures.items() if not each.holds(run.figures[figure])
    } == {}
