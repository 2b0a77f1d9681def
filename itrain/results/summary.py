"""The summary of a sweep: all that its pages, pictures and loggers draw, worked out once from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itrain.models import TINY_WORLD
from itrain.results.best import DIRECTIONS, TWIN, Best, best_odds, best_of
from itrain.results.columns import (
    AUROC,
    CONTROL_AUROC,
    CONTROLS,
    FLAG,
    IIA,
    LAYER,
    MAJORITY_LABEL,
    METHOD,
    PAIRS_CHANGING,
    PAIRS_PRESERVING,
    PLACE,
    POSITION,
    RANDOM_DIRECTION,
    RANDOM_MODEL,
    RANK,
    SECONDS,
    SEED,
    named_site,
    names_module,
    spoken,
)
from itrain.results.conclusions import in_reading_order, leading, read_beyond
from itrain.results.controls import without_void
from itrain.results.curves import Plot, boundaries, over_rank, over_training
from itrain.results.heads import by_head
from itrain.results.maps import HeatMap, differences, maps_of, setting, settings_apart
from itrain.results.table import CONFIGURATION, read_checked, read_configuration, read_curves
from itrain.results.tokens import Example, read_tokens

if TYPE_CHECKING:
    import pandas

OF_DETECTORS: Mapping[str, str] = {RANDOM_DIRECTION + AUROC: DIRECTIONS, CONTROL_AUROC: "control task"}
"""The columns of the controls of detectors, and how they are spoken of."""


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """What a sweep found."""

    label: str
    """Its name, with its folder's where several sweeps have the same name."""
    folder: Path
    frame: pandas.DataFrame
    """Its table; the index numbers the fits through all sweeps of a page."""
    configuration: str
    settings: Mapping[str, str]
    example: Example
    maps: Sequence[HeatMap]
    """Those that are read first first."""
    leading: Sequence[HeatMap]
    """Of the maps, those that conclusions rest on."""
    differences: Sequence[HeatMap]
    """How far probes lie above learned interventions, both above chance."""
    beyond: Sequence[str]
    """What probes read beyond learned interventions, in lines."""
    best: Sequence[Best]
    odds: Sequence[Best]
    """The methods at the sites of their highest odds."""
    flags: Mapping[str, Sequence[tuple[int, str]]]
    """The fits that have each flag, by number and name."""
    absent: Sequence[str]
    """The controls that the sweep has not run."""
    plots: Mapping[str, Sequence[Plot]]
    """By their axis: ``rank``, ``layer``, ``epoch``."""

    @property
    def remark(self) -> str:
        """Whether nothing is flagged, and which controls were not run."""
        absent = f"controls were not run: {', '.join(self.absent)}" if self.absent else ""
        if self.flags:
            return f"These {absent}" if absent else ""
        if absent:
            return f"No fit is flagged, but these {absent}"
        return "No fit is flagged: no control reaches its threshold"


def summarise(folders: Sequence[Path]) -> list[SweepSummary]:
    """The summaries of finished sweeps, in which a method has the same name everywhere.

    Raises:
        FileNotFoundError: a folder holds no finished sweep.
        ValueError: the table in a folder is not that of a sweep, or a sweep is named twice.
    """
    labels = _labels(folders)
    frames = [read_checked(folder) for folder in folders]
    apart = settings_apart([by_head(frame) for frame in frames])
    found, number = [], 0
    for label, folder, frame in zip(labels, folders, frames, strict=True):
        # Numbered through, so that a cell can name its rows in one table of all fits.
        frame.index = range(number, number + len(frame))
        number += len(frame)
        found.append(_summary(label, folder, frame, apart))
    return found


def _summary(label: str, folder: Path, frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]]) -> SweepSummary:
    example = read_tokens(folder)
    view = by_head(frame)
    maps = in_reading_order(list(maps_of(without_void(view), apart, example.tokens)))
    best = list(best_of(view, apart))
    return SweepSummary(
        label=label,
        folder=folder,
        frame=frame,
        configuration=(folder / CONFIGURATION).read_text(encoding="utf-8"),
        settings=_settings(view, read_configuration(folder)),
        example=example,
        maps=maps,
        leading=leading(maps, {row.method: row.value.value for row in best}),
        differences=differences(maps),
        beyond=read_beyond(maps),
        best=best,
        odds=list(best_odds(view, apart)),
        flags=_flags(frame, apart),
        absent=_absent(frame),
        plots={
            "rank": list(over_rank(view, apart, example.tokens)),
            "layer": list(boundaries(view, apart, example.tokens)),
            "epoch": list(over_training(by_head(read_curves(folder)), view, apart)),
        },
    )


