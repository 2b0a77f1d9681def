"""``itrain run``: what it prints, and what it says of words that mean nothing."""

from __future__ import annotations

import pytest

from itrain.cli import main

MARY, JOHN, SITE = "base=Mary walked because", "source=John walked because", "site=layer2.block_output@1"


def printed(capsys, *words):
    code = main(["run", *words])
    out, error = capsys.readouterr()
    return code, out, error


def test_the_likeliest_tokens_before_and_after(capsys):
    code, out, _ = printed(capsys, SITE, MARY, JOHN, "intervention=full_vector", "top=2")
    text, edit, head, first, second = out.splitlines()
    assert code == 0 and text == "Mary walked because" and head.split() == ["before", "after"]
    assert "layer2.block_output@1: FullVector, source 'John walked because'" in edit
    assert first.split()[::2] == ["she", "he"] and len(second.split()) == 4
    assert all(0 < float(value) <= 1 for value in first.split()[1::2])
    where = ('site=layer2.block_output@"Mary"', 'read=layer2.block_output@"John"')
    _, named, _ = printed(capsys, *where, MARY, JOHN, "top=2")
    assert named.splitlines()[2:] == out.splitlines()[2:]


def test_interventions_with_settings_features_and_prompts_to_learn_from(capsys):
    words = ("intervention=scale", "intervention.factor=0", "dims=[1,2]", "top=1")
    code, out, _ = printed(capsys, SITE, MARY, *words)
    _, zero, _ = printed(capsys, SITE, MARY, "intervention=zero", "dims=1,2", "top=1")
    assert code == 0 and "Scale of features 1, 2" in out and out.splitlines()[3:] == zero.splitlines()[3:]
    code, out, _ = printed(capsys, SITE, MARY, "intervention=mean", "fit=John slept", "fit=Paul slept", "top=1")
    assert code == 0 and out.splitlines()[3].split()[2] == "he"
    scaled = ("intervention=scale", "intervention.factor=3", "top=1")
    code, out, _ = printed(capsys, SITE, MARY, *scaled, "strength=0.5")
    _, twice, _ = printed(capsys, SITE, MARY, "intervention=scale", "intervention.factor=2", "top=1")
    assert code == 0 and "Scale, strength 0.5" in out and out.splitlines()[3:] == twice.splitlines()[3:]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([SITE], 2, "'run' needs base; give site="),
        ([MARY, JOHN], 2, "'run' needs site; give site="),
        ([SITE, MARY], 1, "nothing says what happens there"),
        ([SITE, MARY, JOHN, "trainer=cpu"], 2, "'trainer=cpu' is not for 'run'"),
        ([SITE, MARY, JOHN, "bsae=x"], 2, "'bsae=x' is not for 'run', did you mean 'base'?"),
        ([SITE, MARY, JOHN, "dims=[a]"], 2, "dims=[a]: expected whole numbers"),
        ([SITE, MARY, JOHN, "top=0"], 2, "top=0: expected how many tokens"),
        ([SITE, MARY, JOHN, "read=layer1.block_output@1", "read=x"], 2, "read: there are 2 for 1 sites"),
        (["site=layer2.block_output@x y", MARY, JOHN], 2, "'x y' is no position"),
        (["site=layer2.block_output@Mary", MARY, JOHN], 2, "a shell takes quotes off that are not in single ones"),
        ([SITE, MARY, JOHN, "strength=half"], 2, "strength=half: expected a number"),
        ([SITE, MARY, JOHN, "intervention=scael"], 2, "did you mean 'scale'"),
        ([SITE, MARY, JOHN, "intervention=zero"], 1, "source: Zero takes none"),
    ],
)
def test_wrong_words_are_told_in_one_line(capsys, words, code, message):
    found, out, error = printed(capsys, *words)
    assert found == code and out == "" and message in error and error.count("\n") == 1
