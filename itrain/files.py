"""Files: written whole or not at all, and read with errors that name the place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from itrain.signatures import ConfigError, brief


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes the place of ``path`` once the block has ended without an error.

    Both lie in one folder, so that the replacement is atomic and the former file stays until it happens.
    """
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield beside
        with beside.open("rb+") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, or leave the former one."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, or leave the former one.

    Raises:
        ValueError: a number is not finite, which JSON does not know.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, as plain data.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or holds something else.
    """
    try:
        node = OmegaConf.to_container(OmegaConf.load(file))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"'{file}'{line}: {error.problem}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{file}': {brief(error)}") from error
    if not isinstance(node, dict):
        raise ConfigError(f"'{file}': expected key: value at the top")
    return {str(key): value for key, value in node.items()}
