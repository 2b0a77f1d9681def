"""The tables that docs/howto/data.md shows are read as it says."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from itrain.data import CounterfactualDataModule
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.tasks.cells import COLUMNS
from itrain.tasks.gender import Gender
from itrain.tasks.table import table
from tests.pages import DOCS, blocks

GUIDE = (DOCS / "howto" / "data.md").read_text(encoding="utf-8")
TABLES = {block.file: block.code for block in blocks("howto/data.md") if block.file}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_guide_are_read(name: str, embedded: BaseModel, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TABLES[name])
    of = Gender() if name.startswith("inputs") else None
    task = table(pairs=str(tmp_path / name), of=of)
    task.bind(embedded.tokenizer)
    data = CounterfactualDataModule(task=task, network=HookedNetwork(embedded.model), keep="all")
    data.setup("fit")
    test: Any = data.datasets["test"].examples
    assert test.base.texts == ("Anna walked because" if of else "Anna sang because",)
    assert test.base.spans["name"].tolist() == [[1, 2]] and bool(test.changes.all())


def test_the_guide_has_three_tables_all_columns_and_all_settings() -> None:
    assert sorted(TABLES) == ["inputs.csv", "my.csv", "my.jsonl"]
    assert not [column for column in COLUMNS if f"`{column}" not in GUIDE and f"{column}`" not in GUIDE]
    settings = {*inspect.signature(table).parameters} - {"pairs", "of", "fingerprint"}
    assert not [name for name in settings if f"data.{name}" not in GUIDE]
