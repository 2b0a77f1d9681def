"""AxBench's data: its files in its own layouts, its splits, and one line for what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning
import pytest
import torch

from itrain import tiny_world
from itrain.data import LabelledDataModule, ResponseDataModule
from itrain.models import BaseModel, load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.tasks import TaskError
from itrain.tasks.axbench import AxBench, AxBenchTexts
from itrain.tasks.base import Split
from itrain.training.continuations import whole_texts
from itrain.training.monitoring import Monitoring
from tests.test_reft import trainer

quiet = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)
Rows = list[dict[str, Any]]
CHAT = (
    "{{ bos_token }} {% for m in messages %}The {{ m['role'] == 'user' and 'cat' or 'dog' }} "
    "{{ m['content'] | trim }} . {% endfor %}{% if add_generation_prompt %}The dog {% endif %}"
)
"""A template in the words of the tiny world."""


def rows(concepts: int = 2) -> dict[str, Rows]:
    """Rows in AxBench's schema, of its two files."""

    def row(asked: str, said: str, concept: str, genre: str, category: str, number: int) -> dict[str, Any]:
        return {
            "input": f"The {asked} is old .",
            "output": f"Sarah was {said} .",
            "output_concept": concept,
            "concept_genre": genre,
            "category": category,
            "dataset_category": "instruction",
            "concept_id": number,
        }

    nouns = ["cat", "dog", "horse", "car", "book", "key", "tree", "boat"]
    train = [row(noun, "sad", "EEEEE", genre, "negative", -1) for noun in nouns[:3] for genre in ("text", "code")]
    test: Rows = []
    for number, quality in enumerate(["red", "green"][:concepts]):
        concept, genre = f"references to {quality} things", ("text", "code")[number]
        train += [row(noun, quality, concept, genre, "positive", number) for noun in nouns[:3]]
        test += [row(noun, quality, concept, genre, "positive", number) for noun in nouns[3:]]
        test += [row(noun, "happy", concept, "math", "negative", number) for noun in nouns[2:6]]
        test += [row(noun, "loud", f"{quality}//another sense", genre, "hard negative", number) for noun in nouns[6:]]
    return {"train": train, "test": [{**each, "sae_link": "https://example.org/7", "sae_id": 7} for each in test]}


def write(path: Path, listed: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(listed), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in listed))


LAYOUTS = {
    "the hub": ("2b/l10/train/data.parquet", "2b/l10/test/data.parquet"),
    "its programs": ("2b/l10/generate/train_data.parquet", "2b/l10/inference/latent_eval_data.parquet"),
    "lines": ("train/data.jsonl", "test/data.jsonl"),
}


