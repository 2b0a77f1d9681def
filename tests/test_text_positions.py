"""Positions given as texts of the prompt: the tokens that spell them, and what is said where that is unclear."""

from __future__ import annotations

import pickle
from functools import partial

import lightning
import pytest
import torch

import itrain
from itrain.config.overrides import parse
from itrain.inputs import ModelInputs, PositionError
from itrain.sites import Site
from itrain.tasks.responses import Prompts
from tests.models import tiny_inputs
from tests.test_interchange import QUIET

ADAM = partial(torch.optim.Adam, lr=1e-2)


@pytest.fixture(scope="module")
def tokenizer():
    return itrain.load_embedded().tokenizer


def inputs_of(tokenizer, *texts):
    task = Prompts(texts=texts)
    task.bind(tokenizer)
    return task.inputs(task.settings("test"))


def site(position):
    return Site.parse(f"layer1.block_output@{position}")


def words(tokenizer, inputs, position):
    """The words at a position, example by example."""
    index, valid = inputs.indices(site(position), inputs.length)
    valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
    ids = inputs.arguments["input_ids"]
    return [
        tokenizer.convert_ids_to_tokens(row[at][ok].tolist()) for row, at, ok in zip(ids, index, valid, strict=True)
    ]


@pytest.mark.parametrize(
    ("position", "terms"),
    [
        ('"Spain"', ('"Spain"',)),
        ('"Spain".last', ('"Spain".last',)),
        ('"a + b"[1].first+last', ('"a + b"[1].first', "last")),
        ('name.last+"of Spain"[-1]+2', ("name.last", '"of Spain"[-1]', "2")),
        ('"Mr. X.last@first\n"', ('"Mr. X.last@first\n"',)),
    ],
)
def test_a_text_in_quotes_is_a_term(position, terms):
    where = site(position)
    assert where.terms == terms and where.position == position
    assert Site.parse(str(where)) == where == pickle.loads(pickle.dumps(where))
    assert site('"Spain"').count is None and site('"Spain".last+1').count == 2


@pytest.mark.parametrize("position", ['"', '""', '"Spain', "'Spain'", '"Spain"[]', '"Spain"[a]', '"Spain".middle'])
def test_what_is_no_text_in_quotes_is_refused(position):
    with pytest.raises(ValueError, match=r"is no position; use .* a text of the prompt in double quotes"):
        site(position)


def prompts(tokenizer):
    return inputs_of(tokenizer, "Emma walked because Emma smiled", "John waited while Emma walked")


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ('"walked"', [["walked"], ["walked"]]),
        ('"Emma"[-1]', [["Emma"], ["Emma"]]),
        ('"Emma"[0].last+last', [["Emma", "smiled"], ["Emma", "walked"]]),
        ('"Emma walked"', [["Emma", "walked"], ["Emma", "walked"]]),
        ('"Emma walked".first', [["Emma"], ["Emma"]]),
        ('" walked "', [["walked"], ["walked"]]),
    ],
)
def test_a_text_names_its_tokens(tokenizer, position, expected):
    inputs = prompts(tokenizer)
    assert words(tokenizer, inputs, position) == expected
    assert words(tokenizer, inputs.prompts(), position) == expected
    assert words(tokenizer, inputs.take(torch.tensor([1, 0])), position) == expected[::-1]
    assert words(tokenizer, inputs.prompts().padded_right(), position) == expected


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (
            '"Emma"',
            r"""stands 2 times in example 0 \('Emma walked.*at tokens 1, 4; choose one, .* '"Emma"\[0\]' or""",
        ),
        ('"Spain"', r"is not in example 0 .*; its tokens are Emma \| walked \| because \| Emma \| smiled"),
        ('"mma"', "is not in example 0"),
        ('"Emma"[1]', "does not exist: the text stands once in example 1"),
        ('"Emma"[-3]', "does not exist: the text stands 2 times in example 0"),
        ('"Emma"[0]+"Emma walked"', "name the same token"),
    ],
)
def test_an_unclear_text_is_an_error_that_shows_the_prompt(tokenizer, position, message):
    with pytest.raises(PositionError, match=message):
        prompts(tokenizer).require(site(position))


def test_inputs_without_texts_say_so():
    with pytest.raises(PositionError, match="is a text, and the texts of these inputs are not known"):
        tiny_inputs().require(site('"Emma"'))


