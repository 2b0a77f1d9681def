"""MIB's causal-variable track: its rows' labels, positions and splits, and Alpaca's price tagging."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from random import Random

import lightning
import pandas
import pytest

from itrain.data import CounterfactualDataModule
from itrain.interventions.controls import FullVector
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.results.columns import IIA, LAYER, POSITION
from itrain.results.layers import mean_over_layers
from itrain.tasks import TaskError
from itrain.tasks.mib import MIBAddition, MIBIndirectObject, MIBMultipleChoice, MIBRavel
from itrain.tasks.price_tagging import PriceTagging
from itrain.tiny_world.questions import indirect_object_item
from itrain.training.alignment import AlignmentSearch

SPLITS = ("train", "validation", "test")


def written(folder: Path, **splits: list[dict]) -> str:
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def question(noun: str, colour: str, labels: str, texts: list[str]) -> dict:
    lines = [f"Question: The {noun} is {colour}. What color is the {noun}?"]
    lines += [f"{label}. {text}" for label, text in zip(labels, texts, strict=True)]
    choices = {"label": list(labels), "text": texts}
    return {"prompt": "\n".join([*lines, "Answer:"]), "choices": choices, "answerKey": texts.index(colour)}


def choice(noun: str) -> dict:
    return {
        **question(noun, "blue", "ABCD", ["red", "blue", "gray", "pink"]),
        "question": f"The {noun} is blue. What color is the {noun}?",
        "answerPosition_counterfactual": question(noun, "blue", "ABCD", ["red", "pink", "gray", "blue"]),
        "randomLetter_counterfactual": question(noun, "blue", "QRST", ["red", "blue", "gray", "pink"]),
        "answerPosition_randomLetter_counterfactual": question(noun, "blue", "QRST", ["blue", "red", "gray", "pink"]),
    }


def addition(one: int, two: int) -> dict:
    asked = {"prompt": f"Q: How much is {one} plus {two}? A: ", "operand1": one, "operand2": two, "label": one + two}
    return {**asked, "operator": "+", "num_digit": 2, "label": str(one + two)} | {
        f"{kind}_counterfactual": {**asked, "prompt": f"The sum of {a} and {b} is ", "operand1": a, "operand2": b}
        | {"label": a + b}
        for kind, (a, b) in {"random": (31, 42), "ones_carry": (one - one % 10 + 9, two - two % 10 + 8)}.items()
    }


def city(entity: str, attribute: str, **facts: str) -> dict:
    template = {"Country": "%s is in the country of", "Continent": "%s is on"}[attribute]
    return {"template": template, "prompt": template % entity, "entity": entity, "attribute": attribute, **facts}


def ravel_row(attribute: str) -> dict:
    paris = {"Continent": "Europe", "Country": "France", "Language": "French"}
    lima = {"Continent": "America", "Country": "Peru", "Language": "Spanish"}
    row = city("Paris", attribute, **paris)
    nothing = {"template": "%s lies in a valley .", "prompt": "Lima lies in a valley .", "entity": "Lima"}
    return row | {
        "attribute_counterfactual": city("Lima", "Country", **lima),
        "wikipedia_counterfactual": {**nothing, "attribute": "wikipedia", **lima},
    }


# --- labels are the causal model's, worked out by hand


def test_multiple_choice_is_labelled_by_place_and_by_letter(tmp_path: Path) -> None:
    folder = written(tmp_path, **{split: [choice(f"box{number}")] for number, split in enumerate(SPLITS)})
    task = MIBMultipleChoice(source=folder, variables=["answer_pointer", "answer"])
    outputs = [(next(iter(pair.sources)), task.counterfactual(pair)) for pair in task.pairs("train")]
    assert outputs == [
        ("answer_pointer", "D"),  # the right choice moves to the last place
        ("answer", "D"),
        ("answer_pointer", "B"),  # new letters, the same place
        ("answer", "R"),
        ("answer_pointer", "A"),  # the first place; the source's letter there is Q
        ("answer", "Q"),
    ]
    base = task.pairs("train")[0].base
    text, spans = task._render(base)
    assert text[slice(*spans["correct_symbol"])] == "B" and text[: spans["correct_symbol"][0]].endswith("\n")
    assert task.values("answer_pointer") == [0, 1, 3]


def test_rows_of_arc_with_five_choices_are_left_out(tmp_path: Path) -> None:
    five = choice("box") | {"choices": {"label": list("ABCDE"), "text": list("vwxyz")}}
    task = MIBMultipleChoice(
        source=written(tmp_path, train=[five, choice("a")], validation=[choice("b")], test=[choice("c")])
    )
    assert len(task.pairs("train")) == 3


def test_addition_swaps_the_carry_alone(tmp_path: Path) -> None:
    folder = written(tmp_path, train=[addition(23, 45)], validation=[addition(11, 22)], test=[addition(50, 14)])
    task = MIBAddition(source=folder)
    kept, carried = task.pairs("train")
    assert task.counterfactual(kept) == "68"  # neither carries
    assert task.counterfactual(carried) == "78"  # 9 + 8 carries, the ones of the base stay
    _, spans = task._render(carried.base)
    assert carried.base["prompt"][slice(*spans["operand2"])] == "45"


def test_indirect_objects_follow_the_linear_model_of_the_logits(tmp_path: Path) -> None:
    def asked(first: str, second: str, third: str) -> dict:
        answer = second if third == first else first
        return {
            "prompt": f"{first} and {second} went out , {third} gave a cup to",
            "choices": [answer, third],
            "answerKey": 0,
        }

    row = asked("Ann", "Bob", "Ann") | {
        "s1_io_flip_counterfactual": asked("Bob", "Ann", "Ann"),
        "s2_io_flip_counterfactual": asked("Ann", "Bob", "Bob"),
        "s1_ioi_flip_s2_ioi_flip_counterfactual": asked("Bob", "Ann", "Bob"),
    }
    task = MIBIndirectObject(source=written(tmp_path, train=[row], validation=[row], test=[row]))
    found = {}
    for pair, kind in zip(task.pairs("train"), [kind for kind in task.types for _ in task.variables], strict=True):
        run = task.causal_model.interchange(pair.base, pair.sources)
        found[kind, next(iter(pair.sources))] = (run["answer"], round(run["logit_diff"], 3))
    assert found == {
        ("s1_io_flip", "output_position"): ("Ann", -1.31),  # 0.295 + 0.63 - 2.235
        ("s1_io_flip", "output_token"): ("Bob", 3.16),
        ("s2_io_flip", "output_position"): ("Ann", -1.31),
        ("s2_io_flip", "output_token"): ("Bob", 1.9),  # 0.295 - 0.63 + 2.235: the position wins
        ("s1_ioi_flip_s2_ioi_flip", "output_position"): ("Bob", 3.16),
        ("s1_ioi_flip_s2_ioi_flip", "output_token"): ("Bob", 1.9),
    }
    differences = [task.difference(pair) for pair in task.pairs("train")]
    assert [round(each.value, 3) for each in differences] == [difference for _, difference in found.values()]
    assert {(each.more, each.less) for each in differences} == {("Bob", "Ann")}


def test_ravel_causes_what_is_asked_and_isolates_the_rest(tmp_path: Path) -> None:
    rows = [ravel_row("Country"), ravel_row("Continent")]
    task = MIBRavel(source=written(tmp_path, train=rows, val=rows, test=rows))
    found = [(next(iter(pair.sources)), pair.isolates, task.counterfactual(pair)) for pair in task.pairs("validation")]
    asked = [("Continent", True, "France"), ("Country", False, "Peru"), ("Language", True, "France")]
    other = [("Continent", False, "America"), ("Country", True, "Europe"), ("Language", True, "Europe")]
    assert found == [*asked, *asked, *other, *other]  # from a prompt that asks, and from one that does not
    last = task.pairs("validation")[3]
    assert task.causal_model.run(last.sources["Continent"])["answer"] is None
    assert task.question(last.base) == ("city", "Country", "%s is in the country of")


# --- splits and wrong rows


def test_the_private_test_takes_the_place_of_the_public_one(tmp_path: Path) -> None:
    public = written(tmp_path / "public", **{split: [choice(split)] for split in SPLITS})
    private = written(tmp_path / "private", test=[choice("secret")])
    task = MIBMultipleChoice(source=public, private_test=private)
    prompts = {split: {pair.base["prompt"] for pair in task.pairs(split)} for split in SPLITS}
    assert all("secret" in prompt for prompt in prompts["test"]) and "secret" not in str(prompts["train"])
    assert not prompts["train"] & prompts["validation"] and not prompts["train"] & prompts["test"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answerKey": 7},
            r"train.jsonl' line 2: the columns cannot be read: answerKey is '7', and there are 4 choices",
        ),
        ({"choices": None}, r"line 2, column 'choices': 'None' is a NoneType; write an object"),
        ({"prompt": "Q: B is right"}, "no line of the prompt begins with the right choice, 'B'"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, change: dict, message: str) -> None:
    rows = [choice("a"), choice("b") | change]
    folder = written(tmp_path, train=rows, validation=[choice("c")], test=[choice("d")])
    with pytest.raises(TaskError, match=message):
        MIBMultipleChoice(source=folder)


def test_a_missing_type_of_counterfactuals_or_split_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path, **{split: [choice(split)] for split in SPLITS})
    with pytest.raises(TaskError, match="no column 'randomLeter_counterfactual', did you mean 'randomLetter'"):
        MIBMultipleChoice(source=folder, counterfactuals=["randomLeter"])
    with pytest.raises(TaskError, match="has no test rows"):
        MIBMultipleChoice(source=written(tmp_path / "part", train=[choice("a")], validation=[choice("b")]))
    with pytest.raises(TaskError, match=r"set task\.source"):
        MIBMultipleChoice()


# --- the track's aggregation


def test_the_mean_over_layers_takes_the_best_position_of_each() -> None:
    rows = [(0, "a", 0, 0.2), (0, "a", 1, 0.4), (0, "b", 0, 0.1), (1, "a", 0, 0.5), (1, "b", 0, 0.9), (1, "b", 1, 0.7)]
    table = pandas.DataFrame(rows, columns=[LAYER, POSITION, "seed", IIA])
    assert mean_over_layers(table, IIA) == pytest.approx((0.3 + 0.8) / 2)
    assert mean_over_layers(table[table[LAYER] == 1], IIA) is None


# --- on the embedded model, and in Alpaca's words


def test_a_fit_on_rows_of_indirect_objects_finds_the_position_at_the_last_token(tmp_path: Path) -> None:
    """The whole last token of the last layer holds the answer, so its interchange gives the source's name."""
    random, splits = Random(0), {}
    for split, count in zip(SPLITS, (48, 16, 32), strict=True):
        rows = []
        for _ in range(count):
            item = indirect_object_item(random)
            flipped = item.prompt.rsplit(item.alternative, 1)
            asked = {"prompt": item.prompt, "choices": [item.answer, item.alternative], "answerKey": 0}
            other = {"prompt": item.answer.join(flipped), "choices": [item.alternative, item.answer], "answerKey": 0}
            rows.append(asked | {"s2_io_flip_counterfactual": other})
        splits[split] = rows
    task = MIBIndirectObject(
        source=written(tmp_path, **splits), counterfactuals=["s2_io_flip"], variables=["output_position"]
    )
    embedded = load_embedded()
    task.bind(embedded.tokenizer)
    network = HookedNetwork(embedded.model)
    data = CounterfactualDataModule(task=task, network=network, keep="argmax")
    data.setup("fit")
    assert data.model_accuracy["test"] > 0.9
    assert data.datasets["test"].examples.changes.all()
    module = AlignmentSearch(network=network, sites=["layer5.block_output@last"], intervention=partial(FullVector))
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    (figures,) = trainer.test(module, datamodule=data, verbose=False)
    assert figures["test/iia_argmax"] > 0.95


def test_alpacas_questions_have_its_text_and_bounds() -> None:
    task = PriceTagging(prompts="alpaca", variable="below")
    random, seen = Random(0), {}
    for split in SPLITS:
        pairs = [task.sample(random, split) for _ in range(300)]
        seen[split] = {tuple(setting.values()) for pair in pairs for setting in pair.settings()}
        changed = [task.counterfactual(pair) != task.causal_model.run(pair.base)["answer"] for pair in pairs]
        assert 0.4 < sum(changed) / len(changed) < 0.6
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    for low, high, price in seen["train"]:
        assert 2.5 <= round(float(high) - float(low), 2) <= 7.5 and float(low) >= 0.05 and float(high) <= 9.95
        assert 0.01 <= float(price) <= 9.99 and len(price) == 4
    text, spans = task._render(task.sample(random, "train").base)
    assert text.endswith("dollars\n\n### Response:\n") and text[: spans["low"][0]].endswith("costs between ")
    with pytest.raises(ValueError, match="prompts: 'gpt' is none of tiny_world, alpaca"):
        PriceTagging(prompts="gpt")  # type: ignore[arg-type]
