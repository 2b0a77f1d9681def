"""RAVEL's files: what is read, disjoint splits, drawn pairs, labels of several tokens, and their measures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any, get_args

import pytest
import torch

from itrain.data import collate
from itrain.metrics import UNUSED
from itrain.objectives.cross_entropy import answer_loss
from itrain.tasks import TaskError
from itrain.tasks.base import Pair, Split
from itrain.tasks.contract import check_task
from itrain.tasks.ravel import Ravel, answer_after
from itrain.tasks.ravel_files import EntityType, read_facts
from tests.ravel_files import WIKIPEDIA, instance, objects, write_ravel

HELD_OUT: tuple[Split, ...] = ("validation", "test")
FEW: dict[str, Any] = {"cause": 120, "isolate": 30, "per_prompt": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ravel(tmp_path_factory.mktemp("ravel"))


def bound(folder: Path, embedded: Any, **settings: Any) -> Ravel:
    task = Ravel(data=str(folder), **FEW | settings)
    task.bind(embedded.tokenizer)
    return task


def source(pair: Pair) -> Any:
    (found,) = pair.sources.values()
    return found


# --- reading


@pytest.mark.parametrize("entity_type", get_args(EntityType))
def test_the_files_of_each_type_are_read(entity_type: Any, tmp_path: Path) -> None:
    write_ravel(tmp_path / "data", entity_type=entity_type)
    for place in (tmp_path, tmp_path / "data"):
        facts = read_facts(str(place), entity_type)
        assert len(facts.attributes) == 72 and len(facts.prompts) == 9 + len(WIKIPEDIA)
        assert Counter(facts.splits.values()) == {"train": 43, "validation": 15, "test": 14}
        about = [prompt.entity is not None for prompt in facts.prompts if prompt.attribute is None]
        assert about == [True, False, False]


def test_a_local_copy_of_the_hubs_rows_gives_the_same_as_the_archive(folder: Path, tmp_path: Path) -> None:
    """Their columns: City and the attributes; Template, Attribute, Source and Entity."""
    pandas = pytest.importorskip("pandas")
    files, facts = objects(), read_facts(str(folder), "city")
    names = {"train": "train", "validation": "val", "test": "test"}
    for split, name in names.items():
        entities = [
            {"ID": n, "City": entity, "URL": "-", **files["ravel_{}_entity_attributes"][entity]}
            for n, (entity, of) in enumerate(facts.splits.items())
            if of == split
        ]
        if split == "train":
            entities += [{**entities[0], "City": "Twice"}, {**entities[1], "City": "Twice", "country": "Drunia"}]
        prompts = [
            {
                "Template": prompt.text,
                "Attribute": prompt.attribute or "Other",
                "Source": "RAVEL" if prompt.attribute else "Wikipedia",
                "Entity": prompt.entity or "",
            }
            for prompt in facts.prompts
            if prompt.split == split
        ]
        for part, rows in (("city_entity", entities), ("city_prompt", prompts)):
            (tmp_path / part).mkdir(exist_ok=True)
            pandas.DataFrame(rows).to_parquet(tmp_path / part / f"{name}-00000-of-00001.parquet")
    found = read_facts(str(tmp_path), "city")
    assert found.attributes == facts.attributes and found.splits == facts.splits
    assert sorted(map(repr, found.prompts)) == sorted(map(repr, facts.prompts))


PART = "ravel_{}_"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no split of an entity": ({PART + "entity_to_split": {}}, r"entity_to_split.json in .* has no '[A-Z]\w+'"),
    "no split of a prompt": (
        {PART + "prompt_to_split": {}},
        r"prompt_to_split.json in .* has no '%s is in the country",
    ),
    "unknown split": (
        {PART + "prompt_to_split": dict.fromkeys(objects()[PART + "prompt_to_split"], "dev")},
        "'dev' is no split; there are train, val and test",
    ),
    "no slot": ({"wikipedia_{}_entity_prompts": {"nobody": {"split": "val", "entity": None}}}, "'nobody' has 0 '%s'"),
    "no entity": ({"wikipedia_{}_entity_prompts": {"a %s": {"split": "val"}}}, "'a %s' has no 'entity'"),
    "a list": ({PART + "entity_attributes": []}, r"_entity_attributes.json' is a list; it must be an object"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused_in_a_line_that_names_it(kind: str, tmp_path: Path) -> None:
    changes, message = WRONG[kind]
    with pytest.raises(TaskError, match=message) as error:
        Ravel(data=str(write_ravel(tmp_path, changes)))
    assert "\n" not in str(error.value)


def test_missing_files_and_wrong_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"has no ravel_city_entity_attributes\.json; give the folder in which"):
        Ravel(data=str(tmp_path))
    with pytest.raises(TaskError, match=r"has no ravel_verb_entity_attributes\.json"):
        Ravel(data=str(folder), entity_type="verb")
    with pytest.raises(TaskError, match="attributes: 'county' is none of country, continent, language"):
        Ravel(data=str(folder), attributes=["county"])
    with pytest.raises(TaskError, match="splits: 'prompt' is none of context, entity"):
        Ravel(data=str(folder), splits="prompt")  # type: ignore[arg-type]
    write_ravel(tmp_path)
    (tmp_path / "wikipedia_city_entity_prompts.json").unlink()
    with pytest.raises(TaskError, match=r"there is no file '.*wikipedia_city_entity_prompts.json'"):
        Ravel(data=str(tmp_path))


def test_a_name_on_the_hub_without_network_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError, match=r"'hij/ravel-none'.*or give a local copy") as error:
        Ravel(data="hij/ravel-none")
    assert "\n" not in str(error.value)


# --- splits


@pytest.mark.parametrize("splits", ["context", "entity"])
def test_the_splits_are_disjoint_in_what_is_held_out(splits: Any, folder: Path, embedded) -> None:
    task = bound(folder, embedded, splits=splits)
    held = "template" if splits == "context" else "entity"
    seen = {
        split: {run[held] for pair in task.pairs(split) for run in (pair.base, source(pair), *pair.known)}
        for split in ("train", *HELD_OUT)
    }
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert seen[one] and not seen[one] & seen[other]
    names = {"context": task.facts.prompts, "entity": ()}[splits]
    for split in HELD_OUT:
        allowed = {prompt.text for prompt in names if prompt.split == split} or {
            entity for entity, of in task.facts.splits.items() if of == split
        }
        assert seen[split] <= allowed
        common = {pair.base["entity" if splits == "context" else "template"] for pair in task.pairs(split)}
        kept = {pair.base["entity" if splits == "context" else "template"] for pair in task.pairs("train")}
        assert common <= kept, "what is not held out is what training has"


def test_pairs_swap_one_attribute_and_ask_for_it_or_another(folder: Path, embedded) -> None:
    task = bound(folder, embedded, attributes=["country", "language"])
    for split in ("train", *HELD_OUT):
        pairs = task.pairs(split)
        assert len({(*pair.sources, pair.base["prompt"], source(pair)["prompt"]) for pair in pairs}) == len(pairs)
        for pair in pairs:
            (variable,), asked = pair.sources, pair.base["asked"]
            assert pair.isolates == (asked != variable)
            assert pair.base[asked] != source(pair)[asked], "base and source answer differently"
            assert pair.output == f" {(pair.base if pair.isolates else source(pair))[asked]}"
            assert len(pair.known) == (not pair.isolates)
        counts = Counter((*pair.sources, pair.base["asked"]) for pair in pairs)
        assert set(counts) == {(one, other) for one in ("country", "language") for other in task.attributes}


def test_the_same_pairs_are_drawn_for_every_variable_and_again(folder: Path, embedded) -> None:
    drawn = [
        [(pair.base["prompt"], source(pair)["prompt"]) for pair in bound(folder, embedded, **given).pairs("test")]
        for given in ({"attributes": ["country"]}, {"attributes": ["language"]}, {"attributes": ["country"], "seed": 1})
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("kind", "asked"), [("output", "same"), ("causal", "other"), ("other", None)])
def test_sources_ask_for_the_same_attribute_another_or_none(
    kind: Any, asked: str | None, folder: Path, embedded
) -> None:
    task = bound(folder, embedded, sources=[kind])
    for pair in task.pairs("test"):
        said = source(pair)["asked"]
        assert ("same" if said == pair.base["asked"] else said and "other") == asked
        assert (source(pair)["answer"] is None) == (asked is None)
    check_task(task)


def test_sources_with_a_frequent_answer_are_drawn_less_often(tmp_path: Path, embedded) -> None:
    """In proportion to 1 / (20 + count): a value of half of all sources gets less than its share, as worked out."""
    facts = {entity: dict(values) for entity, values in objects()[PART + "entity_attributes"].items()}
    for entity in sorted(facts)[:54]:
        facts[entity]["country"] = "Avaria"
    write_ravel(tmp_path, {PART + "entity_attributes": facts})
    for splits, smoothing in (("context", 20), ("entity", 10)):
        task = bound(tmp_path, embedded, splits=splits, attributes=["country"], sources=["output"], per_prompt=3000)
        pools = task._pools("test")
        pool, weights = pools["country", "output"]
        counts = Counter(facts[entity]["country"] for _, entity in pool)
        expected = {value: count / (smoothing + count) for value, count in counts.items()}
        share = expected["Avaria"] / sum(expected.values())
        drawn = Random(0).choices(pool, cum_weights=weights, k=20000)
        found = sum(facts[entity]["country"] == "Avaria" for _, entity in drawn) / 20000
        assert found == pytest.approx(share, abs=0.015)
        assert share < counts["Avaria"] / len(pool) - 0.1


def test_two_attributes_that_alone_are_asked_for_give_the_score_of_saebench(folder: Path, embedded) -> None:
    task = bound(folder, embedded, asked=["country", "language"])
    assert task.variables == ("country", "language")
    batch = collate(task, task.pairs("test"))
    assert {question.attribute for question in batch.questions} == {"country", "language"}
    with pytest.raises(TaskError, match="attributes: 'continent' is none of country, language"):
        bound(folder, embedded, asked=["country", "language"], attributes=["continent"])


def test_sources_that_ask_nothing_have_labels_of_padding_and_no_loss(folder: Path, embedded) -> None:
    task = bound(folder, embedded, attributes=["country"], sources=["other"])
    batch = collate(task, task.pairs("test")[:40])
    assert all((label == UNUSED).all() for label in batch.source_labels.values())
    assert (batch.contrast_label >= 0).all() and (batch.contrast_label != batch.counterfactual_label).all()
    padding = torch.full((3, 2), UNUSED)
    assert answer_loss(torch.randn(3, 2, 5), padding).tolist() == [0.0] * 3
    assert answer_loss(torch.randn(3, 5), padding[:, 0]).tolist() == [0.0] * 3


# --- answers


@pytest.mark.parametrize(
    ("prompt", "value", "answer"),
    [
        ("%s is in the country of", "France", " France"),
        ('{"city": "%s", "country": "', "France", "France"),
        ("The latitude of %s is (", "49", "49"),
        ("%s has a latitude of ", "49", "49"),
        ("%s:", "agreed", " agreed"),
        ('"%s" means "to', "to leave", " leave"),
        ("they are into", "to leave", " to leave"),
        ("%s is pronounced as /", "/ab/", "ab/"),
        ("it is of", "France", " France"),
    ],
)
def test_an_answer_goes_on_as_its_prompt_ends(prompt: str, value: str, answer: str) -> None:
    assert answer_after(prompt, value) == answer


class Letters:
    """Every character is a token, as digits are of Gemma's tokenizer."""

    is_fast, unk_token_id, unk_token = True, None, None

    def __call__(self, text: Any, *, return_offsets_mapping: bool = False, add_special_tokens: bool = True) -> Any:
        texts = [text] if isinstance(text, str) else text
        ids = [[ord(each) for each in one] for one in texts]
        offsets = [[(place, place + 1) for place in range(len(one))] for one in texts]
        several = {"input_ids": ids, "offset_mapping": offsets}
        return {name: each[0] for name, each in several.items()} if isinstance(text, str) else several

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return list(map(chr, ids))


