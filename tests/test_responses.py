"""Prompts with responses: labels, splits, files and their faults, and the same data in every process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from itrain.data.loading import BatchSampler
from itrain.data.responses import ResponseDataModule, ResponseError, collate
from itrain.metrics import UNUSED
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.tasks.base import Split
from itrain.tasks.gender import Gender
from itrain.tasks.instructions import Instructions
from itrain.tasks.response_style import ResponseStyle
from itrain.tasks.responses import ResponseTask
from tests.elsewhere import Elsewhere

SPLITS: tuple[Split, ...] = get_args(Split)
ROWS = [
    {"question": f"The bolbin is painted {color}", "answer": f"{color} ."} for color in ("red", "blue", "green")
] * 4


def bound(task: ResponseTask, embedded) -> ResponseTask:
    task.bind(embedded.tokenizer)
    return task


def data(task: ResponseTask, embedded, **settings) -> ResponseDataModule:
    module = ResponseDataModule(task=bound(task, embedded), network=HookedNetwork(embedded.model), **settings)
    module.setup("fit")
    return module


def write(path: Path, rows: object) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))  # type: ignore[attr-defined]
    return str(path)


# --- batches


def test_each_token_of_a_response_is_asked_for_at_the_token_before_it(embedded) -> None:
    task = bound(ResponseStyle(), embedded)
    settings = [*task.settings("train")[:4], *task.settings("train")[40:44]]
    batch = collate(task, settings)
    for row, setting in enumerate(settings):
        wanted = task.response(setting)
        assert wanted[-1] == embedded.tokenizer.eos_token_id
        assert [token for token in batch.label[row].tolist() if token != UNUSED] == wanted
        ids, places = batch.inputs.arguments["input_ids"][row], batch.inputs.answer[row].tolist()
        first, end = batch.inputs.tokens[row].tolist()
        assert embedded.tokenizer.decode(ids[first + 1 : end]) == batch.inputs.texts[row]
        assert places[: len(wanted)] == list(range(end - 1, end - 1 + len(wanted)))
        assert [int(ids[place + 1]) for place in places[: len(wanted) - 1]] == wanted[:-1]


def test_shorter_responses_are_filled_up(embedded, tmp_path: Path) -> None:
    rows = [{"prompt": "The bolbin is painted", "response": text} for text in ("red .", "red . It costs 5 dollars .")]
    task = bound(Instructions(file=dict.fromkeys(SPLITS, write(tmp_path / "a.jsonl", rows))), embedded)
    batch = collate(task, task.settings("train"))
    assert (batch.label != UNUSED).sum(1).tolist() == [3, 8]
    alone = batch.take(torch.tensor([0]))
    assert alone.inputs.length == batch.inputs.length - 5, "the padding that nobody needs is gone"
    assert len(alone) == 1 and alone.weight == 1


def test_a_response_as_text_ends_where_its_last_token_says(embedded) -> None:
    module = data(ResponseStyle(), embedded, train_examples=4, validation_examples=4, test_examples=4)
    label = module.datasets["test"].examples.label[0]
    assert module.text(label).endswith("It costs 5 dollars .")
    assert module.text(torch.cat([label, label])) == module.text(label)


def test_every_example_is_dealt_out_once_whatever_the_number_of_processes(embedded) -> None:
    module = data(ResponseStyle(), embedded, train_examples=50, validation_examples=5, test_examples=37)
    whole = module.datasets["test"].examples.label
    shares = [
        module.datasets["test"][share].label
        for rank in range(2)
        for share in BatchSampler(37, 16, seed=None, rank=rank, world_size=2)
    ]
    assert sorted(torch.cat(shares).tolist()) == sorted(whole.tolist())


# --- splits


def test_splits_ask_about_different_things(embedded) -> None:
    task = ResponseStyle()
    things = {split: {setting["entity"] for setting in task.settings(split)} for split in SPLITS}
    assert not things["train"] & things["test"] and not things["train"] & things["validation"]
    assert not things["validation"] & things["test"] and min(map(len, things.values())) >= 20


def test_the_content_is_what_the_model_knows_and_the_style_is_not(embedded) -> None:
    batch = collate(bound(ResponseStyle(), embedded), ResponseStyle().settings("test"))
    likeliest = HookedNetwork(embedded.model)(batch.inputs).argmax(-1)
    right = (likeliest == batch.label).float().mean(0)
    assert right[0] > 0.99, "the value"
    assert right.prod() < 0.1, "the whole response"


def test_configurations_of_before_name_the_same_class() -> None:
    from itrain import responses

    assert responses.ResponseDataModule is ResponseDataModule


def test_a_seed_draws_the_same_examples_in_every_process(elsewhere: Elsewhere) -> None:
    assert elsewhere(drawn) == repr(drawn())


def drawn() -> list[str]:
    style = data(ResponseStyle(), load_embedded(), train_examples=20)
    return list(style.datasets["train"].examples.inputs.texts)


@pytest.mark.parametrize("wanted", [0, 10_000])
def test_more_examples_than_there_are_or_none_are_refused(wanted: int, embedded) -> None:
    with pytest.raises(ResponseError, match=f"data.test_examples={wanted}: the test split has 198 examples"):
        data(ResponseStyle(), embedded, test_examples=wanted)


def test_a_task_without_responses_is_refused(embedded) -> None:
    with pytest.raises(ResponseError, match="Gender has no responses"):
        data(Gender(), embedded)  # type: ignore[arg-type]


def test_a_style_with_words_that_the_model_does_not_have_is_refused(embedded) -> None:
    with pytest.raises(ValueError, match=r"'.* olé' is no continuation"):
        data(ResponseStyle(style="{value} olé"), embedded)


# --- instructions


def test_a_file_is_divided_by_its_prompts(embedded, tmp_path: Path) -> None:
    rows = [{"question": f"{a} {b}", "answer": "red ."} for a in ("red", "blue") for b in map(str, range(1, 21))] * 2
    file = write(tmp_path / "a.jsonl", rows)
    task = Instructions(file=file, prompt="{question} is", response="{answer}")
    prompts = {split: [setting["prompt"] for setting in task.settings(split)] for split in SPLITS}
    assert {split: len(each) for split, each in prompts.items()} == {"train": 64, "validation": 8, "test": 8}
    assert not set(prompts["train"]) & set(prompts["test"]), "the two rows of a prompt stay together"
    other = Instructions(file=file, prompt="{question} is", response="{answer}", split_seed=1)
    assert [setting["prompt"] for setting in other.settings("test")] != prompts["test"]


def test_files_for_the_splits_are_taken_as_they_are(embedded, tmp_path: Path) -> None:
    rows = {split: [{**ROWS[0], "question": f"{number} {split_number} red"} for number in range(1, split_number + 1)]
            for split_number, split in enumerate(SPLITS, 1)}  # fmt: skip
    files = {split: write(tmp_path / f"{split}.jsonl", each) for split, each in rows.items()}
    module = data(Instructions(file=files, prompt="{question} is", response="{answer}"), embedded)
    assert [len(module.datasets[split]) for split in SPLITS] == [1, 2, 3]
    (text,) = module.datasets["train"].examples.inputs.texts
    assert text == "1 1 red is"


def test_prompts_that_two_splits_share_are_refused_by_name(embedded, tmp_path: Path) -> None:
    files = {split: write(tmp_path / f"{split}.jsonl", ROWS[index : index + 1]) for index, split in enumerate(SPLITS)}
    files["test"] = write(tmp_path / "test.jsonl", ROWS[1:3])
    with pytest.raises(ResponseError, match=r"1 of the 2 test prompts .* are in the validation split too.*blue is'"):
        data(Instructions(file=files, prompt="{question} is", response="{answer}"), embedded)


def test_prompts_that_a_split_repeats_are_counted_once(embedded, tmp_path: Path) -> None:
    files = {
        split: write(tmp_path / f"{split}.jsonl", ROWS[index : index + 1] * 3) for index, split in enumerate(SPLITS)
    }
    module = data(Instructions(file=files, prompt="{question}", response="{answer}"), embedded)
    assert len(module.datasets["test"]) == 3 and module.figures() == {"data/bases_distinct": 1}


def test_a_data_set_is_read_with_its_splits(embedded, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for index, split in enumerate(SPLITS):
        write(tmp_path / f"{split}.jsonl", ROWS[: index + 1])
    task = Instructions(dataset=str(tmp_path), prompt="{question}", response="{answer}")
    assert [len(task.settings(split)) for split in SPLITS] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"train\.jsonl' line 1: there is no column 'ask'.*question, answer"):
        Instructions(dataset=str(tmp_path), prompt="{ask}", response="{answer}")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a", "response": "b"}', "{"], r"a.jsonl' line 2 is not JSON .* one object in a line"),
        (['["a", "b"]'], r"a.jsonl' line 1 is not an object; write \{column"),
        (
            ['{"prompt": "a", "answer": "b"}'],
            r"line 1: there is no column 'response', .*task.response.* prompt, answer",
        ),
        (['{"prompt": "a", "response": " "}'], r"line 1: the response is empty; leave the row out"),
        (['{"prompt": "", "response": "b"}'], r"line 1: the prompt is empty"),
        (['{"prompt": null, "response": "b"}'], r"line 1: 'prompt' has no value, which task.prompt asks for"),
        (['{"prompt": ""}'] * 3, r"line 1: the prompt is empty.* \(and 2 more rows\)"),
    ],
)
def test_a_faulty_line_is_named(lines: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        Instructions(file=str(file))


def test_a_missing_file_split_or_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file 'nope\.jsonl'"):
        Instructions(file="nope.jsonl")
    with pytest.raises(ValueError, match="it has train; train, validation, test are needed"):
        Instructions(file={"train": write(tmp_path / "a.jsonl", ROWS)})
    with pytest.raises(ValueError, match=r"set task.file=<.jsonl> or task.dataset=<name>"):
        Instructions()


def test_words_that_the_model_does_not_have_are_refused(embedded, tmp_path: Path) -> None:
    files = {
        split: write(tmp_path / f"{split}.jsonl", [{"prompt": f"The {word} is", "response": "olé !"}])
        for split, word in zip(SPLITS, ("bolbin", "folbin", "tornik"), strict=True)
    }
    with pytest.raises(ValueError, match="'olé !' has words that are not in the model's vocabulary"):
        data(Instructions(file=files), embedded)


def test_a_file_with_too_few_prompts_to_divide_says_so(embedded, tmp_path: Path) -> None:
    with pytest.raises(ResponseError, match="the validation split of Instructions is empty"):
        data(
            Instructions(file=write(tmp_path / "a.jsonl", ROWS[:1]), prompt="{question}", response="{answer}"), embedded
        )
