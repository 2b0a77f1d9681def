"""A dashboard of sweeps in W&B, as code: maps of interventions and probes, their difference, controls and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wandb
from wandb.errors import Error, UsageError

from itrain.files import write_text
from itrain.loggers.base import PICTURES, name_of
from itrain.loggers.runs import ABOVE_CHANCE, RESULTS, figure_name
from itrain.loggers.wandb import REPORT
from itrain.results.best import BEST
from itrain.results.columns import (
    CONTROL_ACCURACY,
    EPOCH,
    FIGURES,
    IIA,
    METHOD,
    PROBE_ACCURACY,
    RANDOM_MODEL,
    RANK,
    VALIDATION,
)
from itrain.results.table import read_configuration

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

PACKAGE = "wandb_workspaces"
DEFINITION = "dashboard.json"
"""The file with the view's definition."""
PROJECT = "itrain"
"""The project of runs whose configuration names none."""
MAPS = ("iia_maps", "probe_maps", "difference_maps")
"""The pictures that are compared, as they are logged."""


class DashboardError(RuntimeError):
    """A dashboard cannot be made or saved on this machine; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """What a dashboard shows: the groups of runs of these sweeps, which lie in one project."""

    groups: Sequence[str]
    project: str
    entity: str | None

    def workspace(self) -> Workspace:
        """The dashboard as W&B's own package has it."""
        from wandb_workspaces.workspaces import Metric, RunsetSettings, Workspace

        columns = [f"config:{name}.value" for name in (METHOD, "layer", "position", RANK, "seed")]
        return Workspace(
            entity=self.entity or "",
            project=self.project,
            name=" and ".join(self.groups),
            runset_settings=RunsetSettings(
                filters=[Metric("Group").isin(list(self.groups))], pinned_columns=["run:displayName", *columns]
            ),
            sections=[_maps(), _controls(), _curves(), _tables()],
        )

    def definition(self) -> str:
        """The dashboard as it is sent to W&B, in JSON."""
        return self.workspace()._to_model().model_dump_json(by_alias=True, indent=2)


def dashboard_of(folders: Sequence[Path], *, entity: str | None = None, project: str | None = None) -> Dashboard:
    """The dashboard of finished sweeps that were logged to W&B.

    Args:
        folders: of the sweeps.
        entity: the user or team that the project belongs to; that of the sweeps, or of the account, unless given.
        project: that of the sweeps unless given.

    Raises:
        FileNotFoundError: a folder holds no finished sweep.
        ValueError: a sweep was not logged to W&B, or two lie in different projects.
        DashboardError: the package that dashboards are made with is not installed.
    """
    if find_spec(PACKAGE) is None:
        raise DashboardError("a dashboard needs a package that is not installed: pip install wandb-workspaces")
    groups, projects, entities = [], set[str](), set[str]()
    for folder in folders:
        logger: Mapping[str, Any] = read_configuration(folder).get("logger") or {}
        if not str(logger.get("_target_", "")).endswith(".Wandb") and not (folder / "wandb").is_dir():
            raise ValueError(
                f"'{folder}' was not logged to W&B; to log its fits now: itrain sweep resume={folder} logger=wandb"
            )
        groups.append(str(logger.get("group") or name_of(folder)))
        projects.add(project or str(logger.get("project") or PROJECT))
        entities.update([str(logger["entity"])] if logger.get("entity") else [])
    if len(projects) > 1 or (len(entities) > 1 and entity is None):
        several = sorted(projects if len(projects) > 1 else entities)
        raise ValueError(f"a dashboard shows one project; these sweeps were logged to {' and '.join(several)}")
    return Dashboard(groups=groups, project=projects.pop(), entity=entity or next(iter(entities), None))


def write_dashboard(dashboard: Dashboard, path: Path) -> None:
    """Write the definition of the view, without an account or a network."""
    write_text(path, dashboard.definition() + "\n")


def save_dashboard(dashboard: Dashboard) -> str:
    """Save the dashboard to W&B and return its address.

    Raises:
        DashboardError: there is no account on this machine, or W&B cannot be reached or refuses the view.
    """
    try:
        wandb.login()
        view = dashboard.workspace()
        if dashboard.entity is None:
            view.entity = str(wandb.Api().default_entity)
        return view.save().url
    except UsageError as error:
        raise DashboardError(
            "the definition is written, and not saved to W&B: there is no W&B account on this machine; run `wandb "
            "login`, upload offline runs with `wandb sync <folder>/wandb/offline-run-*`, and repeat the command"
        ) from error
    except (Error, OSError, ValueError) as error:
        raise DashboardError(f"the definition is written, and not saved to W&B: {error}") from error


def _section(name: str, panels: Sequence[Any], *, columns: int) -> Section:
    from wandb_workspaces.workspaces import Section, SectionLayoutSettings

    rows = -(-len(panels) // columns)
    layout = SectionLayoutSettings(columns=columns, rows=rows)
    return Section(name=name, is_open=True, layout_settings=layout, panels=list(panels))


def _maps() -> Section:
    from wandb_workspaces.reports.v2 import MediaBrowser

    panels = [MediaBrowser(title=PICTURES[key], media_keys=[key], num_columns=1) for key in MAPS]
    return _section("Where it is used and where it can be read", panels, columns=1)


def _controls() -> Section:
    from wandb_workspaces.reports.v2 import BarPlot, Config, MediaBrowser, ScatterPlot

    iia, random = figure_name(IIA), figure_name(RANDOM_MODEL + IIA)
    panels = [
        *(
            BarPlot(
                title=f"{title}: mean and range over sites and seeds",
                metrics=[figure],
                groupby=Config(METHOD),
                groupby_aggfunc="mean",
                groupby_rangefunc="minmax",
                range_x=(0, 1),
            )
            for figure, title in (
                (ABOVE_CHANCE, "Interventions and probes, from 0 at chance to 1"),
                (iia, FIGURES[IIA]),
                (random, f"random model, {FIGURES[IIA]}"),
            )
        ),
        ScatterPlot(
            title="Probes against their control tasks", x=figure_name(CONTROL_ACCURACY), y=figure_name(PROBE_ACCURACY)
        ),
        MediaBrowser(title=PICTURES["heat_maps"], media_keys=["heat_maps"], num_columns=1),
    ]
    return _section("Controls", panels, columns=2)


def _curves() -> Section:
    from wandb_workspaces.reports.v2 import Config, LinePlot, ScatterPlot

    panels = [
        *(
            LinePlot(
                title=f"{title}, validation: mean and range over sites and seeds",
                x=EPOCH,
                y=[f"{VALIDATION}{figure}"],
                groupby=Config(METHOD),
                groupby_aggfunc="mean",
                groupby_rangefunc="minmax",
            )
            for figure, title in (("loss", "Loss"), (IIA, FIGURES[IIA]))
        ),
        ScatterPlot(title=f"{FIGURES[IIA]}, over rank", x=Config(RANK), y=figure_name(IIA)),
    ]
    return _section("Curves", panels, columns=3)


def _tables() -> Section:
    from wandb_workspaces.reports.v2 import MediaBrowser, WeavePanelSummaryTable

    panels = [
        WeavePanelSummaryTable(table_name=BEST),
        WeavePanelSummaryTable(table_name=RESULTS),
        MediaBrowser(title="Report", media_keys=[REPORT], num_columns=1),
    ]
    return _section("Best sites, all fits and the report", panels, columns=1)
