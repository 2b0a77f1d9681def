"""The dashboard of sweeps in W&B: its definition needs no account, shows what is logged, and says what it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import wandb
from omegaconf import OmegaConf

from itrain.cli import main
from itrain.loggers.runs import figure_name
from itrain.reports.heat_maps import save_comparison, save_heat_maps
from itrain.results.columns import IIA
from tests.tables import finished, summary_of, table, with_controls

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces")


@pytest.fixture(autouse=True)
def package() -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra 'dashboards' is not installed")


def logged(folder: Path, **logger: Any) -> Path:
    """The folder of a sweep that was logged to W&B."""
    finished(folder, with_controls(table()).assign(majority_accuracy=0.5))
    configuration = OmegaConf.load(folder / "config.yaml")
    configuration.logger = {"_target_": "itrain.loggers.wandb.Wandb", "project": "mine", **logger}
    OmegaConf.save(configuration, folder / "config.yaml")
    return folder


def without_account() -> None:
    raise wandb.errors.UsageError("No API key configured.")


def panels_of(view: dict[str, Any]) -> list[dict[str, Any]]:
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel["config"] for section in sections for panel in section["panels"]]


def test_the_definition_is_written_without_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb, "login", without_account)
    folder, file = logged(tmp_path / "gender" / "a"), tmp_path / "view.json"
    assert main(["dashboard", str(folder), f"output={file}", "entity=team"]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    view = json.loads(file.read_text())
    assert (view["entity"], view["project"], view["displayName"]) == ("team", "mine", "gender a")
    assert main(["dashboard", str(folder)]) == 1
    told = capsys.readouterr()
    assert told.out == f"{folder / 'dashboard.json'}\n" and (folder / "dashboard.json").is_file()
    assert "run `wandb login`" in told.err and "`wandb sync" in told.err and told.err.count("\n") == 1


def test_the_dashboard_shows_what_is_logged(tmp_path: Path) -> None:
    """Maps of interventions, probes and their difference, controls, curves and tables, by the names of their files."""
    folder, file = logged(tmp_path / "gender" / "a"), tmp_path / "view.json"
    assert main(["dashboard", str(folder), f"output={file}"]) == 0
    panels = panels_of(json.loads(file.read_text()))
    shown = {key for panel in panels for key in panel.get("mediaKeys") or []}
    summary = summary_of(folder)
    assert shown == {*save_heat_maps(summary), *save_comparison(summary, tmp_path), "report"}
    plotted = {key for panel in panels for key in panel.get("metrics") or []}
    compared = {"test/above_chance", figure_name(IIA), f"random_model/{IIA}"}
    assert plotted == {*compared, "validation/loss", f"validation/{IIA}"}


def test_several_sweeps_share_a_dashboard(tmp_path: Path) -> None:
    folders = [logged(tmp_path / "gender" / "a"), logged(tmp_path / "ranks" / "b", group="ours")]
    file = tmp_path / "view.json"
    assert main(["dashboard", *map(str, folders), f"output={file}"]) == 0
    text = file.read_text()
    assert json.loads(text)["displayName"] == "gender a and ours"
    assert '"gender a"' in text and '"ours"' in text


def test_a_saved_dashboard_is_told_by_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wandb_workspaces.workspaces import Workspace

    class Saved:
        url = "https://example.org/view"

    monkeypatch.setattr(wandb, "login", lambda: True)
    monkeypatch.setattr(Workspace, "save", lambda workspace: Saved())
    assert main(["dashboard", str(logged(tmp_path / "gender" / "a", entity="team"))]) == 0
    assert capsys.readouterr().out.splitlines()[1] == Saved.url


def test_what_a_dashboard_cannot_show_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = logged(tmp_path / "gender" / "a"), logged(tmp_path / "gender" / "b", project="another")
    silent = finished(tmp_path / "silent", table())
    for words, message in {
        (): "takes the folders of finished sweeps",
        (str(tmp_path),): "not the folder of a finished sweep",
        (str(silent),): f"was not logged to W&B; to log its fits now: itrain sweep resume={silent} logger=wandb",
        (str(good), str(other)): "shows one project; these sweeps were logged to another and mine",
        (str(good), "entity=a", "entity=b"): "at most one each of entity, project, output",
    }.items():
        assert main(["dashboard", *words]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
    monkeypatch.setattr("itrain.loggers.dashboard.find_spec", lambda name: None)
    assert main(["dashboard", str(good)]) == 1
    assert capsys.readouterr().err.endswith("pip install wandb-workspaces\n")


def test_a_typo_in_a_panel_is_an_error() -> None:
    from wandb_workspaces.reports.v2 import LinePlot

    with pytest.raises(ValueError, match="titel"):
        LinePlot(titel="a typo")  # type: ignore[call-arg]
