"""Hints: what a message tells the user to type is what mends the fault, and names it once."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

from itrain.config import ConfigError, request
from itrain.config.checking import _BUILT
from itrain.signatures import Call
from itrain.telling import _placed
from scripts import error_page
from tests.models import tiny_model

GENDER = "recipe=das_gender"
WHOLE = {
    "model": "itrain.models.load_embedded",
    "network": "itrain.networks.choose.make_network",
    "task": "itrain.tasks.gender.Gender",
    "data": "itrain.data.CounterfactualDataModule",
    "intervention": "itrain.interventions.das.DAS",
    "training": "itrain.training.alignment.AlignmentSearch",
    "trainer": "lightning.pytorch.Trainer",
    "logger": "lightning.pytorch.loggers.TensorBoardLogger",
}


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        request(list(words))
    return str(caught.value)


def test_a_part_that_is_typed_as_a_mapping_or_by_its_path_is_answered_with_the_words_that_work() -> None:
    assert set(WHOLE) == {*_BUILT} - {"launcher", "sweep"}
    for part, path in WHOLE.items():
        for word in (f"{part}={{_target_:{path}}}", f"{part}={path}"):
            told = refused(GENDER, word)
            assert told.endswith(f": {part}._target_={path}"), told
        words = shlex.split(told.rpartition(": ")[2])
        assert request([GENDER, *words])[part]._target_ == path
    told = refused(GENDER, "task={_target_:itrain.tasks.gender.Gender,a:{b:[1,two words]}}")
    assert shlex.split(told.rpartition(": ")[2])[1:] == ["task.a.b=[1,two\\ words]"]
    assert refused("model=qwen2.5-0.6b") == "there is no model 'qwen2.5-0.6b', did you mean 'qwen2.5-0.5b'?"


def test_a_class_in_the_place_of_a_recipes_says_which_of_its_settings_to_leave_out() -> None:
    recipe, own = "recipe=iit_hierarchical_equality", f"model._target_={tiny_model.__module__}.tiny_model"
    known = ["model.model_type=gpt2", "model.hidden_size=3"]
    told = refused(recipe, own, "model.model_type=gpt2")
    assert told == (
        "model._target_: tiny_model takes no 'hidden_size', which the recipe or the choice sets for another class; add "
        "'~model.hidden_size'"
    )
    words = shlex.split(told.rpartition("; add ")[2])
    assert request([recipe, own, "model.model_type=gpt2", *words]).model.model_type == "gpt2"
    told = refused(recipe, own, *known)
    assert told.startswith("model.hidden_size: tiny_model takes no 'hidden_size'; there is"), (
        "what is typed is mistyped"
    )
    digits = refused("recipe=iit_digits_pvr", "data._target_=itrain.data.ResponseDataModule")
    left = shlex.split(digits.rpartition("; add ")[2])
    assert len(left) > 1 and all(word.startswith("~data.") for word in left), digits


@pytest.mark.parametrize("part", [*WHOLE, "sweep", "launcher"])
def test_a_part_that_names_itself_is_named_once(part: str) -> None:
    def target(*, size: int) -> Any:
        return size

    call = Call(place=part, target=target, node={})
    for text in (f"{part} 'x': it is gone", f"{part}: it is gone", f"{part}.size: it is gone", f"{part}=x is gone"):
        assert _placed(text, call) == text
    assert _placed("size: it is gone", call) == f"{part}.size: it is gone"
    assert _placed(f"{part}s are gone", call) == f"{part}: {part}s are gone"


def test_no_example_on_the_page_of_errors_names_a_thing_twice() -> None:
    examples = [kind.says for kind in error_page.kinds() if kind.says]
    assert len(examples) > 10
    assert not [each for each in examples if re.match(r"(\w+):? \1\b", each)]
