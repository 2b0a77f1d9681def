"""The embedded atlas in the files of RAVEL and of SAE-RAVEL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from itrain import tiny_world
from itrain.tasks.entity_attributes import SHARES

SPLIT_NAMES = ("train", "val", "test")
WIKIPEDIA = ("many people speak of %s", "%s is a city where people", "a part of %s and the")


def objects(entities: str = "atlas") -> dict[str, Any]:
    """RAVEL's five files for a type, by the parts of their names."""
    facts, templates = tiny_world.FACTS[entities]
    prompts = {name: [each.replace("{entity}", "%s") for each in texts] for name, texts in templates.items()}
    shuffled = Random(0).sample(sorted(facts), len(facts))
    places = zip(SPLIT_NAMES, SHARES.values(), strict=True)
    shares = {split: shuffled[round(start * len(facts)) : round(stop * len(facts))] for split, (start, stop) in places}
    return {
        "ravel_{}_entity_attributes": facts,
        "ravel_{}_attribute_to_prompts": prompts,
        "ravel_{}_prompt_to_split": {
            text: split for texts in prompts.values() for text, split in zip(texts, SPLIT_NAMES, strict=True)
        },
        "ravel_{}_entity_to_split": {entity: split for split, share in shares.items() for entity in share},
        "wikipedia_{}_entity_prompts": {
            text: {"split": split, "entity": shares["train"][0] if split == "train" else None}
            for text, split in zip(WIKIPEDIA, SPLIT_NAMES, strict=True)
        },
    }


def write_ravel(folder: Path, changes: Mapping[str, Any] | None = None, *, entity_type: str = "city") -> Path:
    """The files of a type in a folder, with some of them changed."""
    for name, content in {**objects(), **(changes or {})}.items():
        save(folder / f"{name.format(entity_type)}.json", content)
    return folder


def instance(folder: Path, rows: Mapping[str, Mapping[str, list[Any]]], *, entity_type: str = "city") -> Path:
    """The files of an instance in a folder: ``{"train": {name: rows}, "context_test": ...}``."""
    for part, content in rows.items():
        save(folder / f"tiny_{entity_type}_{part}.json", content)
    return folder


def write_sae_ravel(folder: Path, *, cities: int = 10) -> Path:
    """All pairs of some cities, as country's and continent's files have them."""
    facts, _ = tiny_world.FACTS["atlas"]
    chosen = sorted(facts)[:cities]
    for attribute, text in (("country", "it is that {} is a city in the country of"), ("continent", "")):
        text = text or "it is that {} is a city on the continent of"
        runs = [[text.format(city), f"{facts[city][attribute]}"] for city in chosen]
        save(folder / f"final_data_{attribute}.json", [[base, source] for base in runs for source in runs])
    return folder


def save(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