@pytest.fixture(params=LAYOUTS.values(), ids=list(LAYOUTS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for file, listed in zip(request.param, rows().values(), strict=True):
        write(tmp_path / file, listed)
    return tmp_path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    for split, listed in rows().items():
        write(tmp_path / split / "data.jsonl", listed)
    return tmp_path


def asked(task: AxBench | AxBenchTexts, split: Split) -> list[str]:
    return [setting["prompt"] for setting in task.settings(split)]


def test_a_concept_is_read_for_steering_with_the_negatives_of_its_genre(folder: Path, embedded: BaseModel) -> None:
    task = AxBench(source=str(folder), concept=1)
    task.bind(embedded.tokenizer)
    data = ResponseDataModule(task=task, network=HookedNetwork(embedded.model))
    data.setup("test")
    assert [len(data.datasets[split].examples) for split in get_args(Split)] == [6, 3, 2]
    assert task.concept == ["green", "things"] and task.concept_text == "references to green things"
    train = data.datasets["train"].examples
    assert train.has_concept is not None and sorted(train.has_concept.tolist()) == [0, 0, 0, 1, 1, 1]
    assert len(AxBench(source=str(folder), concept=1, negatives=False).settings("train")) == 3
    splits = [set(asked(task, split)) for split in get_args(Split)]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]
    assert AxBench(source=str(folder), concept="references to red things").concept_text == "references to red things"


def test_a_concept_is_read_for_detection_with_hard_negatives_as_a_shift(folder: Path, embedded: BaseModel) -> None:
    task = AxBenchTexts(source=str(folder), concept=0)
    task.bind(embedded.tokenizer)
    counted = {name: [task.labels(each)[0] for each in task.settings(name)] for name in ("test", "hard_negatives")}
    # A negative that repeats a training instruction is left out.
    assert counted == {"test": [1] * 5 + [0] * 3, "hard_negatives": [1] * 5 + [0] * 2}
    train, validation, test = (set(asked(task, split)) for split in get_args(Split))
    assert len(train) == 2 and len(validation) == 1
    assert not train & validation and not train & test and not validation & test
    texts = task.inputs(task.settings("test")[:1]).texts
    assert texts == ("The car is old . Sarah was red .",)


def test_the_embedded_concepts_have_the_schema_and_no_common_instruction(embedded: BaseModel) -> None:
    for concept in (0, 1):
        task = AxBenchTexts(concept=concept)
        task.bind(embedded.tokenizer)
        data = LabelledDataModule(task=task, network=HookedNetwork(embedded.model))
        data.setup("fit")
        assert not set(asked(task, "train")) & set(asked(task, "test"))
        assert {len(data.datasets[split].examples) for split in get_args(Split)} == {230, 58, 480}


def test_instructions_of_another_file_are_drawn_by_the_concept_and_halved(lines: Path) -> None:
    alpaca = [{"instruction": f"The {x} is big .", "output": "Yes ."} for x in ("cat", "dog", "car", "key", "box")]
    write(lines / "alpaca.jsonl", [*alpaca, {"instruction": rows()["train"][0]["input"], "output": "No ."}])
    given: dict[str, Any] = {"source": str(lines), "instructions": str(lines / "alpaca.jsonl")}
    first, other = (AxBench(**given, concept=concept, examples=4) for concept in (0, 1))
    assert [len(first.settings(split)) for split in ("validation", "test")] == [2, 2]
    held_out = [asked(task, "validation") + asked(task, "test") for task in (first, other)]
    assert held_out[0] != held_out[1] and held_out[0] == asked(
        again := AxBench(**given, examples=4), "validation"
    ) + asked(again, "test")
    assert rows()["train"][0]["input"] not in asked(AxBench(**given), "validation") + asked(AxBench(**given), "test")
    with pytest.raises(TaskError, match="examples=6: 5 instructions are held out"):
        AxBench(**given, examples=6)
    write(lines / "alpaca.jsonl", [alpaca[0], {"instruction": "The cat"}])
    with pytest.raises(TaskError, match=r"alpaca\.jsonl' line 2 has no column 'output'"):
        AxBench(**given)


def change(lines: Path, split: str, change_row: Any) -> None:
    write(lines / split / "data.jsonl", [change_row(number, row) for number, row in enumerate(rows()[split])])


def without(*columns: str) -> Any:
    return lambda number, row: {key: value for key, value in row.items() if number != 4 or key not in columns}


@pytest.mark.parametrize(
    ("split", "change_row", "message"),
    [
        ("train", without("category"), r"train/data\.jsonl' line 5 has no column 'category'"),
        ("test", without("output"), r"test/data\.jsonl' line 5 has no column 'output'"),
        ("train", lambda n, row: {**row, "output": " "}, r"line 7, column 'output': ' ' is no text; leave the row out"),
        ("test", lambda n, row: {**row, "category": "hard negative"}, "concept 0 .* has no positive test rows"),
        (
            "train",
            lambda n, row: {**row, "concept_id": n},
            r"concept: there is no '0' in the training rows; they have 6",
        ),
    ],
)
def test_what_is_not_in_the_schema_is_named_by_row_and_column(
    lines: Path, split: str, change_row: Any, message: str
) -> None:
    change(lines, split, change_row)
    with pytest.raises(TaskError, match=message) as caught:
        AxBench(source=str(lines))
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_said_in_one_line(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        TaskError, match=r"there is no '7' in the training rows; they have 0 \('references to red things'\)"
    ):
        AxBench(source=str(lines), concept=7)
    (lines / "test" / "data.jsonl").unlink()
    with pytest.raises(TaskError, match=r"has no test rows of part '9b/l20': there is no 9b/l20/test/data\.parquet"):
        AxBenchTexts(source=str(lines), part="9b/l20")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("itrain.tasks.rows._unreachable", lambda source, revision: "no network")
    with pytest.raises(TaskError, match=r"there is no file 'nobody/axbench', .*hub cannot be reached") as caught:
        AxBench(source="nobody/axbench")
    assert "\n" not in str(caught.value)


def test_in_a_chat_prompts_are_templated_and_a_response_ends_as_a_turn_does(lines: Path) -> None:
    embedded = load_embedded()
    assert embedded.tokenizer is not None
    task = AxBench(source=str(lines), chat=True)
    task.bind(embedded.tokenizer)
    with pytest.raises(TaskError, match="chat=true needs a tokenizer with a chat template"):
        task.inputs(task.settings("test"))
    embedded.tokenizer.chat_template = CHAT
    inputs = task.inputs(task.settings("test")[:1])
    setting = task.settings("test")[0]
    assert inputs.texts is not None and inputs.texts[0].endswith(f"The cat {setting['prompt']} . The dog ")
    assert task.instruction(inputs.texts[0]) == setting["prompt"]
    start, stop = inputs.spans["prompt"][0].tolist()
    ids = inputs.arguments["input_ids"][0]
    assert embedded.tokenizer.decode(ids[start:stop]) == setting["prompt"]
    assert ids.tolist().count(embedded.tokenizer.bos_token_id) == 1
    kept = whole_texts(inputs).tokens
    assert kept is not None and kept.tolist() == [[start, len(ids)]], "neither what the template writes nor padding"
    assert embedded.tokenizer.decode([task.end]) == "." and task.response(setting)[-1] == task.end
    texts = AxBenchTexts(source=str(lines), chat=True)
    texts.bind(embedded.tokenizer)
    written = texts.inputs(texts.settings("test")[:1]).texts
    assert written is not None and written[0].strip().endswith("The dog Sarah was red . .")


def test_a_response_that_was_cut_off_does_not_end(lines: Path, embedded: BaseModel) -> None:
    lengths = {}
    for most in (128, 4, 3):
        task = AxBench(source=str(lines), max_tokens=most)
        task.bind(embedded.tokenizer)
        response: Sequence[int] = task.response(task.settings("train")[0])
        lengths[most] = len(response), response[-1] == task.end
    assert lengths == {128: (5, True), 4: (4, False), 3: (3, False)}


@quiet
def test_a_difference_in_means_and_a_probe_detect_a_concept_and_random_directions_do_not(
    tmp_path: Path, embedded: BaseModel
) -> None:
    for split, listed in tiny_world.concept_rows().items():
        write(tmp_path / "2b" / "l10" / split / "data.parquet", listed)
    lightning.seed_everything(0, verbose=False)
    task, network = AxBenchTexts(source=str(tmp_path)), HookedNetwork(embedded.model)
    task.bind(embedded.tokenizer)
    data = LabelledDataModule(task=task, network=network)
    module = Monitoring(
        network=network,
        sites="layer3.block_output",
        concepts=task.concepts,
        pooling="max",
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )
    trainer(12).fit(module, data)
    (figures,) = trainer(1).test(module, data, verbose=False)
    found = {name.split("/")[-1]: value for name, value in figures.items() if name.startswith("test/auroc/")}
    at = {name: next(value for key, value in found.items() if name in key) for name in ("mean", "probe", "random")}
    assert at["mean"] > 0.9 < at["probe"] and abs(at["random"] - 0.5) < 0.15
