"""Tables of sweeps that were never run, for tests of what is made of them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pandas
from omegaconf import OmegaConf

from itrain.results.summary import SweepSummary, summarise

METHODS = {"das": 0.9, "random_subspace": 0.1, "full_vector": 1.0, "probing": 0.97}


def table(
    *, layers: int = 3, positions: tuple[str, ...] = ("name", "verb"), ranks: tuple[int, ...] = (1,), seeds: int = 1
) -> pandas.DataFrame:
    rows: list[dict[str, Any]] = []
    for (method, share), layer, position, seed in product(METHODS.items(), range(layers), positions, range(seeds)):
        for rank in ranks if method in ("das", "random_subspace") else (None,):
            command = f"python -m itrain fit intervention={method} site=layer{layer}.block_output@{position}"
            command += f" seed={seed}" + ("" if rank is None else f" intervention.rank={rank}")
            found = share * (1 - 0.1 * layer) - 0.01 * seed
            figures: dict[str, float] = {"probe_accuracy": found, "control_accuracy": 0.5, "selectivity": found - 0.5}
            if method != "probing":
                found *= min(1, 0.5 + 0.25 * (rank or 2))
                figures = {"iia_changing_argmax": found, "pairs_changing": 100, "pairs_preserving": 150}
                figures["data/majority_label"] = 0.5
            flag = "control passes" if (method, layer, position) == ("das", 0, "verb") else ""
            place = {"component": "block_output", "layer": layer, "position": position, "rank": rank, "seed": seed}
            rows.append({"method": method, **place, "command": command, **figures, "seconds": 1.5, "flag": flag})
    return pandas.DataFrame(rows)


def curves(frame: pandas.DataFrame, *, epochs: int = 4) -> pandas.DataFrame:
    """The validation of the fits of DAS, each rising to what it came to."""
    rows = [
        {**row, "epoch": epoch, "validation/iia_changing_argmax": row["iia_changing_argmax"] * (epoch + 1) / epochs}
        for row in frame.loc[frame.method == "das"].to_dict("records")
        for epoch in range(epochs)
    ]
    left = ["method", "component", "layer", "position", "rank", "seed", "command", "epoch"]
    return pandas.DataFrame(rows, columns=pandas.Index([*left, "validation/iia_changing_argmax"]))


def with_controls(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The table with the columns of the randomly initialised model, the gap and the examples of probes."""
    return frame.assign(
        **{
            "random_model/iia_changing_argmax": 0.03 + 0 * frame.iia_changing_argmax,
            "random_model/probe_accuracy": 0.61 + 0 * frame.probe_accuracy,
            "gap": 0.04,
            "examples": frame.probe_accuracy * 0 + 200,
        }
    )


def finished(
    folder: Path,
    frame: pandas.DataFrame,
    name: str = "gender",
    *,
    model: str = "itrain.models.load_embedded",
    trained: pandas.DataFrame | None = None,
) -> Path:
    """The folder of a sweep that has left these tables."""
    folder.mkdir(parents=True)
    frame.to_parquet(folder / "results.parquet")
    if trained is not None:
        trained.to_parquet(folder / "curves.parquet")
    settings = {
        "name": name,
        "model": {"_target_": model},
        "task": {"_target_": "itrain.tasks.gender.Gender"},
        "sweep": {"words": ["recipe=gender"]},
    }
    OmegaConf.save(OmegaConf.create(settings), folder / "config.yaml")
    return folder


def summary_of(folder: Path) -> SweepSummary:
    (summary,) = summarise([folder])
    return summary
