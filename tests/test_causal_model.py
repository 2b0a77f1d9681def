"""Causal models run, and run under interchange, as their definition says."""

from __future__ import annotations

from random import Random

import pytest

from itrain.causal_model import CausalModel


def equality() -> CausalModel:
    """Are the two pairs alike in whether their members are equal?"""
    letters = ["a", "b", "c"]
    return CausalModel(
        inputs={"w": letters, "x": letters, "y": letters, "z": letters},
        mechanisms={
            "same": lambda left, right: left == right,
            "left": lambda w, x: w == x,
            "right": lambda y, z: y == z,
        },
        output="same",
    )


ALIKE = {"w": "a", "x": "a", "y": "b", "z": "b"}
UNLIKE = {"w": "a", "x": "b", "y": "a", "z": "a"}


def test_mechanisms_may_stand_in_any_order() -> None:
    model = equality()
    assert model.variables.index("left") < model.variables.index("same")
    assert model.run(ALIKE)["same"] is True
    assert model.run(UNLIKE)["same"] is False


def test_interchange_takes_the_variable_from_the_source_and_all_else_from_the_base() -> None:
    new = equality().interchange(ALIKE, {"left": UNLIKE})
    assert (new["w"], new["left"], new["right"], new["same"]) == ("a", False, True, False)


def test_variables_take_their_own_sources() -> None:
    other = {"w": "a", "x": "a", "y": "a", "z": "c"}
    new = equality().interchange(ALIKE, {"left": UNLIKE, "right": other})
    assert (new["left"], new["right"], new["same"]) == (False, False, True)


def test_interchange_with_itself_changes_nothing() -> None:
    model = equality()
    assert model.interchange(UNLIKE, {"left": UNLIKE, "right": UNLIKE}) == model.run(UNLIKE)


def test_interventions_hold_a_variable_whatever_its_parents_say() -> None:
    assert equality().run(ALIKE, {"left": False})["same"] is False
    assert equality().run(ALIKE, {"w": "c"})["left"] is False


def test_sampling_depends_on_the_random_state_alone() -> None:
    model = equality()
    assert [model.sample(Random(3)) for _ in range(2)] == [model.sample(Random(3))] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mechanisms": {"b": lambda a, c: a}, "output": "b"}, "'c', a parent of 'b', is not a variable"),
        ({"mechanisms": {"b": lambda a: a}, "output": "bb"}, "'bb', the output, is not a variable; did you mean 'b'?"),
        ({"mechanisms": {"b": lambda c: c, "c": lambda b: b}, "output": "b"}, "b, c depend on each other in a circle"),
        ({"mechanisms": {"a": lambda b: b, "b": lambda a: a}, "output": "b"}, "'a' is both an input and"),
    ],
)
def test_an_impossible_model_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        CausalModel(inputs={"a": [0, 1]}, **arguments)


def test_a_misspelt_variable_is_refused() -> None:
    with pytest.raises(ValueError, match="'lefft', an interchange, is not a variable; did you mean 'left'"):
        equality().interchange(ALIKE, {"lefft": UNLIKE})


def test_a_missing_input_is_refused() -> None:
    with pytest.raises(ValueError, match="the input 'z' has no value"):
        equality().run({"w": "a", "x": "a", "y": "a"})
