"""``data.pairs``: a table of pairs in place of the task's own, or of the task whose inputs its rows hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from itrain.files import read_yaml
from itrain.signatures import ConfigError, nearest

TABLE = "itrain.tasks.table.table"
_PAIRS = "itrain.data.CounterfactualDataModule"
_GIVEN = ("of", "fingerprint")
"""Arguments of a table that the task and the run give."""


def take_table(config: DictConfig, typed: Iterable[Override], recipes: Iterable[Path]) -> None:
    """Move what ``data`` says of a table to the task, which it makes.

    The table's rows are texts with their labels, unless a task is named where ``data.pairs`` is, on the command line or
    in the recipe: then they are that task's inputs.

    Raises:
        ConfigError: something is said of a table, and none is named.
    """
    data: Mapping[str, Any] = config.get("data") or {}
    if data.get("_target_") != _PAIRS:
        return
    known = [name for name in inspect.signature(get_object(TABLE)).parameters if name not in _GIVEN]
    given = {key: data[key] for key in known if key in data}
    task = config.get("task") or {}
    is_table = task.get("_target_") == TABLE
    if not given:
        _refuse_near(data, known, is_table=is_table)
        return
    if "pairs" not in given and not is_table:
        raise ConfigError(f"data.{next(iter(given))} is said of a table, and none is named; add data.pairs=<file>")
    for key in given:
        del config.data[key]
    _refuse_near(config.data, known, is_table=True)
    if is_table:
        node = {**task, **given}
    else:
        of = {"of": task} if any(_part(each) == "task" for each in typed) or _names_task(recipes) else {}
        node = {"_target_": TABLE, **of, **given}
    config.task = {**node, "fingerprint": None} if "pairs" in given else node


def fill_in_fingerprint(config: DictConfig) -> None:
    """Write down what the contents of a table's files are known by, so that a change is noticed.

    Raises:
        ConfigError: a file does not exist.
    """
    from itrain.tasks import TaskError
    from itrain.tasks.rows import fingerprint_of

    task = config.task
    if (task or {}).get("_target_") == TABLE and task.get("fingerprint") is None:
        pairs: Any = OmegaConf.to_container(task, resolve=True)
        try:
            task.fingerprint = fingerprint_of(pairs["pairs"])
        except TaskError as error:
            raise ConfigError(f"data.pairs: {error}") from error


def _refuse_near(data: Mapping[str, Any], known: list[str], *, is_table: bool) -> None:
    """Refuse a mistyped setting of a table, which the check of ``data`` would compare with the module's own alone."""
    own = list(inspect.signature(get_object(_PAIRS)).parameters)
    for key in data if is_table else ():
        if key not in own and not str(key).startswith("_"):
            raise ConfigError(
                f"data.{key}: no such setting of a table or its batches{nearest(str(key), [*known, *own])}"
            )


def _names_task(recipes: Iterable[Path]) -> bool:
    """Whether a recipe names a task beside its pairs."""
    for file in recipes:
        node = read_yaml(file) or {}
        if isinstance(node.get("data"), dict) and "pairs" in node["data"]:
            chosen = [key for each in node.get("defaults") or () if isinstance(each, dict) for key in each]
            return "task" in node or any(str(key).split("/")[-1] == "task" for key in chosen)
    return False


def _part(override: Override) -> str:
    return override.key_or_group.split(".")[0]
