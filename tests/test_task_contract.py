"""A task that breaks its contract is refused before anything runs, in a line with its class, place and remedy."""

from __future__ import annotations

import random as global_random
from collections.abc import Sequence
from itertools import count
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from itrain.causal_model import CausalModel, Setting
from itrain.data import CounterfactualDataModule, PairError, collate
from itrain.data.responses import ResponseDataModule
from itrain.inputs import ModelInputs
from itrain.metrics import RULES, UNUSED, is_right
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.tasks import TaskError
from itrain.tasks.base import Pair, Split, Task
from itrain.tasks.response_style import ResponseStyle
from tests.test_interchange import Spelled

LETTERS = range(8)
COUNTED = count()


class Alike(Task):
    """Are two letters equal? Right in every way, but blind to the split."""

    variables: Any = ("same",)
    outputs: Any = (False, True)
    causal_model = CausalModel(
        inputs={"w": LETTERS, "x": LETTERS, "y": LETTERS},
        mechanisms={"same": lambda w, x: w == x, "answer": lambda same: same},
        output="answer",
    )

    def values(self, variable: str) -> Any:
        return (False, True)

    def label(self, output: Any) -> Any:
        return int(output)

    def sample(self, random: Random, split: Split) -> Any:
        base, source = (self.setting(random) for _ in range(2))
        return Pair(base=base, sources={"same": source})

    def setting(self, random: Random) -> dict[str, Any]:
        return self.causal_model.sample(random)

    def inputs(self, settings: Sequence[Setting]) -> Any:
        return ModelInputs(arguments={"letters": torch.tensor([[s["w"], s["x"], s["y"]] for s in settings]).float()})


