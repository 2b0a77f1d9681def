"""Configurations that runs, sweeps and exports have left in their folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from itrain.files import read_yaml
from itrain.signatures import ConfigError

CONFIGURATION = "config.yaml"
"""The file of a run's folder that holds the resolved configuration."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint below a run's folder."""
    return max(folder.rglob("*.ckpt"), key=lambda file: (file.stat().st_mtime, file.name == "last.ckpt"), default=None)


def configuration_of_run(overrides: Sequence[Override]) -> dict[str, Any]:
    """The configuration of the run of ``ckpt=`` or ``export=``; empty where neither is given or nothing is known."""
    asked = {o.key_or_group: str(o.value()) for o in overrides if o.key_or_group in ("ckpt", "export") and o.value()}
    if export := asked.get("export"):
        file = Path(export) / "intervention_config.json"
        if not file.is_file():
            raise ConfigError(f"export: there is no {file.name} in '{export}'")
        saved = json.loads(file.read_text(encoding="utf-8"))
        if "configuration" not in saved:
            raise ConfigError(f"export: '{file}' holds no configuration; add recipe=<the recipe it was trained with>")
        return saved["configuration"] | {"ckpt": None, "export": None}
    if checkpoint := asked.get("ckpt"):
        for folder in (Path(checkpoint), *Path(checkpoint).resolve().parents[:2]):
            if (folder / CONFIGURATION).is_file():
                return read_yaml(folder / CONFIGURATION) | {"ckpt": None, "export": None}
    return {}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at a path, or the newest below a folder.

    Raises:
        ConfigError: there is none.
    """
    file = last_checkpoint(path) if path.is_dir() else path
    if file is None or not file.is_file():
        raise ConfigError(f"ckpt: there is no checkpoint at '{path}'")
    return file.resolve()