def test_texts_of_different_lengths_are_told_as_spans_are(tokenizer):
    base, source = inputs_of(tokenizer, "Emma walked"), inputs_of(tokenizer, "Emma walked Emma")
    base.require_same_count(source, site('"walked"'))
    longer = inputs_of(tokenizer, "Emma walked because she")
    with pytest.raises(PositionError, match="name one token"):
        base.require_same_count(longer, site("all"))
    assert site('"Emma walked"[0]').one_token == '"Emma walked"[0].last'
    assert site('"Emma walked".first').one_token == '"Emma walked".last'


def test_a_fit_at_a_text_equals_the_fit_at_the_tokens_and_its_export_comes_back(tokenizer, tmp_path):
    model = itrain.load_embedded()
    task = itrain.Gender(templates=["When {other} {other_verb} , {name} walked because"])
    task.bind(tokenizer)
    modules, figures = [], []
    for where in ("layer1.block_output@-2", 'layer1.block_output@"walked"[-1]'):
        network = itrain.make_network(model.model)
        sizes = {"train_pairs": 32, "validation_pairs": 8, "test_pairs": 8}
        data = itrain.CounterfactualDataModule(task=task, network=network, batch_size=16, seed=0, **sizes)
        torch.manual_seed(0)
        module = itrain.AlignmentSearch(network=network, sites=where, intervention=itrain.DAS, optimizer=ADAM)
        trainer = lightning.Trainer(max_epochs=1, **QUIET)
        trainer.fit(module, data)
        modules.append(module)
        figures.append(trainer.test(module, data, verbose=False)[0])
    assert figures[0] == figures[1]
    folder = itrain.export(modules[1], tmp_path / "export", base_model=model)
    loaded = itrain.load(folder, model.model)
    assert loaded.sites == modules[1].sites == (site('"walked"[-1]'),)
    weights = [list(module.exported.state_dict().values()) for module in (loaded, modules[0])]
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ('site=layer2.block_output@"walked"', 'layer2.block_output@"walked"'),
        ('site=layer2.block_output@"two, words"[1].last+1', 'layer2.block_output@"two, words"[1].last+1'),
        ("site='layer2.block_output@\"walked\"'", 'layer2.block_output@"walked"'),
        (
            'site=[layer2.block_output@"walked",layer2.block_output@name]',
            ['layer2.block_output@"walked"', "layer2.block_output@name"],
        ),
        ("sweep.positions=['\"walked\"',last]", ['"walked"', "last"]),
    ],
)
def test_a_text_is_written_on_the_command_line_as_in_a_site(word, value):
    assert parse(word).value() == value


def test_a_word_without_its_quotes_is_told_how_to_be_a_text(tokenizer):
    with pytest.raises(
        PositionError, match=r"""no span 'walked'.* or a text of the prompt in double quotes: '"walked"'"""
    ):
        prompts(tokenizer).require(site("walked"))


@pytest.mark.parametrize(
    ("text", "characters", "spelled"),
    [
        ("Xa b", [(0, 1), (0, 1), (1, 2), (2, 4)], [1, 2]),  # the space before the text is a token of its own
        ("日a b", [(0, 1), (0, 1), (0, 1), (1, 2), (2, 4)], [0, 1, 2, 3]),  # three bytes of one character
    ],
)
def test_a_space_before_the_text_is_no_part_of_its_first_word(text, characters, spelled):
    ids = torch.arange(len(characters))[None]
    characters = torch.tensor([characters])
    inputs = ModelInputs(
        arguments={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, texts=[text], characters=characters
    )
    assert inputs.indices(site(f'"{text.split()[0]}"'), inputs.length).index.tolist() == [spelled]


def test_a_generation_under_edits_knows_the_texts_positions():
    """Prompts of unequal lengths, which are padded on the left to generate."""
    model, prompts = itrain.load_embedded(), ["Mary walked because", "Then John and Mary walked because"]
    runs = [
        model.run(prompt, f"layer1.block_output@{at}", lambda h: -9 * h)
        for prompt, at in zip(prompts, (1, 4), strict=True)
    ]
    together = model.run(prompts, 'layer1.block_output@"Mary"', lambda h: -9 * h)
    found = together.text(max_new_tokens=5)
    assert found == [each.text(max_new_tokens=5)[0] for each in runs]
    assert found != together.plain.text(max_new_tokens=5)