class Told(nn.Module):
    """Answers right; a weight makes it a model."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.scale, self.classes, self.read = nn.Parameter(torch.ones(())), classes, nn.Identity()

    def forward(self, letters: Tensor) -> Tensor:
        letters = self.read(letters)
        same = (letters[:, 0] == letters[:, 1]).long()
        return self.scale * nn.functional.one_hot(same, self.classes)


def data(task: Any, **settings: Any) -> CounterfactualDataModule:
    sizes = {"train_pairs": 64, "validation_pairs": 16, "test_pairs": 32}
    made = CounterfactualDataModule(task=task, network=HookedNetwork(Told()), **{**sizes, **settings})
    made.setup("fit")
    return made


def model(**changes: Any) -> CausalModel:
    mechanisms = {"same": lambda w, x: w == x, "answer": lambda same: same}
    return CausalModel(inputs=dict.fromkeys("wxy", LETTERS), mechanisms={**mechanisms, **changes}, output="answer")


def test_a_task_that_keeps_its_contract_is_taken() -> None:
    assert len(data(Alike()).datasets["test"]) == 32


def pair(self: Alike, random: Random, **changes: Any) -> Pair:
    made = {"base": self.setting(random), "sources": {"same": self.setting(random)}}
    return Pair(**{**made, **changes})


BROKEN = {
    "variables a string": ({"variables": "same"}, r"variables is the text 'same'; write variables = \('same',\)"),
    "variables unknown": ({"variables": ("sane",)}, "variables has 'sane', .*did you mean 'same'"),
    "variables none": ({"variables": ()}, r"variables is \(\); name the variables"),
    "variables twice": ({"variables": ("same", "same")}, "variables has 'same' twice"),
    "control unknown": ({"control": "ww"}, "control is 'ww', which its causal model does not have, did you mean 'w'"),
    "no causal model": ({"causal_model": None}, "has no causal_model"),
    "outputs lack a value": ({"outputs": (False, 2)}, "outputs lacks True, which its causal model gives for a pair"),
    "outputs twice": ({"outputs": (False, True, True)}, "outputs has True twice; list two or more, each once"),
    "one output": ({"outputs": (True,)}, "outputs has 1 value; list two or more"),
    "outputs a string": ({"outputs": "yes"}, "outputs is a str; list them"),
    "outputs a set": ({"outputs": {False, True}}, "outputs is a set; list them"),
    "outputs without hash": ({"outputs": ([0], [1])}, r"the output \[0\] has no hash"),
    "one label": ({"label": lambda self, output: 1}, "the outputs False and True have one label, 1"),
    "negative label": ({"label": lambda self, output: int(output) - 1}, r"label\(False\) is -1; .* count from 0"),
    "sentinel as label": ({"label": lambda self, output: (3, UNUSED)[output]}, r"label\(True\) is -100"),
    "label is text": ({"label": lambda self, output: str(output)}, r"label\(False\) is 'False'; return a class"),
    "label is none": ({"label": lambda self, output: None}, r"label\(False\) is None"),
    "label raises": ({"label": lambda self, output: {}["n"]}, r"label\(False\) raises KeyError: 'n'"),
    "label too large": ({"label": lambda self, output: 5 * output}, "the largest label is 5, and the model gives 2"),
    "outputs begin each other": (
        {"label": lambda self, output: [7, 8] if output else [7]},
        "the tokens of the output False begin those of True.*end both with a word that follows",
    ),
    "values differ": ({"values": lambda self, variable: [False, True, next(COUNTED)]}, "values.* differs between two"),
    "values lack one": ({"values": lambda self, variable: [False]}, r"values\('same'\) lacks True, which the .* of a"),
    "values a set": ({"values": lambda self, variable: {False, True}}, "is a set; list the values in a fixed order"),
    "values not listed": ({"values": Task.values}, "does not list the values of 'same'"),
    "sample a tuple": ({"sample": lambda self, random, split: ({}, {})}, r"'train'\) returns a tuple; return itrain"),
    "source unknown": (
        {"sample": lambda self, random, split: pair(self, random, sources={"sam": self.setting(random)})},
        "has a source of 'sam', which its causal model does not have, did you mean 'same'",
    ),
    "sources a setting": (
        {"sample": lambda self, random, split: pair(self, random, sources=[self.setting(random)])},
        "the sources of .* are a list; give one for each variable",
    ),
    "input missing": (
        {"sample": lambda self, random, split: pair(self, random, base={"w": 1, "x": 1})},
        r"the base of sample\(random, 'train'\) has no value for the input 'y'",
    ),
    "input unknown": (
        {"sample": lambda self, random, split: pair(self, random, base={"w": 1, "x": 1, "y": 1, "z": 2})},
        "the base of .* has 'z', which its causal model does not have",
    ),
    "input is derived": (
        {"sample": lambda self, random, split: pair(self, random, base={"w": 1, "x": 1, "y": 1, "same": False})},
        "says 'same' is False, and its causal model gives True; leave it out",
    ),
    "setting a list": (
        {"sample": lambda self, random, split: pair(self, random, base=[1, 1, 1])},
        "the base of .* is a list; give a value for each input",
    ),
    "sample raises": ({"sample": lambda self, random, split: {}["n"]}, r"sample\(random, 'train'\) raises KeyError"),
    "random ignored": (
        {"setting": lambda self, random: self.causal_model.sample(global_random)},
        r"'train'\) gives other pairs where random has the same state",
    ),
    "random constant": (
        {"setting": lambda self, random: self.causal_model.sample(Random(0))},
        "gives the same pair each time; draw its settings from random",
    ),
    "mechanism raises": (
        {"causal_model": model(same=lambda w: {}[w])},
        "the mechanism of 'same' raises KeyError: .*w=",
    ),
    "mechanism random": (
        {"causal_model": model(same=lambda w, x: global_random.random() < 0.5)},
        "the mechanism of 'same' gives (True|False), then (True|False), for the",
    ),
    "mechanism gives tensors": (
        {"causal_model": model(same=lambda w, x: torch.tensor(w == x))},
        r"outputs lacks tensor\((True|False)\)",
    ),
    "isolates and changes": (
        {"sample": lambda self, random, split: pair(self, random, isolates=True)},
        "a pair of 'train' isolates, and its label changes to",
    ),
    "inputs a tensor": (
        {"inputs": lambda self, settings: torch.zeros(len(settings))},
        "returns a Tensor; return itrain",
    ),
    "inputs too few": (
        {"inputs": lambda self, settings: ModelInputs(arguments={"letters": torch.zeros(1, 3)})},
        r"gives 'letters' as \(1, 3\) for 16 settings; give a tensor with a row for each",
    ),
    "inputs random": (
        {"inputs": lambda self, settings: ModelInputs(arguments={"letters": torch.rand(len(settings), 3)})},
        "gives other values of 'letters' at a second call",
    ),
    "inputs raise": ({"inputs": lambda self, settings: settings["n"]}, r"inputs\(settings\) raises TypeError"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_contract_is_refused_by_name(fault: str) -> None:
    changes, message = BROKEN[fault]
    with pytest.raises(TaskError, match=message) as refused:
        data(type("Broken", (Alike,), changes)())
    assert "\n" not in str(refused.value) and "Broken" in str(refused.value)


def test_a_class_in_place_of_a_task_is_refused() -> None:
    with pytest.raises(TaskError, match=r"this is the class Alike; make one: Alike\(\)"):
        data(Alike)
    with pytest.raises(TaskError, match="ResponseStyle has responses and no pairs; use it with data=responses"):
        data(ResponseStyle())


def test_numbers_of_other_libraries_are_labels() -> None:
    import numpy

    for number in (numpy.int64, bool):
        made = data(type("Counted", (Alike,), {"label": lambda self, output, number=number: number(output)})())
        assert made.datasets["test"].examples.counterfactual_label.dtype == torch.long


def test_what_the_samples_do_not_show_is_refused_when_pairs_are_collated() -> None:
    rare = type("Rare", (Alike,), {"values": lambda self, variable: [False]})()
    with pytest.raises(TaskError, match=r"values\('same'\) lacks True, which a pair has"):
        collate(rare, [Pair(base={"w": 1, "x": 1, "y": 1}, sources={"same": {"w": 1, "x": 2, "y": 1}})])
    alone = type("Alone", (Alike,), {"outputs": (True,)})()
    with pytest.raises(TaskError, match="outputs has no other value than True"):
        collate(alone, [Pair(base={"w": 1, "x": 1, "y": 1}, sources={"same": {"w": 2, "x": 2, "y": 1}})])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": lambda self, split: iter([])}, r"settings\('train'\) gives a list_iterator; return a list"),
        ({"settings": lambda self, split: [{"template": "a", "entity": next(COUNTED)}]}, "differs between two calls"),
        ({"settings": lambda self, split: [{"template": "a"}]}, "has no value for the input 'entity'"),
        ({"settings": lambda self, split: [("a", "b")]}, "is a tuple; give a value for each input by name"),
        ({"settings": lambda self, split: {}[split]}, r"settings\('train'\) raises KeyError"),
    ],
)
def test_a_task_with_responses_is_checked_too(changes: dict[str, Any], message: str) -> None:
    task = type("Broken", (ResponseStyle,), changes)()
    base_model = load_embedded()
    task.bind(base_model.tokenizer)
    with pytest.raises(TaskError, match=message):
        ResponseDataModule(task=task, network=HookedNetwork(base_model.model))


def test_answers_that_depend_on_the_prompt_s_end_are_refused() -> None:
    from tests.test_text import Saw, byte_level

    class Ends(Saw):
        def template(self, setting: Setting) -> str:
            return "{name} saw {other}" + ("\n" if setting["n"] else "")

    task = Ends(name=["Ada", "Bob"], n=[0, 1])
    task.bind(byte_level())
    with pytest.raises(TaskError, match=r"the answer '.*' is .* after .* as tokens; end all templates alike"):
        data(task)


# --- answers that begin each other, and logits that are no numbers


def test_an_answer_that_begins_another_is_refused() -> None:
    class Begun(Spelled):
        outputs = ("he was", "he")
        causal_model = CausalModel(
            inputs=Spelled.causal_model.inputs,
            mechanisms={
                "gender": lambda name: "male" if name in ("John", "James") else "female",
                "answer": lambda gender: "he was" if gender == "male" else "he",
            },
            output="answer",
        )

    task, base_model = Begun(), load_embedded()
    task.bind(base_model.tokenizer)
    with pytest.raises(
        TaskError, match=r"the tokens of the output 'he' begin those of 'he was', .*'he .' and 'he was .'"
    ):
        CounterfactualDataModule(task=task, network=HookedNetwork(base_model.model))


def test_no_rule_reads_a_logit_at_a_place_without_token() -> None:
    logits = torch.zeros(2, 2, 200)
    logits[:, 0, 1] = logits[:, 1, 100] = 1.0  # index -100 of 200 logits is 100
    one, twelve = torch.tensor([[1, UNUSED], [1, 2]]), torch.tensor([[1, 2], [1, UNUSED]])
    assert is_right(logits, one, twelve, "pairwise").tolist() == [False, False], "they cannot be told apart"
    logits[1, 0, 3] = 2.0
    assert is_right(logits, one, torch.tensor([[3, 2], [3, 2]]), "pairwise").tolist() == [True, False]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dead", [torch.nan, -torch.inf])
def test_logits_that_are_no_numbers_are_never_right(rule: Any, dead: float) -> None:
    label, contrast = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 0])
    assert not is_right(torch.full((3, 4), dead), label, contrast, rule).any()
    some = torch.zeros(3, 4).index_fill(1, torch.tensor([3]), torch.nan)
    assert not is_right(some, label, contrast, "argmax").any()
    assert not is_right(
        torch.full((3, 2, 4), dead), label[:, None].expand(3, 2), contrast[:, None].expand(3, 2), rule
    ).any()


def test_probes_of_activations_that_are_no_numbers_are_never_right() -> None:
    from itrain.training.probing import ProbeAccuracy

    accuracy = ProbeAccuracy(tasks=1, strengths=1, num_classes=3)
    accuracy.update(torch.full((1, 1, 4, 3), torch.nan), torch.zeros(1, 4, dtype=torch.long))
    assert accuracy.compute()[0].item() == 0


def test_a_dead_model_answers_nothing_right() -> None:
    network = HookedNetwork(Told())
    with torch.no_grad():
        network.model.scale.fill_(torch.nan)
    with pytest.raises(PairError, match=r"no train pair is left.*accuracy 0.00"):
        CounterfactualDataModule(task=Alike(), network=network, train_pairs=8).setup("fit")
