"""A dashboard of a sweep in W&B: heat maps of IIA and probes and their difference, controls, curves, and the table.

    python scripts/wandb_workspace.py outputs/das_vs_probe_gender/<time> --entity <user or team>

The sweep was run with ``logger=wandb``; runs that were logged offline are uploaded first, with ``wandb sync``. Needs
``pip install wandb-workspaces`` and, to save it, a W&B account.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wandb.errors import UsageError

from itrain.loggers.base import name_of
from itrain.loggers.wandb import RESULTS
from itrain.reports.heat_maps import DIFFERENCE_MAPS, HEAT_MAPS, IIA_MAPS, PROBE_MAPS
from itrain.results.columns import CONTROL_ACCURACY, EPOCH, FIGURES, IIA, METHOD, PROBE_ACCURACY, RANK, VALIDATION

try:
    from wandb_workspaces.reports.v2 import BarPlot, Config, LinePlot, MediaBrowser, ScatterPlot, WeavePanelSummaryTable
    from wandb_workspaces.workspaces import Metric, RunsetSettings, Section, SectionLayoutSettings, Workspace
except ImportError:
    sys.exit("a dashboard needs a package that is not installed: pip install wandb-workspaces")


def workspace(group: str, *, entity: str, project: str) -> Workspace:
    """The dashboard of the runs of a group."""
    method, wide = Config(METHOD), SectionLayoutSettings(columns=1, rows=1)
    maps = {
        IIA_MAPS: "IIA of learned interventions",
        PROBE_MAPS: "accuracy of probes",
        DIFFERENCE_MAPS: "what probes read beyond what interventions change",
    }
    return Workspace(
        entity=entity,
        project=project,
        name=group,
        runset_settings=RunsetSettings(filters=[Metric("Group") == group]),
        sections=[
            Section(
                name="Where it is used and where it can be read",
                is_open=True,
                layout_settings=SectionLayoutSettings(columns=1, rows=3),
                panels=[MediaBrowser(title=title, media_keys=[key], num_columns=1) for key, title in maps.items()],
            ),
            Section(
                name="Controls",
                is_open=True,
                layout_settings=SectionLayoutSettings(columns=2, rows=2),
                panels=[
                    BarPlot(
                        title=f"{FIGURES[IIA]}: mean and range over sites",
                        metrics=[IIA],
                        groupby=method,
                        groupby_aggfunc="mean",
                        groupby_rangefunc="minmax",
                        range_x=(0, 1),
                    ),
                    ScatterPlot(title="probes and their control tasks", x=CONTROL_ACCURACY, y=PROBE_ACCURACY),
                    MediaBrowser(title="all methods and controls", media_keys=[HEAT_MAPS], num_columns=1),
                ],
            ),
            Section(
                name="Curves",
                is_open=True,
                layout_settings=SectionLayoutSettings(columns=3, rows=1),
                panels=[
                    *(
                        LinePlot(
                            title=f"{title}, mean and range over sites",
                            x=EPOCH,
                            y=[f"{VALIDATION}{figure}"],
                            groupby=method,
                            groupby_aggfunc="mean",
                            groupby_rangefunc="minmax",
                        )
                        for figure, title in (("loss", "validation loss"), (IIA, FIGURES[IIA]))
                    ),
                    ScatterPlot(title=f"{FIGURES[IIA]}, over rank", x=Config(RANK), y=IIA),
                ],
            ),
            Section(name="All fits", layout_settings=wide, panels=[WeavePanelSummaryTable(table_name=RESULTS)]),
        ],
    )


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="of the sweep")
    parser.add_argument("--entity", required=True, help="the user or team that the project belongs to")
    parser.add_argument("--project", default="itrain")
    asked = parser.parse_args()
    dashboard = workspace(name_of(asked.folder), entity=asked.entity, project=asked.project)
    try:
        print(dashboard.save().url)
    except UsageError:
        sys.exit("the dashboard is valid, but not saved: there is no W&B account here; run `wandb login` first")


if __name__ == "__main__":
    main()
