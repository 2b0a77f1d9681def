"""What a direction means for the output: its vocabulary projection and its token change."""

from __future__ import annotations

from functools import partial
from typing import cast

import pytest
import torch
from torch import nn

from itrain import cli
from itrain.data import CounterfactualDataModule
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.networks.hooks import HookedNetwork
from itrain.results.tokens import Tokenizer
from itrain.sites import Site
from itrain.tasks.gender import Gender
from itrain.training.alignment import AlignmentSearch
from itrain.training.describing import (
    can_describe,
    described,
    directions_of,
    in_tokens,
    token_change,
    vocabulary_projection,
)


@pytest.fixture(scope="module")
def data(embedded) -> CounterfactualDataModule:
    task = Gender(templates="simple")
    task.bind(embedded.tokenizer)
    made = CounterfactualDataModule(
        task=task, network=HookedNetwork(embedded.model), train_pairs=8, validation_pairs=8, test_pairs=32
    )
    made.setup("fit")
    return made


def test_the_projection_is_the_last_norm_and_the_head_of_the_direction(embedded, data) -> None:
    vector = torch.randn(80, generator=torch.Generator().manual_seed(0))
    found = vocabulary_projection(data.network, data.datasets["test"].examples.base, vector)
    norm, head = embedded.model.gpt_neox.final_layer_norm, embedded.model.get_output_embeddings()
    expected = head.weight @ (norm.weight * nn.functional.layer_norm(vector, [80]))  # the norm's bias cancels
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_small_vocabulary_gives_all_its_tokens() -> None:
    class Few:
        def __len__(self) -> int:
            return 3

        def decode(self, tokens: list[int]) -> str:
            return "abc"[tokens[0]]

    assert in_tokens(cast(Tokenizer, Few()), torch.tensor([2.0, 1.0, 3.0, 9.0]), 8) == (
        ["c", "a", "b"],
        ["b", "a", "c"],
    )


def test_the_projection_of_a_direction_of_neurons_is_none(data) -> None:
    assert vocabulary_projection(data.network, data.datasets["test"].examples.base, torch.ones(320)) is None


def test_the_token_change_is_that_of_two_runs(embedded, data) -> None:
    inputs, vector = data.datasets["test"].examples.base, torch.randn(80, generator=torch.Generator().manual_seed(1))
    found = token_change(data.network, inputs, Site.parse("layer3.block_output@name"), vector)
    logits, at = [], inputs.spans["name"]
    for sign in (1, -1):

        def moved(module, args, output, sign=sign):
            output = output.clone()
            for row, (start, stop) in enumerate(at.tolist()):
                output[row, start:stop] += sign * vector
            return output

        handle = embedded.model.gpt_neox.layers[3].register_forward_hook(moved)
        with torch.no_grad():
            answers = embedded.model(**inputs.arguments).logits[torch.arange(len(at)), inputs.answer]
        handle.remove()
        logits.append(answers.mean(0))
    torch.testing.assert_close(found, (logits[0] - logits[1]) / 2, rtol=1e-4, atol=1e-4)


def test_the_directions_are_those_of_the_subspace_and_raise_the_pronouns_at_the_last_token(embedded, data) -> None:
    """A planted direction: the difference of the pronouns' rows of the head."""
    head, (he, she) = (
        embedded.model.get_output_embeddings().weight,
        embedded.tokenizer.convert_tokens_to_ids(["he", "she"]),
    )
    planted = embedded.model.gpt_neox.final_layer_norm.weight * (head[she] - head[he])
    module = AlignmentSearch(network=data.network, sites="layer5.block_output@last", intervention=partial(DAS, rank=1))
    (das,) = module.trained.values()
    das.subspace.rows = planted[None] / planted.norm()
    assert can_describe(module, data, embedded.tokenizer)
    (found,) = directions_of(module, data)
    assert abs(found.vector @ planted / planted.norm()) == pytest.approx(1, abs=1e-5)
    assert found.share == pytest.approx(1)
    assert found.projection is not None
    for logits in (found.projection, found.change):
        assert float(logits[he]) * float(logits[she]) < 0
        assert abs(logits[she] - logits[he]) > 4 * logits.std()
    raised, lowered = in_tokens(embedded.tokenizer, found.change, len(embedded.tokenizer))
    assert raised == lowered[::-1]
    assert "layer5.block_output@last" in repr(described([found], embedded.tokenizer, count=3))


def test_directions_beside_the_residual_stream_have_a_token_change_alone(data) -> None:
    """Queries are as wide as the stream."""
    module = AlignmentSearch(network=data.network, sites="layer2.query_output@last", intervention=partial(DAS, rank=1))
    (found,) = directions_of(module, data)
    assert len(found.vector) == 80 and found.projection is None and found.change.abs().max() > 0


def test_a_control_that_swaps_everything_has_several_directions(data) -> None:
    module = AlignmentSearch(network=data.network, sites="layer1.block_output@name", intervention=FullVector)
    found = directions_of(module, data)
    shares = [each.share for each in found]
    assert len(found) == 4 and shares == sorted(shares, reverse=True) and sum(shares) < 1


def test_the_verb_needs_something_to_describe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["describe", "recipe=das_gender"]) == 2
    assert "describe needs ckpt=<run folder or .ckpt> or export=<folder>" in capsys.readouterr().err
    assert cli.main(["describe", "top=none", "export=x"]) == 2
    assert "top=none: give the number of tokens once" in capsys.readouterr().err
