"""RAVEL as it is published: entities with their attributes, prompts that ask for these, and the splits of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from itrain.tasks import TaskError
from itrain.tasks.base import Split
from itrain.tasks.rows import Row, read_rows
from itrain.tasks.schema import read_json

EntityType = Literal["city", "nobel_prize_winner", "occupation", "physical_object", "verb"]
SPLITS: Mapping[str, Split] = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
"""The splits by their names in the files."""
SLOT = "%s"
"""Where a prompt has its entity."""
COLUMNS = (
    *("input", "label", "source_input", "source_label", "inv_label"),
    *("split", "source_split", "entity", "source_entity"),
)
"""What a row of an instance has; its splits are prompts."""


class Prompt(NamedTuple):
    """A prompt with ``%s`` in its entity's place."""

    text: str
    attribute: str | None
    """The attribute it asks for; None: a sentence of Wikipedia, which asks for none."""
    split: Split
    entity: str | None = None
    """The one entity that it is about; None: any."""


class Facts(NamedTuple):
    """The entities of one type, and the prompts about them."""

    attributes: Mapping[str, Mapping[str, str]]
    """The values of each entity's attributes."""
    splits: Mapping[str, Split]
    """The split of each entity."""
    prompts: Sequence[Prompt]


class Example(NamedTuple):
    """A base, a source, and their answers; what the base would answer if it were about the source's entity."""

    prompt: Prompt
    entity: str
    source: Prompt
    source_entity: str
    answer: str
    source_answer: str | None
    counterfactual: str


def read_facts(data: str, entity_type: str) -> Facts:
    """The entities and prompts of a type.

    Args:
        data: the folder in which RAVEL's ``data.tgz`` was unpacked, with ``ravel_<type>_entity_attributes.json`` and
            four more files of each type; or the name or a local copy of the data set on the hub, with the
            configurations ``<type>_entity`` and ``<type>_prompt``.
        entity_type: such as ``city``.

    Raises:
        TaskError: a file, column or split is missing; naming it and the remedy.
    """
    folder = Path(data).expanduser()
    for place in (folder, folder / "data"):
        if (place / f"ravel_{entity_type}_entity_attributes.json").is_file():
            return _unpacked(place, entity_type)
    if folder.is_file() or (folder.is_dir() and not (folder / f"{entity_type}_entity").is_dir()):
        raise TaskError(
            f"'{data}' has no ravel_{entity_type}_entity_attributes.json; give the folder in which RAVEL's data.tgz "
            "was unpacked"
        )
    return _of_hub(data, entity_type)


def read_examples(instance: str, entity_type: str, kind: str, facts: Facts) -> Iterator[tuple[Split, Example]]:
    """The examples that were made for one model, whose own answers they have, with their splits.

    They are those of ``<model>_<type>_train.json`` and ``<model>_<type>_<kind>_test.json``: objects of lists of rows,
    whose names end in the split.
    """
    asked = {prompt.text: prompt for prompt in facts.prompts}
    for part in ("train", f"{kind}_test"):
        found = sorted(Path(instance).expanduser().glob(f"*_{entity_type}_{part}.json"))
        if len(found) != 1:
            raise TaskError(f"'{instance}' has {len(found)} files *_{entity_type}_{part}.json; give a folder with one")
        for name, rows in _object(found[0]).items():
            split = _split(name.rpartition("-")[2], f"'{found[0]}', '{name}'")
            for number, row in enumerate(rows, 1):
                yield split, _example(row, asked, f"'{found[0]}', '{name}' row {number}")


def _example(row: Any, asked: Mapping[str, Prompt], place: str) -> Example:
    if missing := [name for name in COLUMNS if name not in row]:
        raise TaskError(f"{place} has no '{missing[0]}'; an example of RAVEL has {', '.join(COLUMNS)}")
    base, source = (_prompt(row, f"{role}split", f"{role}entity", asked, place) for role in ("", "source_"))
    answer = None if source.attribute is None else row["source_label"]
    return Example(
        base, row["entity"], source, row["source_entity"], row["label"], answer, counterfactual=row["inv_label"]
    )


