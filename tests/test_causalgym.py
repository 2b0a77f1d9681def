"""CausalGym's rows and templates: regions, swaps, splits, control tasks, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from itrain.data import CounterfactualDataModule
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.tasks import TaskError
from itrain.tasks.base import Pair, Split
from itrain.tasks.causalgym import CausalGym, Sentences

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
NOUNS = ("author", "doctor", "lawyer", "teacher", "student", "farmer", "pilot", "banker", "guard", "dancer")
TEMPLATE: Mapping[str, Any] = {
    "templates": ["The {subject} {prep} the {object}"],
    "label": "subject",
    "result_prepend_space": True,
    "labels": {"singular": ["is", "was"], "plural": ["are", "were"]},
    "variables": {
        "subject": {"singular": list(NOUNS), "plural": [f"{noun}s" for noun in NOUNS]},
        "prep": ["near", "behind", "beside", "with", "under", "above"],
        "object": [*NOUNS, *(f"{noun}s" for noun in NOUNS)],
    },
}
GAP: Mapping[str, Any] = {
    "templates": ["{who} {clause.verb} the {clause.object}{mark}"],
    "label": ["who", "mark"],
    "result_prepend_space": False,
    "labels": {"he": [" he"], "she": [" she"]},
    "variables": {
        "who": {"he": ["John"], "she": ["Mary"]},
        "mark": {"he": [" because"], "she": [""]},
        "clause.verb": ["sold", "found", "lost"],
        "clause.object": ["car", "book", "hat"],
    },
}


def templates(**changes: Any) -> dict[str, Any]:
    return {"agreement": {**TEMPLATE, **changes}}


def bound(**given: Any) -> CausalGym:
    task = CausalGym(**{"name": "agreement", "templates": templates(), "words": (" dog", " gave"), **given})
    task.bind(load_embedded().tokenizer)
    return task


def source_of(pair: Pair) -> Mapping[str, Any]:
    source = pair.sources["type"]
    assert not isinstance(source, Pair)
    return source


def text(regions: Sequence[str]) -> str:
    return "".join(regions)


def row(
    noun: str, *, task: str = "agreement", plural: bool = False, prep: str = "near", **changes: Any
) -> dict[str, Any]:
    both = [["<|endoftext|>The", f" {noun}{end}", f" {prep}", " the", " dogs"] for end in ("", "s")]
    base, src = both[::-1] if plural else both
    kinds, labels = ("singular", "plural"), (" is", " are")
    kinds, labels = (kinds[::-1], labels[::-1]) if plural else (kinds, labels)
    made = {"base": base, "src": src, "base_type": kinds[0], "src_type": kinds[1]}
    return {**made, "base_label": labels[0], "src_label": labels[1], "task": task, **changes}


def both_ways(nouns: Sequence[str], **given: Any) -> list[dict[str, Any]]:
    return [row(noun, plural=plural, **given) for noun in nouns for plural in (False, True)]


def written(folder: Path, **splits: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    rows = {"train": both_ways(NOUNS[:4]), "dev": both_ways(NOUNS[4:7]), "test": both_ways(NOUNS[7:])} | splits
    for split, each in rows.items():
        (folder / f"{split}.json").write_text(json.dumps(each, indent=2))
    return str(folder)


# --- rows


def test_rows_of_a_task_are_read_as_they_stand(tmp_path: Path) -> None:
    others = both_ways(NOUNS[:2], task="another")
    task = bound(source=written(tmp_path / "rows", train=[*others, *both_ways(NOUNS[:4])]), templates=None)
    assert {split: len(task.pairs(split)) for split in SPLITS} == {"train": 8, "validation": 6, "test": 6}
    pair, swap = task.pairs("train")[:2]
    assert pair.base["type"] == "singular" and pair.output == " are" and pair.base["answer"] == " is"
    assert swap.base == source_of(pair) and source_of(swap) == pair.base and swap.output == " is"
    assert task.outputs == [" are", " is"] and task.values("type") == ["plural", "singular"] and not task.notes
    inputs = task.inputs([pair.base, swap.base])
    assert sorted(inputs.spans) == ["region1", "region2", "region3", "region4"], "from the first that differs"


def test_pairs_of_two_splits_are_kept_in_one_of_them(tmp_path: Path) -> None:
    """The authors leave training sentences out of the others, but dev and test may have the same."""
    dev, test = both_ways(NOUNS[4:7]), both_ways([*NOUNS[6:], NOUNS[0]])
    task = bound(source=written(tmp_path / "rows", dev=dev, test=test), templates=None)
    assert {split: len(task.pairs(split)) for split in SPLITS} == {"train": 8, "validation": 4, "test": 8}
    assert task.notes == {"left out": "2 validation, 2 test pairs that another split has too"}
    network = HookedNetwork(load_embedded().model)
    data = CounterfactualDataModule(task=task, network=network, keep="all")
    data.setup("fit")  # which refuses pairs of two splits
    assert data.describe()["left out"] and len(data.datasets["test"]) == 8


BROKEN = {
    "column": ({"src_type": None}, r"there is no column 'src_type'|the column 'src_type' is no text"),
    "regions": ({"base": ["The", " dog"]}, r"base has 2 regions and src 5; they are aligned"),
    "text": ({"base": "The dog"}, r"the column 'base' is no list of regions"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_row_is_named(fault: str, tmp_path: Path) -> None:
    changes, message = BROKEN[fault]
    rows = [{**each, **changes} for each in both_ways(NOUNS[:4])]
    with pytest.raises(TaskError, match=f"row 1: .*{message}.* 7 more rows"):
        bound(source=written(tmp_path / "rows", train=rows), templates=None)


def test_what_rows_lack_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path / "rows")
    with pytest.raises(TaskError, match="has no task 'agreemnt', did you mean 'agreement'"):
        bound(source=source, templates=None, name="agreemnt")
    with pytest.raises(TaskError, match="has no validation rows of the task 'agreement'"):
        bound(source=written(tmp_path / "rows", dev=both_ways(NOUNS, task="another")), templates=None)
    with pytest.raises(TaskError, match=r"rows or templates: set task.source=.* or task.templates="):
        bound(templates=None)

    def unreachable(*given: object, **settings: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(TaskError, match=r"aryaman/causalgym"):
        bound(source="aryaman/causalgym", templates=None)


# --- templates


def test_templates_give_the_published_numbers_of_pairs_each_with_its_swap() -> None:
    task = bound()
    assert {split: len(task.pairs(split)) for split in SPLITS} == {"train": 400, "validation": 98, "test": 100}
    assert task.notes == {"left out": "2 validation pairs that another split has too"}
    for split in ("train", "test"):
        pairs = task.pairs(split)
        for start in range(0, len(pairs), 4):
            for pair, swap in zip(pairs[start : start + 2], pairs[start + 2 : start + 4], strict=True):
                assert swap.base == source_of(pair) and source_of(swap) == pair.base
                assert pair.base["type"] != source_of(pair)["type"]
    trained = {text(pair.base["regions"]) for pair in task.pairs("train")}
    held_out = [pair for number, pair in enumerate(task.pairs("test")) if number % 4 < 2]
    assert not trained & {text(pair.base["regions"]) for pair in held_out}, "no base is a training sentence"


def test_only_what_shows_the_type_differs_and_tables_keep_their_rows() -> None:
    for pair in bound().pairs("test"):
        differ = [one != other for one, other in zip(pair.base["regions"], source_of(pair)["regions"], strict=True)]
        assert differ == [False, True, False, False, False]
    rows = {"sold": " car", "found": " book", "lost": " hat"}
    for pair in bound(name="gap", templates={"gap": GAP}).pairs("train"):
        regions = pair.base["regions"]
        assert rows[regions[2].strip()] == regions[4], "values of one head come from one row"


def test_a_region_that_is_empty_in_some_sentences_is_no_position() -> None:
    task = bound(name="gap", templates={"gap": GAP})
    pair = task.pairs("train")[0]
    assert sorted(task.inputs([pair.base]).spans) == ["clause_object", "clause_verb", "region3", "who"]


def test_positions_are_the_last_tokens_of_regions() -> None:
    """As the authors align them: by the tokens of each region alone, the last one of which is edited."""
    task = bound()
    settings = [pair.base for pair in task.pairs("test")[:20]]
    inputs = task.inputs(settings)
    for number, name in enumerate(("subject", "prep", "region3", "object"), 1):
        site = Site.parse(f"layer0.block_output@{name}.last")
        found = inputs.indices(site, inputs.length).index[:, 0].tolist()
        for setting, token in zip(settings, found, strict=True):
            counts = [len(task.tokenizer.tokenize(region)) for region in setting["regions"][: number + 1]]
            assert token == sum(counts) - 1


def test_a_sentence_begins_as_the_tokenizer_begins_it() -> None:
    task = bound()
    prompt = (task.inputs([task.pairs("test")[0].base]).texts or [""])[0]
    assert prompt.startswith("<|endoftext|>The")
    ids = task.inputs([task.pairs("test")[0].base]).arguments["input_ids"][0].tolist()
    assert ids.count(task.tokenizer.bos_token_id) == 1
    task._start = ""
    assert task.identity(task.pairs("test")[0].base) == prompt.removeprefix("<|endoftext|>")


BAD_TEMPLATES = {
    "no labels": ({"labels": {}}, "labels has two types or more"),
    "no values": ({"templates": ["The {subject} {where}"]}, r"the template's \{where\} has no values of its own"),
    "no types": ({"variables": {**TEMPLATE["variables"], "subject": ["dog"]}}, "'subject' needs values for each type"),
    "types": (
        {"variables": {**TEMPLATE["variables"], "prep": {"singular": ["near"]}}},
        "'prep' needs a list of values",
    ),
}


@pytest.mark.parametrize("fault", BAD_TEMPLATES)
def test_a_broken_template_is_named(fault: str) -> None:
    changes, message = BAD_TEMPLATES[fault]
    with pytest.raises(TaskError, match=f"task.templates, task 'agreement': .*{message}"):
        bound(templates=templates(**changes))


def test_a_file_of_templates_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    file = tmp_path / "syntax.json"
    file.write_text(json.dumps(templates()))
    assert bound(templates=str(file)).pairs("test") == bound().pairs("test")
    with pytest.raises(TaskError, match=r"'.*syntax\.json' has no task 'agreements', did you mean 'agreement'"):
        bound(templates=str(file), name="agreements")
    file.write_text(json.dumps({"agreement": {"templates": []}}))
    with pytest.raises(TaskError, match="there is no 'label'"):
        bound(templates=str(file))
    with pytest.raises(TaskError, match="there is no file"):
        bound(templates=str(tmp_path / "none.json"))


# --- control tasks


def test_control_tasks_replace_labels_alone() -> None:
    plain, given = bound(), {name: bound(manipulate=name) for name in ("dog-give", "invert", "random")}
    flipped = 0
    for number, pair in enumerate(plain.pairs("train")):
        dog, inverted, random = (task.pairs("train")[number] for task in given.values())
        for other in (dog, inverted, random):
            assert other.base["regions"] == pair.base["regions"]
        assert dog.base["answer"] == {"plural": " dog", "singular": " gave"}[pair.base["type"]] != dog.output
        assert (inverted.base["answer"], inverted.output) == (pair.output, pair.base["answer"])
        kept = random.base["type"] == pair.base["type"]
        assert kept == (random.base["answer"] == pair.base["answer"]), "both are exchanged, as the authors do"
        flipped += not kept
    assert 0.4 < flipped / 400 < 0.6
    control = plain.control_task()
    assert control.pairs("test") == given["dog-give"].pairs("test")
    with pytest.raises(TaskError, match=r"task\.manipulate is one of dog-give, invert, random"):
        bound(manipulate="dog")


def test_a_pair_and_its_swap_have_the_same_random_control() -> None:
    rows = [Sentences(("a", str(n)), ("b", str(n)), "x", "y", "1", "2") for n in range(50)]
    for each in rows:
        assert each.swapped.under("random", ["x", "y"], []) == each.under("random", ["x", "y"], []).swapped