def test_labels_are_the_first_tokens_and_values_that_they_do_not_tell_apart_are_one(tmp_path: Path) -> None:
    facts = {entity: dict(values) for entity, values in objects()[PART + "entity_attributes"].items()}
    for entity, language in zip(sorted(facts), ("4", "48", "Swedish", "Swabian", "Darvish"), strict=False):
        facts[entity]["language"] = language
    write_ravel(tmp_path, {PART + "entity_attributes": facts})
    task = Ravel(data=str(tmp_path), **FEW)
    task.bind(Letters())  # type: ignore[arg-type]
    assert task.label(" Darvish") == tuple(map(ord, " Da"))
    told = task._told_apart
    assert " 4" not in told and told[" 48"] == " 48"
    assert told[" Swedish"] == told[" Swabian"] == " Swabian"
    assert len({task.label(each) for each in task.outputs}) == len(task.outputs)
    for pair in task.pairs("test"):
        assert pair.base["answer"] in task.outputs and pair.output in task.outputs
    exact = Ravel(data=str(tmp_path), answer_tokens=None, **FEW)
    exact.bind(Letters())  # type: ignore[arg-type]
    assert exact.label(" Darvish") == tuple(map(ord, " Darvish"))
    assert exact._told_apart[" Swedish"] == " Swedish"


