"""Draws the picture of the home page, for light and for dark pages, from a finished sweep.

itrain sweep recipe=das_vs_probe_gender sweep.methods=[das,probing] sweep.random_model=false
python scripts/docs/home_picture.py outputs/das_vs_probe_gender/<time>
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

from itrain.reports.figures import save_figure
from itrain.reports.heat_maps import IIA_MAPS, PROBE_MAPS, draw
from itrain.results.columns import IIA, PROBE_ACCURACY
from itrain.results.summary import summarise

ASSETS = Path(__file__).parents[2] / "docs" / "assets"
INKS = {"light": "#1a1c1e", "dark": "#e6e8ea"}
"""The colours of text: those of itrain/reports/report.css."""
SHOWN = {IIA: IIA_MAPS, PROBE_ACCURACY: PROBE_MAPS}


def main(folder: Path) -> None:
    """Write docs/assets/home-light.svg and home-dark.svg."""
    (summary,) = summarise([folder])
    maps = [each for each in summary.maps if each.column in SHOWN and not each.is_control]
    for name, ink in INKS.items():
        colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
        with mpl.rc_context({**colours, "savefig.transparent": True, "figure.facecolor": "none"}):
            save_figure(draw(maps), ASSETS / f"home-{name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