def _prompt(row: Mapping[str, str], text: str, entity: str, asked: Mapping[str, Prompt], place: str) -> Prompt:
    prompt = asked.get(row[text])
    if prompt is None:
        raise TaskError(f"{place}, '{text}': there is no prompt {row[text]!r} in RAVEL's files")
    if prompt.text.replace(SLOT, row[entity]) != row["source_input" if text == "source_split" else "input"]:
        raise TaskError(f"{place}: '{text}' with '{entity}' in it is not the row's input")
    return prompt


# --- the unpacked archive


def _unpacked(folder: Path, entity_type: str) -> Facts:
    attributes, to_prompts, prompt_splits, entity_splits = (
        _object(folder / f"ravel_{entity_type}_{part}.json")
        for part in ("entity_attributes", "attribute_to_prompts", "prompt_to_split", "entity_to_split")
    )
    place = f"ravel_{entity_type}_prompt_to_split.json in '{folder}'"
    prompts = [
        Prompt(text, attribute, _split(_get(prompt_splits, text, place), place))
        for attribute, texts in to_prompts.items()
        for text in texts
    ]
    about = f"wikipedia_{entity_type}_entity_prompts.json"
    for text, said in _object(folder / about).items():
        where = f"{about}, {text!r}"
        split = _split(_get(said, "split", where), where)
        prompts.append(Prompt(text, None, split, _get(said, "entity", where)))
    place = f"ravel_{entity_type}_entity_to_split.json in '{folder}'"
    splits: dict[str, Split] = {entity: _split(_get(entity_splits, entity, place), place) for entity in attributes}
    return _checked(attributes, splits, prompts)


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path, "give the folder in which RAVEL's data.tgz was unpacked")
    if not isinstance(found, dict):
        raise TaskError(f"'{path}' is a {type(found).__name__}; it must be an object")
    return found


def _get(found: Mapping[str, Any], key: str, place: str) -> Any:
    if key not in found:
        raise TaskError(f"{place} has no {key!r}")
    return found[key]


def _split(name: Any, place: str) -> Split:
    if name not in SPLITS:
        raise TaskError(f"{place}: '{name}' is no split; there are train, val and test")
    return SPLITS[name]


# --- the hub


def _of_hub(data: str, entity_type: str) -> Facts:
    found = {}
    for part in ("entity", "prompt"):
        name = f"{entity_type}_{part}"
        local = (Path(data).expanduser() / name).is_dir()
        found[part] = read_rows(str(Path(data).expanduser() / name)) if local else read_rows(data, name=name)
    prompts = [
        _hub_prompt(row, _split(name, f"data set '{data}'")) for name, rows in found["prompt"].items() for row in rows
    ]
    asked = {prompt.attribute for prompt in prompts if prompt.attribute is not None}
    column = entity_type.replace("_", " ").title()
    attributes: dict[str, dict[str, str]] = {}
    splits: dict[str, Split] = {}
    twice = set()
    for name, rows in found["entity"].items():
        split = _split(name, f"data set '{data}'")
        for row in rows:
            entity = _get(row.columns, column, row.place)
            values = {key: str(value) for key, value in row.columns.items() if key in asked and value is not None}
            if attributes.setdefault(entity, values) != values or splits.setdefault(entity, split) != split:
                twice.add(entity)
    for entity in twice:  # Nobody can say which of the two a prompt is about.
        del attributes[entity], splits[entity]
    return _checked(attributes, splits, [each for each in prompts if each.entity not in twice])


def _hub_prompt(row: Row, split: Split) -> Prompt:
    text, attribute, source = (_get(row.columns, column, row.place) for column in ("Template", "Attribute", "Source"))
    asks = str(source).casefold() == "ravel"
    return Prompt(text, attribute if asks else None, split, row.columns.get("Entity") or None)


# --- both


def _checked(
    attributes: Mapping[str, Mapping[str, str]], splits: Mapping[str, Split], prompts: Sequence[Prompt]
) -> Facts:
    asking = {prompt.text for prompt in prompts if prompt.attribute is not None}
    kept = []
    for prompt in prompts:
        if prompt.text.count(SLOT) != 1:
            raise TaskError(f"the prompt {prompt.text!r} has {prompt.text.count(SLOT)} '{SLOT}'; it must have one")
        # Wikipedia's list has some of the prompts that ask, of other splits.
        if prompt.attribute is not None or prompt.text not in asking:
            kept.append(prompt)
    return Facts(attributes, splits, kept)
