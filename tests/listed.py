"""Rows of a user's table, for the embedded model."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from itrain.models import load_embedded
from itrain.tasks.base import Split
from itrain.tasks.gender import Gender

SIZES: Mapping[Split, int] = {"train": 140, "validation": 20, "test": 40}


def gender_rows(sizes: Mapping[Split, int] = SIZES, *, named: bool = True) -> list[dict[str, Any]]:
    """Pairs of a name's gender, as a user would list them: with columns of the splits if ``named``."""
    task, rows = Gender(), []
    task.bind(load_embedded().tokenizer)
    for split, size in sizes.items():
        random = Random(f"listed {split}")
        for _ in range(size):
            pair = task.sample(random, split)
            base, source = (task.causal_model.run(setting) for setting in pair.settings())
            rows.append(
                {
                    "base": task.identity(base),
                    "source": task.identity(source),
                    "base_label": base["pronoun"],
                    "source_label": source["pronoun"],
                    "label": task.counterfactual(pair),
                    "base_spans": {"name": [base["name"], 1]},
                    "source_spans": {"name": [source["name"], 1]},
                    "base_values": {"gender": base["gender"], "name": base["name"]},
                    "source_values": {"gender": source["gender"], "name": source["name"]},
                    "variable": "gender",
                    **({"split": split} if named else {}),
                }
            )
    return rows


def one_row(**changed: Any) -> dict[str, Any]:
    """A row that is right, but for what is changed; None leaves a column out."""
    row = {
        "base": "Mary walked because",
        "source": "John walked because",
        "base_label": "she",
        "source_label": "he",
        "label": "he",
        **changed,
    }
    return {name: value for name, value in row.items() if value is not None}


def three(**changed: Any) -> list[dict[str, Any]]:
    """A row for each split, of which the second is changed."""
    names = ("Lisa", "Mary", "Anna")
    rows = [one_row(base=f"{name} walked because", split=split) for name, split in zip(names, SIZES, strict=True)]
    rows[1] = {name: value for name, value in {**rows[1], **changed}.items() if value is not None}
    return rows


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows with nested objects as columns with dots, and lists as JSON."""
    flat = [dict(_flat(row)) for row in rows]
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(dict.fromkeys(name for row in flat for name in row)))
        writer.writeheader()
        writer.writerows(flat)
    return str(file)


def _flat(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            found += _flat({f"{name}.{key}": each for key, each in value.items()})
        else:
            found.append((name, json.dumps(value) if isinstance(value, list) else value))
    return found