def _labels(folders: Sequence[Path]) -> list[str]:
    """The names of the sweeps, with their folders' names where two have the same."""
    names = [read_configuration(folder).get("name", folder.resolve().name) for folder in folders]
    labels = [
        name if names.count(name) == 1 else f"{name} {folder.resolve().name}"
        for name, folder in zip(names, folders, strict=True)
    ]
    if doubled := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"the sweep '{doubled[0]}' is named twice; leave one of them out")
    return labels


def _flags(frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]]) -> dict[str, list[tuple[int, str]]]:
    several = frame[SEED].nunique() > 1
    flags: dict[str, list[tuple[int, str]]] = {}
    for number, row in frame.loc[frame[FLAG] != ""].iterrows():
        named = [setting(key, row[key]) for key in apart[row[METHOD]] if key in row]
        named += [f"seed {row[SEED]}"] if several else []
        name = ", ".join([f"{spoken(row[METHOD])} {named_site(row[LAYER], row[POSITION])}", *named])
        flags.setdefault(row[FLAG], []).append((int(str(number)), name))
    return flags


def _absent(frame: pandas.DataFrame) -> list[str]:
    if AUROC in frame:  # Detectors edit nothing, and have controls of their own.
        absent = [name for column, name in OF_DETECTORS.items() if column not in frame]
    else:
        absent = [spoken(control) for control in CONTROLS if control not in set(frame[METHOD])]
    return absent + ([] if any(name.startswith(RANDOM_MODEL) for name in frame) else [TWIN])


def _settings(frame: pandas.DataFrame, configuration: Mapping[str, Any]) -> dict[str, str]:
    """What was swept, on which model, and how much of it: lines by name."""
    grid = configuration.get("sweep") or {}
    sites = frame[PLACE].drop_duplicates()
    rows = "modules" if all(map(names_module, frame[LAYER])) else "layers"
    ranks = sorted(frame[RANK].dropna().unique()) if RANK in frame else []
    settings = {
        "model": model_of(configuration.get("model")),
        "task": brief(configuration.get("task")),
        "methods": ", ".join(map(spoken, dict.fromkeys(frame[METHOD]))),
        "sites": f"{len(sites)}: {frame[LAYER].nunique()} {rows} x {frame[POSITION].nunique()} positions",
        "ranks": ", ".join(f"{rank:g}" for rank in ranks),
        "seeds": ", ".join(map(str, sorted(frame[SEED].unique()))),
        "fits": str(len(frame)),
    }
    if {PAIRS_CHANGING, PAIRS_PRESERVING} <= set(frame) and frame[PAIRS_CHANGING].notna().any():
        changing, preserving = frame[PAIRS_CHANGING].mean(), frame[PAIRS_PRESERVING].mean()
        share = changing / (changing + preserving)
        settings["test pairs"] = f"{changing + preserving:.0f}, of which {changing:.0f} ({share:.0%}) change the label"
    if IIA in frame and not _is_judged_by_one_rule(frame):
        settings["rule"] = (
            "maps and best sites by argmax; gap and flags by the pairwise rule, as an earlier version judged them: run "
            "the sweep again to have all by argmax"
        )
    if SECONDS in frame:
        settings["time"] = f"{frame[SECONDS].sum():.0f} s of fitting"
    if words := grid.get("words"):
        settings["command"] = " ".join(["python -m itrain sweep", *map(str, words)])
    return {name: value for name, value in settings.items() if value}


def _is_judged_by_one_rule(frame: pandas.DataFrame) -> bool:
    """Whether gap and flags went by the same IIA as the maps: versions that did not have no most frequent label."""
    return MAJORITY_LABEL in frame and bool(frame.loc[frame[IIA].notna(), MAJORITY_LABEL].notna().all())


def model_of(node: Mapping[str, Any] | None) -> str:
    """The name that a model is found under; of a module of the user's own, its constructor's."""
    if node and str(node.get("_target_")).endswith(".load_embedded"):
        return TINY_WORLD
    if node and node.get("name"):
        return f"{node['name']} at {node['revision']}" if node.get("revision") else str(node["name"])
    return brief(node)


def brief(node: Mapping[str, Any] | None) -> str:
    """A part of a configuration in one line: its class and the arguments that are set."""
    if not node:
        return ""
    told = {key: value for key, value in node.items() if not str(key).startswith("_") and value is not None}
    given = ", ".join(f"{key}: {value}" for key, value in told.items() if not isinstance(value, Mapping))
    name = str(node.get("_target_", "")).rpartition(".")[2]
    return f"{name} ({given})" if given else name