# --- an instance


def row(base: str, entity: str, source: str, source_entity: str, label: str, inv_label: str, said: str) -> dict:
    return {
        **{"input": base.replace("%s", entity), "source_input": source.replace("%s", source_entity)},
        **{"label": label, "inv_label": inv_label, "source_label": said},
        **{"split": base, "source_split": source, "entity": entity, "source_entity": source_entity},
    }


COUNTRY, LANGUAGE = "%s is a city in", "%s has many people who speak"


def test_the_examples_of_an_instance_are_taken_with_its_models_answers(folder: Path, tmp_path: Path, embedded) -> None:
    rows = [
        row(COUNTRY, "Aldburg", LANGUAGE, "Fallford", " Avaria", " Drunia", " Askian"),
        row(COUNTRY, "Aldburg", WIKIPEDIA[1], "Fallford", " Avaria", " Drunia", " whatever"),
        row(LANGUAGE, "Aldburg", COUNTRY, "Fallford", " Lumic", " Wendic", " Avaria"),
        row(COUNTRY, "Aldburg", LANGUAGE, "Corton", " Avaria", " Avaria", " Askian"),
    ]
    parts = {
        "train": {"country-train": rows[:1]},
        "context_test": {f"{COUNTRY}-output-val": rows, f"{COUNTRY}-test": []},
    }
    facts = {
        name: {"country": "Estova", "language": "Tolvan", "continent": "Umbria"}
        for name in ("Aldburg", "Fallford", "Corton")
    }
    files = {**objects(), PART + "entity_attributes": facts, PART + "entity_to_split": dict.fromkeys(facts, "train")}
    write_ravel(tmp_path, files)
    task = bound(tmp_path, embedded, attributes=["country"], instance=str(instance(tmp_path, parts)))
    assert len(task.pairs("train")) == 1 and not task.pairs("test")
    one, wikipedia, isolate = task.pairs("validation")
    assert (one.base["answer"], one.output, source(one)["answer"]) == (" Avaria", " Drunia", " Askian")
    assert source(wikipedia)["answer"] is None
    assert isolate.isolates and isolate.output == " Lumic" == isolate.base["answer"]
    instance(tmp_path, {**parts, "train": {"country-train": [rows[0] | {"input": "Aldburg"}]}})
    with pytest.raises(TaskError, match=r"row 1: 'split' with 'entity' in it is not the row's input"):
        bound(tmp_path, embedded, instance=str(tmp_path))
    lacking = {name: value for name, value in rows[0].items() if name != "inv_label"}
    with pytest.raises(TaskError, match=r"row 1 has no 'inv_label'; an example of RAVEL has input, label"):
        bound(tmp_path, embedded, instance=str(instance(tmp_path, {**parts, "train": {"country-train": [lacking]}})))
    with pytest.raises(TaskError, match=r"'.*' has 0 files \*_city_train.json"):
        bound(tmp_path, embedded, instance=str(folder))
