"""The folder of an export, read as data: its description, and the shapes of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from itrain.factories import Limited
from itrain.trust import QuotingError, TrustError, read_json

WEIGHTS = "intervention.safetensors"
CONFIG = "intervention_config.json"
EXPORT = "export"
"""The folder in a run's folder that holds its export."""
FORMAT = 2


class ExportError(QuotingError):
    """An export cannot be written, or does not belong where it is loaded."""


def read_config(folder: str | Path) -> dict[str, Any]:
    """The description of an export.

    Raises:
        ExportError: the folder holds no export, a damaged one, or one of another format.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ExportError(f"'{folder}' is not an export: it has no {name}{_meant(folder, name)}")
    try:
        config = read_json(folder / CONFIG)
    except TrustError as error:
        raise ExportError(str(error)) from error
    if not isinstance(config, dict):
        raise ExportError(f"'{folder / CONFIG}' is damaged: it holds no object")
    if config.get("format") != FORMAT:
        raise ExportError(f"'{folder}' has format {config.get('format')}; this itrain reads format {FORMAT}")
    base = config.get("base_model")
    if not isinstance(base, dict) or not all(isinstance(base.get(key), str) for key in ("name", "type", "fingerprint")):
        raise ExportError(f"'{folder / CONFIG}' is damaged: it does not say what its base model is")
    return config


def _meant(folder: Path, name: str) -> str:
    """Where an export is instead: in a run's folder, or in the last one of several; a sweep has none."""
    if (folder / "results.parquet").is_file():
        return "; a sweep leaves no exports: run the command of a row of its table"
    runs = [folder, *sorted(folder.glob("*/"), reverse=True)] if folder.is_dir() else []
    inside = [run / EXPORT for run in runs if (run / EXPORT / name).is_file()]
    return f"; did you mean '{inside[0]}'?" if inside else ""


def read_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """The shape of each weight of an export, from the header of its file; no weight is read.

    Raises:
        ExportError: the file is damaged, for example shorter than its header says.
    """
    try:
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ExportError(f"'{Path(folder) / WEIGHTS}' is damaged: {error}") from error


def limited_to(folder: str | Path) -> Limited:
    """A context in which no module can be made that is far larger than an export's weights."""
    elements = sum(torch.Size(shape).numel() for shape in read_shapes(folder).values())
    return Limited(elements, str(folder))
