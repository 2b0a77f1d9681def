"""The report of a sweep, or of several beside each other: one HTML file that opens from disk and needs nothing else."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FileSystemLoader

from itrain.models import TINY_WORLD
from itrain.reports.best import GAP, TWIN, Row, beside, best_of, by_figure
from itrain.reports.curves import Plot, boundaries, over_rank, over_training, read_curves
from itrain.reports.pictures import (
    CEILING,
    CONTROL,
    FIGURES,
    FIRST,
    PLACE,
    RANDOM_MODEL,
    HeatMap,
    colour_of,
    maps_of,
    settings_apart,
    spoken,
    written,
)
from itrain.reports.tokens import read_tokens

if TYPE_CHECKING:
    import pandas

RESULTS, CONFIGURATION, REPORT = "results.parquet", "config.yaml", "report.html"
REASONS = {
    "random model passes": "the same fit on a randomly initialised model does much the same, so it says nothing of "
    "what this model has learned",
    "control passes": "a random subspace of equal rank changes the label too, so nothing that was learned is needed",
    "above the whole vector": "the fit does far more than swapping the whole vector, so it may use directions that "
    "the model itself does not (Makelov et al. 2023)",
}
"""Why a fit has a flag."""
SECTIONS = {
    "rank": (
        "Over rank",
        f"{FIGURES[FIRST]}, at each position in the layer where the learned methods do best, with 95% intervals.",
    ),
    "layer": (
        "Boundaries",
        "How many dimensions each gate or boundary has come to swap, over layers; of several seeds the mean, with its "
        "95% interval.",
    ),
    "epoch": (
        "Over training",
        f"{FIGURES[FIRST]}, of the validation after each epoch: a line for each fit, of which the one that ends "
        "highest is named.",
    ),
}
"""Title and note of the curves over each axis."""
PACKAGES = ("itrain", "torch", "lightning", "transformers")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What the page says of one sweep."""

    label: str
    folder: Path
    configuration: str
    asked: Mapping[str, str]
    example: str
    best: Sequence[Row]
    flags: Mapping[str, Sequence[tuple[int, str]]]
    absent: Sequence[str]
    maps: Mapping[tuple[str, str], HeatMap]
    plots: Mapping[str, Sequence[Plot]]
    """By the axis that they go over."""


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
    columns = [column for column in dict.fromkeys(column for row in rows for column in row) if _is_shown(column)]
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.jinja")
    text = page.render(
        sweeps=sweeps,
        names=list(dict.fromkeys(name for sweep in sweeps for name in sweep.maps)),
        axes=[axis for axis in SECTIONS if any(sweep.plots[axis] for sweep in sweeps)],
        sections=SECTIONS,
        columns=[*(["sweep"] if len(sweeps) > 1 else []), *columns, "command"],
        rows=[{column: written(value) for column, value in row.items()} for row in rows],
        scale=[colour_of(share / 20)[0] for share in range(21)],
        by_figure=by_figure,
        beside=beside,
        random=any(TWIN in row for sweep in sweeps for row in sweep.best),
        gap=any(GAP in row for sweep in sweeps for row in sweep.best),
        spoken=spoken,
        reasons=REASONS,
        versions=_versions(),
        command=shlex.join(["python", "-m", "itrain", "report", *map(str, folders)]),
    )
    path.write_text(text, encoding="utf-8")


def _is_shown(column: str) -> bool:
    """Whether it stands among the others in the table of all fits; of the random model only what has heat maps does."""
    is_spared = column.startswith(RANDOM_MODEL) and column.removeprefix(RANDOM_MODEL) not in FIGURES
    return column not in ("sweep", "command") and not is_spared


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
        raise ValueError(
            f"'{folder / RESULTS}' is no table of a sweep as this version writes it: it has no column '{missing[0]}'"
        )
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
    example, curves = read_tokens(folder), read_curves(folder)
    maps = {(each.method, each.figure): each for each in maps_of(frame, apart, example.tokens)}
    several = frame.seed.nunique() > 1
    flags: dict[str, list[tuple[int, str]]] = {}
    for number, row in frame.loc[frame.flag != ""].iterrows():
        named = [f"{key} {written(row[key])}" for key in (*apart[row.method], "seed") if key != "seed" or several]
        name = ", ".join([f"{spoken(row.method)} {row.layer}@{row.position}", *named])
        flags.setdefault(row.flag, []).append((int(str(number)), name))
    return Sweep(
        label=label,
        folder=folder,
        configuration=(folder / CONFIGURATION).read_text(encoding="utf-8"),
        asked=_asked(frame, _configuration(folder)),
        example=example.text,
        best=list(best_of(frame, apart)),
        absent=_absent(frame),
        flags=flags,
        maps=maps,
        plots={
            "rank": list(over_rank(frame, apart, example.tokens)),
            "layer": list(boundaries(frame, apart, example.tokens)),
            "epoch": list(over_training(curves, frame, apart)),
        },
    )


def _absent(frame: pandas.DataFrame) -> list[str]:
    """The controls that a sweep has done without."""
    absent = [spoken(control) for control in (CONTROL, CEILING) if control not in set(frame.method)]
    return absent + ([] if any(name.startswith(RANDOM_MODEL) for name in frame) else [TWIN])


# --- what was asked


def _asked(frame: pandas.DataFrame, configuration: Mapping[str, Any]) -> dict[str, str]:
    grid = configuration.get("sweep") or {}
    sites = frame[PLACE].drop_duplicates()
    ranks = sorted(frame["rank"].dropna().unique()) if "rank" in frame else []
    asked = {
        "model": _model(configuration.get("model")),
        "task": _brief(configuration.get("task")),
        "methods": ", ".join(map(spoken, dict.fromkeys(frame.method))),
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


def _model(node: Mapping[str, Any] | None) -> str:
    """The name that a model is found under; of one's own module, its constructor's."""
    if node and str(node.get("_target_")).endswith(".load_embedded"):
        return TINY_WORLD
    if node and node.get("name"):
        return f"{node['name']} at {node['revision']}" if node.get("revision") else str(node["name"])
    return _brief(node)


def _brief(node: Mapping[str, Any] | None) -> str:
    if not node:
        return ""
    given = ", ".join(f"{key}: {value}" for key, value in node.items() if not key.startswith("_"))
    name = str(node.get("_target_", "")).rpartition(".")[2]
    return f"{name} ({given})" if given else name


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
