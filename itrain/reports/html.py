"""The report of a sweep, or of several beside each other: one HTML file that opens from disk and needs nothing else."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FileSystemLoader

from itrain.reports.pictures import (
    CEILING,
    CONTROL,
    FIRST,
    PLACE,
    Estimate,
    HeatMap,
    Plot,
    colour_of,
    estimated,
    maps_of,
    methods_of,
    plots_of,
    settings_apart,
    written,
)
from itrain.reports.sweeps import FIGURES

if TYPE_CHECKING:
    import pandas

RESULTS, CONFIGURATION, REPORT = "results.parquet", "config.yaml", "report.html"
REASONS = {
    "control passes": "a random subspace of equal rank changes the label too, so nothing that was learned is needed",
    "above the whole vector": "the fit does far more than swapping the whole vector, so it may use directions that "
    "the model itself does not (Makelov et al. 2023)",
}
"""Why a fit has a flag."""
PACKAGES = ("itrain", "torch", "lightning", "transformers")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What the page says of one sweep."""

    label: str
    folder: Path
    configuration: str
    asked: Mapping[str, str]
    best: Sequence[Mapping[str, str]]
    flags: Mapping[str, Sequence[tuple[int, str]]]
    absent: Sequence[str]
    maps: Mapping[tuple[str, str], HeatMap]
    plots: Sequence[Plot]

    @property
    def heads(self) -> list[str]:
        """The columns that the rows of ``best`` have between them."""
        return list(dict.fromkeys(head for row in self.best for head in row))


def save_report(folders: Sequence[Path], path: Path) -> None:
    """Write the page of finished sweeps, read from ``results.parquet`` and ``config.yaml`` of each folder.

    Raises:
        FileNotFoundError: a folder holds no finished sweep.
        ValueError: the table in a folder is not that of a sweep.
    """
    sweeps, rows = [], []
    labels = _labels(folders)
    frames = [_read(folder) for folder in folders]
    apart = settings_apart(frames)
    for folder, label, frame in zip(folders, labels, frames, strict=True):
        # Numbered through, so that a cell can name its rows in the one table of all fits.
        frame.index = range(len(rows), len(rows) + len(frame))
        sweeps.append(_sweep(label, folder, frame, apart))
        rows += [{"sweep": label} | row for row in frame.to_dict("records")]
    columns = list(dict.fromkeys(column for row in rows for column in row if column not in ("sweep", "command")))
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.jinja")
    text = page.render(
        sweeps=sweeps,
        names=list(dict.fromkeys(name for sweep in sweeps for name in sweep.maps)),
        plots=any(sweep.plots for sweep in sweeps),
        columns=[*(["sweep"] if len(sweeps) > 1 else []), *columns, "command"],
        rows=[{column: written(value) for column, value in row.items()} for row in rows],
        scale=[colour_of(share / 20)[0] for share in range(21)],
        figure=FIGURES[FIRST],
        reasons=REASONS,
        versions=_versions(),
        command=shlex.join(["python", "-m", "itrain", "report", *map(str, folders)]),
    )
    path.write_text(text, encoding="utf-8")


def _configuration(folder: Path) -> dict[str, Any]:
    missing = next((name for name in (RESULTS, CONFIGURATION) if not (folder / name).is_file()), None)
    if missing:
        raise FileNotFoundError(f"'{folder}' is not the folder of a finished sweep: there is no {missing} in it")
    return yaml.safe_load((folder / CONFIGURATION).read_text(encoding="utf-8"))


def _read(folder: Path) -> pandas.DataFrame:
    import pandas

    try:
        frame = pandas.read_parquet(folder / RESULTS)
    except ValueError as error:
        raise ValueError(f"'{folder / RESULTS}' cannot be read: {error}") from error
    if missing := [name for name in ("method", *PLACE, "seed", "command", "flag") if name not in frame]:
        raise ValueError(f"'{folder / RESULTS}' is no table of a sweep: it has no column '{missing[0]}'")
    return frame


def _labels(folders: Sequence[Path]) -> list[str]:
    """What the sweeps are called: by name, and by folder too where names meet."""
    names = [_configuration(folder).get("name", folder.resolve().name) for folder in folders]
    labels = [
        name if names.count(name) == 1 else f"{name} {folder.resolve().name}"
        for name, folder in zip(names, folders, strict=True)
    ]
    if doubled := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"the sweep '{doubled[0]}' is named twice")
    return labels


