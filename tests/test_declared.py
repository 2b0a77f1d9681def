"""Tasks that are data alone: they say what the classes say, keep the contract of tasks, and are refused by key."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from itrain.tasks.base import Pair, Split, Task
from itrain.tasks.contract import check_task
from itrain.tasks.declaration import DeclarationError
from itrain.tasks.declared import DeclaredTask
from itrain.tasks.entity_attributes import EntityAttributes
from itrain.tasks.gender import Gender
from itrain.tasks.price_tagging import PriceTagging
from tests import test_data
from tests.elsewhere import Elsewhere
from tests.test_data import SPLITS

FOLDER = Path(__file__).parent / "declared"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SUM: dict[str, Any] = {
    "inputs": {"a": "0..9", "b": "0..9"},
    "mechanisms": {"carry": "a + b > 9", "ones": "(a + b) % 10", "sum": "10 * carry + ones"},
    "template": "{a} + {b} =",
    "output": "sum",
    "variables": "carry",
    "split": None,
}
"""Addition with carry."""


def node(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def declared(name: str, **changes: Any) -> DeclaredTask:
    return DeclaredTask(**{**node(name), **changes})


def sums(**changes: Any) -> DeclaredTask:
    return DeclaredTask(**{**SUM, **changes})


def sampled(task: Task, split: Split = "train", count: int = 300) -> list[Pair]:
    random = Random(f"test {split}")
    return [task.sample(random, split) for _ in range(count)]


# --- the contract of a task, as for every other


@pytest.mark.parametrize(
    "contract",
    [
        test_data.test_pairs_have_sources_for_the_variables_and_labels_of_the_causal_model,
        test_data.test_outputs_are_told_apart_and_variables_have_values,
        test_data.test_some_pairs_change_the_label_and_others_do_not,
    ],
    ids=lambda test: test.__name__,
)
@pytest.mark.parametrize("name", FILES)
def test_a_declared_task_keeps_the_contract_of_tasks(name: str, contract: Any, embedded: Any) -> None:
    task: Any = partial(DeclaredTask, **node(name))
    contract(task, embedded)


@pytest.mark.parametrize("name", FILES)
def test_a_declared_task_is_taken_by_the_check_before_a_run(name: str, embedded: Any) -> None:
    task = declared(name)
    task.bind(embedded.tokenizer)
    check_task(task)


def test_pairs_are_the_same_in_every_process(elsewhere: Elsewhere) -> None:
    here = some_pairs()
    assert elsewhere(some_pairs) == repr(here) and len(here[1]) == 40


def some_pairs() -> tuple[list[Any], list[Pair]]:
    task, random = declared("attributes"), Random(0)
    return list(task.outputs), [task.sample(random, split) for split in ("train", "test") for _ in range(20)]


# --- parity: the same settings and pairs have the same labels as those of the classes


@pytest.mark.parametrize(
    ("name", "other"),
    [("gender", Gender()), ("price", PriceTagging()), ("attributes", EntityAttributes())],
    ids=["gender", "price", "attributes"],
)
def test_labels_and_texts_are_those_of_the_class(name: str, other: Task, embedded: Any) -> None:
    task = declared(name)
    for each in (task, other):
        each.bind(embedded.tokenizer)
    assert set(task.outputs) == set(other.outputs) and task.variables == other.variables
    for pair in (pair for split in SPLITS for pair in sampled(other, split, 60)):
        assert task.counterfactual(pair) == other.counterfactual(pair)
        assert task.identity(pair.base) == other.identity(pair.base)
        run, expected = task.causal_model.run(pair.base), other.causal_model.run(pair.base)
        assert {key: run[key] for key in expected} == expected
    assert task.label(task.outputs[0]) == other.label(task.outputs[0])


def test_pairs_are_of_the_kinds_that_the_classes_sample() -> None:
    for name, other in (("price", PriceTagging()), ("attributes", EntityAttributes())):
        counts = [Counter(_kind(each, pair) for pair in sampled(each, count=600)) for each in (declared(name), other)]
        for kind in counts[0] | counts[1]:
            assert abs(counts[0][kind] - counts[1][kind]) < 100, (name, kind, counts)


def _kind(task: Task, pair: Pair) -> tuple[Any, ...]:
    before = task.causal_model.run(pair.base)[task.causal_model.output]
    answer = before if len(task.outputs) == 2 else None
    return answer, task.counterfactual(pair) != before, pair.isolates


def test_several_variables_are_interchanged_alone_and_together() -> None:
    pairs = sampled(declared("equality"))
    assert set(map(frozenset, (pair.sources for pair in pairs))) == {
        frozenset(["left"]),
        frozenset(["right"]),
        frozenset(["left", "right"]),
    }
    equal = sum(pair.base["w"] == pair.base["x"] for pair in pairs) / len(pairs)
    assert 0.4 < equal < 0.65, "half of them are made equal, and one in twenty of the others is"


# --- shares, splits and conditions


@pytest.mark.parametrize(("changing", "isolating"), [(0.0, 0.0), (0.3, 0.0), (1.0, 0.0), (0.25, 0.5), (0.5, 0.5)])
def test_shares_of_pairs_are_those_asked_for(changing: float, isolating: float) -> None:
    task = declared("attributes", changing=changing, isolating=isolating)
    pairs = sampled(task, count=500)
    changes = [_kind(task, pair)[1] for pair in pairs]
    assert abs(sum(changes) / 500 - changing) < 0.08
    assert abs(sum(pair.isolates for pair in pairs) / 500 - isolating) < 0.08
    assert not any(change and pair.isolates for change, pair in zip(changes, pairs, strict=True))
    for pair in pairs:
        ((variable, source),) = pair.sources.items()
        runs = [task.causal_model.run(each) for each in (pair.base, source)]
        assert runs[0]["asked"] == runs[1]["asked"], "shared"
        assert not pair.isolates or runs[0][variable] != runs[1][variable]


@pytest.mark.parametrize("variable", ["above", "below"])
def test_bases_are_balanced_and_conditions_hold(variable: str) -> None:
    task = declared("price", variables=variable)
    pairs = sampled(task, count=400)
    yes = sum(task.causal_model.run(pair.base)["answer"] == "Yes" for pair in pairs)
    assert 150 < yes < 250
    assert all(setting["low"] < setting["high"] for pair in pairs for setting in pair.settings())


def test_pairs_come_as_they_are_where_no_share_is_asked_for() -> None:
    task = sums(changing=None)
    changes = sum(_kind(task, pair)[1] for pair in sampled(task))
    assert 100 < changes < 200, "about half of two random carries differ"


@pytest.mark.parametrize(
    ("rule", "disjoint"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([["a", "b"]], [("a", "b")]),
        ("settings", [("a", "b")]),
        ({"by": "a", "shares": [0.4, 0.3, 0.3], "seed": 3}, ["a"]),
    ],
    ids=str,
)
def test_splits_are_disjoint_in_what_the_rule_names(rule: Any, disjoint: list[Any]) -> None:
    task = sums(inputs={"a": "0..49", "b": "0..49"}, mechanisms={**SUM["mechanisms"], "sum": "a + b + 0 * carry"},
                changing=None, split=rule)  # fmt: skip
    values: dict[Any, dict[str, set[Any]]] = {}
    for split in SPLITS:
        for setting in (setting for pair in sampled(task, split, 200) for setting in pair.settings()):
            for name in disjoint:
                value = setting[name] if isinstance(name, str) else tuple(setting[each] for each in name)
                values.setdefault(name, {}).setdefault(split, set()).add(value)
    for of_splits in values.values():
        train, validation, test = (of_splits[split] for split in SPLITS)
        assert train and validation and test
        assert not (train & validation or train & test or validation & test)


def test_every_split_has_both_values_of_what_it_is_divided_within() -> None:
    task = declared("gender", split={"by": "name", "within": "gender", "shares": [0.9, 0.05, 0.05]})
    for split in SPLITS:
        genders = {task.causal_model.run(pair.base)["gender"] for pair in sampled(task, split, 40)}
        assert genders == {"male", "female"}


def test_the_question_is_held_out_in_every_wording() -> None:
    task = sums(template=["{a} + {b} =", "{a} and {b} is"], split="settings")
    seen = {split: {(s["a"], s["b"]) for p in sampled(task, split) for s in p.settings()} for split in SPLITS}
    assert seen["train"].isdisjoint(seen["test"])


def test_values_that_the_tokenizer_splits_are_left_out(embedded: Any) -> None:
    given = node("gender")
    given["tables"]["gender_of"]["groups"]["male"]["words"] += " Zebulon"
    task = DeclaredTask(**given, one_token="name")
    assert "Zebulon" in task.causal_model.inputs["name"]
    task.bind(embedded.tokenizer)
    assert "Zebulon" not in task.causal_model.inputs["name"] and len(task.causal_model.inputs["name"]) == 120


def test_outputs_include_those_that_only_an_interchange_gives() -> None:
    assert sums().outputs == [str(number) for number in range(20)], "9 + 9 is 18"


def test_a_table_chooses_the_template() -> None:
    asks = {"sum": "{a} + {b} =", "carry": "does {a} + {b} carry ?"}
    task = sums(
        inputs={**SUM["inputs"], "asked": ["sum", "carry"]},
        mechanisms={**SUM["mechanisms"], "answer": "str(sum) if asked == 'sum' else 'Yes' if carry else 'No'"},
        template={"of": "asked", "table": asks},
        output="answer",
    )
    for pair in sampled(task, count=30):
        text = str(task.identity(pair.base))
        assert text.startswith("does") == (pair.base["asked"] == "carry") and text[-1] in "=?"


def test_keys_of_tables_may_have_become_texts_in_a_saved_configuration() -> None:
    given = {**SUM, "mechanisms": {**SUM["mechanisms"], "sum": {"of": ["carry", "ones"], "table": {}}}}
    given["mechanisms"]["sum"]["table"] = {flag: {n: 10 * flag + n for n in range(10)} for flag in (False, True)}
    again = json.loads(json.dumps(given))
    assert list(again["mechanisms"]["sum"]["table"]) == ["false", "true"]
    one, other = (sampled(DeclaredTask(**each)) for each in (given, again))
    assert one == other and DeclaredTask(**again).outputs == sums().outputs


# --- what is wrong is named by its key

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown parent": ({"mechanisms": {**SUM["mechanisms"], "ones": "(a + c) % 10"}}, "ones: .*column 6: 'c' is no"),
    "circle": ({"mechanisms": {"carry": "sum > 9", "sum": "a + b + carry"}}, "carry: carry, sum depend on each other"),
    "unquoted text": ({"mechanisms": {**SUM["mechanisms"], "sum": "Yes if carry else No"}}, "'Yes' is no .*in quotes"),
    "table lacks a value": (
        {"mechanisms": {"carry": "a + b > 9", "sum": {"of": "carry", "table": {"true": "x"}}}},
        r"mechanisms.sum: the table of 'sum' lacks 'false'.*\(carry=False\)",
    ),
    "table lacks a value of an interchange": (
        {"mechanisms": {**SUM["mechanisms"], "sum": "table[10 * carry + ones]"},
         "tables": {"table": {n: f"n{n}" for n in range(19)}}},
        r"mechanisms.sum: after an interchange of carry: .*lacks '19'",
    ),
    "table lacks a level": (
        {"mechanisms": {**SUM["mechanisms"], "sum": {"of": "carry", "table": {"true": {"x": "y"}, "false": "z"}}}},
        "sum: the table of 'sum' has a row of x there; name the parents of all its levels",
    ),
    "table without parent": ({"mechanisms": {"carry": {"0": "x"}, "sum": "carry"}}, "neither an expression nor"),
    "groups overlap": (
        {"mechanisms": {"carry": {"of": "a", "groups": {"x": "0..5", "y": "5..9"}}, "sum": "carry"}},
        "groups: '5' is in two, 'x' and 'y'",
    ),
    "groups of numbers": (
        {"mechanisms": {"carry": {"of": "a", "groups": {0: "0..5", 1: "6..9"}}, "sum": "carry"}},
        "the result 0 is no text",
    ),
    "template field": ({"template": "{a} + {c} ="}, "template: .*the field 'c' is no variable"),
    "template twice": ({"template": "{a} + {a} {b}"}, r"\{a\} twice.*the mechanism a_again: a"),
    "template without field": ({"template": "one plus one ="}, "has no field"),
    "template reads an attribute": ({"template": "{a.real} + {b}"}, "the field 'a.real' is no variable"),
    "template as wide as it likes": ({"template": "{a:9999999d} {b}"}, "plain width"),
    "template of one text": ({"template": ["{a} + {b} ="]}, "two or more texts"),
    "template shows the output": ({"template": "{a} + {b} = {sum}"}, "shows the output 'sum'"),
    "position": (
        {"inputs": {"first": "0..9", "b": "0..9"}, "mechanisms": {"carry": "first + b > 9", "sum": "str(carry)"},
         "template": "{first} {b}"},
        "'@first' already names tokens",
    ),
    "truth in a text": ({"template": "{a} + {b} {carry} ="}, "'carry' is true or false.*YAML reads Yes"),
    "truth as output": ({"output": "carry", "variables": "a"}, "'carry' is true or false, which is no answer"),
    "unused input": ({"inputs": {**SUM["inputs"], "c": "0..9"}}, "inputs.c: nothing reads it"),
    "constant output": ({"mechanisms": {**SUM["mechanisms"], "sum": "0 * carry"}}, "output: 'sum' is 0 in every"),
    "constant variable": ({"mechanisms": {**SUM["mechanisms"], "carry": "a > 9"}}, "carry: 'carry' is False in every"),
    "variable without effect": ({"mechanisms": {**SUM["mechanisms"], "sum": "ones"}}, "'carry' does not act on the"),
    "output interchanged": ({"variables": "sum"}, "'sum' is the output itself"),
    "unknown variable": ({"variables": ["cary"]}, "variables: 'cary' is no variable, did you mean 'carry'"),
    "unknown output": ({"output": "sums"}, "output: 'sums' is no variable, did you mean 'sum'"),
    "output an input": ({"output": "a"}, "output: 'a' is an input"),
    "unknown control": ({"control": "x"}, "control: 'x' is no variable"),
    "split by no input": ({"split": "carry"}, "split: by: 'carry' is no input"),
    "split left empty": ({"inputs": {"a": "0..1", "b": "0..9"}, "split": "a"}, "split: test gets none of the 2"),
    "shares": ({"split": {"by": "a", "shares": [0.5, 0.2, 0.2]}}, "add up to 0.9"),
    "split key": ({"split": {"by": "a", "share": [1, 0, 0]}}, "takes no 'share', did you mean 'shares'"),
    "no such setting": ({"where": "a + b > 99"}, "'carry' is nothing in every setting"),
    "condition without value": ({"where": "a // b > 1"}, r"where\[0\]: .*division.*\(a=0, b=0\)"),
    "no pair of the kind": ({"shared": ["a", "b"]}, "changing: no train pair found .* the label changes"),
    "few values": (
        {"inputs": {"a": "0..3", "b": "0..9"}, "mechanisms": {"carry": "a > 1", "sum": "10 * carry + a"}, "split": "a"},
        "inputs: no .* pair found .*, the label changes: 'sum' is .* in every .* setting; give inputs more values",
    ),
    "range": ({"inputs": {"a": "9..0", "b": "0..9"}}, "inputs.a: the range 9..0 has no value"),
    "range without end": ({"inputs": {"a": "0..999999999999", "b": "0..9"}}, "more than 100000"),
    "one value": ({"inputs": {"a": [1], "b": "0..9"}}, "inputs.a: has 1 value"),
    "value twice": ({"inputs": {"a": [1, 2, "1"], "b": "0..9"}}, "inputs.a: has '1' twice"),
    "value is null": ({"inputs": {"a": [1, None], "b": "0..9"}}, "inputs.a: None is no value"),
    "text as values": ({"inputs": {"a": "zero one", "b": "0..9"}}, "inputs.a: 'zero one' is no list.*words: a b c"),
    "file here": ({"inputs": {"a": {"file": "/etc/passwd"}, "b": "0..9"}}, "inputs.a: a file of words is read from"),
    "name is true": ({"inputs": {True: "0..9", "a": "0..9", "b": "0..9"}}, "True is no name; YAML reads yes"),
    "name of a function": ({"inputs": {"max": "0..9", "b": "0..9"}}, "'max' is no name"),
    "input and mechanism": ({"mechanisms": {**SUM["mechanisms"], "a": "b"}}, "'a' is an input too"),
    "table and variable": ({"tables": {"a": {"x": "y"}}}, "tables.a: 'a' is a variable too"),
    "too many settings": (
        {"inputs": {"a": "0..9999", "b": "0..9999"}, "mechanisms": {"carry": "a + b > 9", "sum": "a * b + carry"}},
        r"'carry' depends on a, b, 100,000,000 settings, .*values: \{carry: .*and 1 more",
    ),
    "balance of many values": (
        {"inputs": {"a": "0..199", "b": "0..9"}, "balance": "a"}, "balance: a: .* values or more; at most 100"
    ),
    "values without end": (
        {"inputs": {"a": "0..60000", "b": "0..60000"}}, "inputs.b: .* more than 100000 values together"
    ),
    "number too large to be saved": ({"inputs": {"a": [1, 10**9], "b": "0..9"}}, "no saved configuration may hold"),
    "equals of no input": (
        {"inputs": {"a": "0..9", "b": {"values": "0..9", "equals": {"c": 0.5}}}},
        "'c' is no input before 'b'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_named_by_its_key_with_a_remedy(fault: str) -> None:
    changes, message = WRONG[fault]
    with pytest.raises(DeclarationError, match=message) as refused:
        sums(**changes)
    assert "\n" not in str(refused.value)


def test_all_that_is_wrong_is_found_at_once() -> None:
    with pytest.raises(DeclarationError, match="and 3 more: itrain task check") as refused:
        sums(inputs={"a": "9..0", "b": []}, mechanisms={"carry": "a + c", "sum": "carry ("})
    keys = [problem.key for problem in refused.value.problems]
    assert keys == [("inputs", "a"), ("inputs", "b"), ("mechanisms", "carry"), ("mechanisms", "sum")]


def test_what_reads_a_faulty_table_is_not_at_fault_too() -> None:
    with pytest.raises(DeclarationError, match=r"tables.half: groups: .* write int\(<table>\[<key>\]\)") as refused:
        sums(
            tables={"half": {"groups": {0: ["x"], 1: ["y"]}}},
            inputs={"a": {"keys": "half"}, "b": {"like": "a"}},
            mechanisms={"carry": "half[a] > half[b]", "sum": "carry"},
        )
    assert [problem.key for problem in refused.value.problems] == [("tables", "half")]


def test_an_unknown_table_is_named_where_there_is_none() -> None:
    with pytest.raises(DeclarationError, match=r"keys: there is no table 'half'$"):
        sums(inputs={"a": {"keys": "half"}, "b": "0..9"})


@pytest.mark.parametrize(
    "wrong", [{"changing": 1.5}, {"isolating": -0.1}, {"changing": 0.7, "isolating": 0.7}, {"together": True}]
)
def test_shares_and_sets_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"changing=|isolating=|together: 7 variables"):
        sums(**{**wrong, **({"variables": list("abcdefg")} if "together" in wrong else {})})
