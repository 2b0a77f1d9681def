"""The page of a single run: it needs nothing but itself, says how to read what it shows, and trusts no file."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest

from itrain.cli import main
from itrain.reports.run_page import _site, headline, is_run
from itrain.results.parts import Bars
from tests.browser import CHROMIUM, Page

HOSTILE = "</pre><script>alert('a & b')</script>"
PROBE = {f"test/{name}/{HOSTILE}": 0.9 for name in ("probe_accuracy", "control_accuracy", "selectivity")}
SETTINGS = """
name: probe_gender
model: {_target_: itrain.models.load_embedded, dtype: float32}
task: {_target_: itrain.tasks.gender.Gender, templates: simple, verbs: null}
training: {_target_: itrain.training.probing.ProbeTraining, optimizer: {lr: 1}}
site: {layer: 2, component: block_output, position: name}
seed: 3
"""


def run_in(folder: Path, settings: str = SETTINGS, figures: str = json.dumps(PROBE)) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(settings)
    (folder / "metrics.json").write_text(figures)
    (folder / "metrics.csv").write_text("step,train/loss,validation/probe_accuracy\n0,1,\n1,,0.5\n")
    (folder / "generations.jsonl").write_text(json.dumps({"prompt": HOSTILE, "after": "he"}) + "\n")
    return folder


def test_the_page_of_a_run_holds_its_settings_tables_and_how_to_read_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_in(tmp_path / "run")
    assert is_run(folder) and main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    said = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page)))
    assert "model itrain/tiny-world task Gender (templates: simple)" in said and "seed 3" in said
    assert "training ProbeTraining site layer2.block_output@name" in said
    assert "How to read this Control: the same probe trained on random labels." in said
    assert f"itrain report {folder}" in said and "test again" not in said
    # Words of files stay words, and nothing is asked of any other place.
    assert "<script" not in page and said.count(HOSTILE) >= 3
    asked = set(re.findall(r'(?:src|href)="([^"]{0,14})', page))
    assert asked and all(each.startswith(("#", "data:image/png")) for each in asked)


def test_the_page_begins_with_what_was_found() -> None:
    two = {"pairwise": [0.99, 0.0, 0.981], "argmax": [0.9, 0.0, 0.8]}
    pairs = Bars(axis="IIA, 128 pairs\n95% intervals", names=["full vector", "random subspace", "trained"], series=two)
    assert headline(pairs) == "IIA, 128 pairs (argmax): trained 0.80, random subspace 0.00, full vector 0.90"
    assert headline(Bars(axis="accuracy", names=["a", "b"], series={"": [float("nan"), 0.5]})) == "accuracy: b 0.50"
    assert headline(Bars(axis="loss", names=["a"], series={"": [3.0]}, shares=False)) == "" == headline(None)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ("layer2.block_output@name", "layer2.block_output@name"),
        ({"layer": 2, "component": "value_output", "head": 3, "position": 1}, "layer2.value_output.head3@1"),
        ({"component": "module:top.output"}, "module:top.output"),
        (
            {"layer": 1, "component": "mlp_output", "position": "last", "read": "layer0.mlp_output@1"},
            "layer1.mlp_output@last (read: layer0.mlp_output@1)",
        ),
        ({"left": {"layer": 1, "component": "mlp_output", "position": "last"}}, "left: layer1.mlp_output@last"),
    ],
)
def test_a_site_is_told_with_its_head_its_module_and_its_variables(node: object, said: str) -> None:
    assert _site(node) == said


@pytest.mark.parametrize(
    ("settings", "figures", "message"),
    [
        (SETTINGS, "[1]", "holds no figures by name"),
        (SETTINGS, "{", "metrics.json' is damaged"),
        ("- 1", json.dumps(PROBE), "is not the configuration of a run"),
    ],
)
def test_a_damaged_run_is_told_in_a_line(
    settings: str, figures: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run_in(tmp_path / "run", settings, figures))]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1366, "light")])
def test_the_page_of_a_run_fits_any_width(width: int, scheme: str, tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    with Page(folder / "report.html", profile=tmp_path / "p", width=width, scheme=scheme) as page:
        assert page.errors == [] and page.run("document.documentElement.scrollWidth <= innerWidth")
        assert page.run("document.querySelector('img').naturalWidth > 500")