def _sweep(label: str, folder: Path, frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]]) -> Sweep:
    maps = {(heat_map.method, heat_map.figure): heat_map for heat_map in maps_of(frame, apart)}
    several = frame.seed.nunique() > 1
    flags: dict[str, list[tuple[int, str]]] = {}
    for number, row in frame.loc[frame.flag != ""].iterrows():
        named = [f"{key} {written(row[key])}" for key in (*apart[row.method], "seed") if key != "seed" or several]
        name = ", ".join([f"{row.method.replace('_', ' ')} {row.layer}@{row.position}", *named])
        flags.setdefault(row.flag, []).append((int(str(number)), name))
    return Sweep(
        label=label,
        folder=folder,
        configuration=(folder / CONFIGURATION).read_text(encoding="utf-8"),
        asked=_asked(frame, _configuration(folder)),
        best=list(_best(frame, apart)),
        absent=[control.replace("_", " ") for control in (CONTROL, CEILING) if control not in set(frame.method)],
        flags=flags,
        maps=maps,
        plots=list(plots_of(frame)),
    )


# --- what was asked and found


def _asked(frame: pandas.DataFrame, configuration: Mapping[str, Any]) -> dict[str, str]:
    grid = configuration.get("sweep") or {}
    sites = frame[PLACE].drop_duplicates()
    ranks = sorted(frame["rank"].dropna().unique()) if "rank" in frame else []
    asked = {
        "model": _brief(configuration.get("model")),
        "task": _brief(configuration.get("task")),
        "methods": ", ".join(method.replace("_", " ") for method in dict.fromkeys(frame.method)),
        "sites": f"{len(sites)}: {frame.layer.nunique()} layers x {frame.position.nunique()} positions",
        "ranks": ", ".join(f"{rank:g}" for rank in ranks),
        "seeds": ", ".join(map(str, sorted(frame.seed.unique()))),
        "fits": str(len(frame)),
    }
    if {"pairs_changing", "pairs_preserving"} <= set(frame):
        changing, preserving = frame.pairs_changing.mean(), frame.pairs_preserving.mean()
        share = changing / (changing + preserving)
        asked["test pairs"] = f"{changing + preserving:.0f}, of which {changing:.0f} ({share:.0%}) change the label"
    if "seconds" in frame:
        asked["time"] = f"{frame.seconds.sum():.0f} s of fitting"
    if words := grid.get("words"):
        asked["command"] = " ".join(["python -m itrain sweep", *map(str, words)])
    return {name: value for name, value in asked.items() if value}


def _brief(node: Mapping[str, Any] | None) -> str:
    if not node:
        return ""
    given = ", ".join(f"{key}: {value}" for key, value in node.items() if not key.startswith("_"))
    name = str(node.get("_target_", "")).rpartition(".")[2]
    return f"{name} ({given})" if given else name


def _best(frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """A row for each method: its best site, the figure there, and the controls of the same site and rank."""
    for method, part in methods_of(frame, apart):
        figure = next((figure for figure in FIGURES if figure in part and part[figure].notna().any()), None)
        if figure is None:
            continue
        means: Any = part.groupby(PLACE, sort=False)[figure].mean()
        layer, position = means.idxmax()
        others = int((means == means.max()).sum()) - 1
        here: Any = part[(part.layer == layer) & (part.position == position)]
        row = {
            "method": method,
            "best site": f"layer {layer}, {position}" + (f" and {others} more" if others else ""),
            "figure": FIGURES[figure],
            "value": str(estimated(here, figure)),
        }
        if figure == FIRST:
            beside = {control: _control(frame, here, control) for control in (CONTROL, CEILING)}
            beside.pop(here.method.iloc[0], None)
            row |= {control.replace("_", " "): str(found) for control, found in beside.items() if found}
        references = {"control_accuracy": "control task", "majority_accuracy": "most frequent class"}
        # The runs that tracing stands between.
        references |= {f"{run}/{figure}": f"{run} run" for run in ("corrupted", "clean")}
        for key, name in references.items():
            if key in here and here[key].notna().any():
                row[name] = f"{here[key].mean():.2f}"
        yield row


def _control(frame: pandas.DataFrame, here: pandas.DataFrame, control: str) -> Estimate | None:
    keys = [key for key in ("layer", "position", "component") if key in frame]
    there: Any = frame[(frame.method == control) & (frame[keys] == here[keys].iloc[0]).all(axis=1)]
    if control == CONTROL and "rank" in frame:
        there = there[there["rank"] == here["rank"].iloc[0]]
    return estimated(there, FIRST) if len(there) else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
