"""The rule of an IIA stands beside the figure: pairwise and argmax differ where there are more than two answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from itrain.metrics.interchange import InterchangeAccuracy
from itrain.results.columns import FIGURES, IIA
from itrain.results.maps import maps_read
from itrain.results.vacuity import CHECKED, vacuity_lines
from tests.tables import finished, summary_of, table


@pytest.mark.parametrize("column", [column for column in FIGURES if "iia" in column])
def test_the_title_of_an_iia_has_its_rule(column: str) -> None:
    assert f"({column.rpartition('_')[2]})" in FIGURES[column]


def test_maps_of_an_iia_say_what_its_rule_counts(tmp_path: Path) -> None:
    summary = summary_of(finished(tmp_path / "sweep", table()))
    of_iia = [each for each in summary.maps if each.column == IIA]
    others = [each for each in summary.maps if each.column != IIA]
    assert of_iia and others
    assert "A third answer" in maps_read(of_iia) and "A third answer" not in maps_read(others)


def test_controls_of_a_map_name_the_rule_of_their_iia() -> None:
    found = {CHECKED: 1.0, "test/iia_argmax": 0.9, "test/pairs_changing": 50.0, "test/pairs_preserving": 50.0}
    assert "IIA (argmax) of this fit 0.900" in " ".join(vacuity_lines(found))


def test_a_third_answer_is_right_for_half_of_the_pairs_by_the_pairwise_rule_alone() -> None:
    """What the note of the maps says: answers that are moved to any place are pairwise right by chance."""
    torch.manual_seed(0)
    label, base = torch.zeros(2000, dtype=torch.long), torch.ones(2000, dtype=torch.long)
    logits = torch.randn(2000, 4)
    logits[:, 2] += 9
    found = {}
    for rule in ("argmax", "pairwise"):
        iia = InterchangeAccuracy(rule=rule)
        iia.update(logits, label, base, torch.ones(2000, dtype=torch.bool))
        found[rule] = float(iia.compute()["iia_changing"])
    assert found["argmax"] == 0 and abs(found["pairwise"] - 0.5) < 0.05
