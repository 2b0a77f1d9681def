"""Texts whose positions count some of their tokens alone: what precedes these is part of every run of them."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from itrain.inputs import ModelInputs
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.networks.replay import network as replaying
from itrain.sites import Site
from itrain.training.attaching import _continued
from itrain.training.continuations import whole_texts
from tests.models import tiny_inputs, tiny_model

SITE = Site.parse("layer1.block_output@all")


def texts(*, left: bool = False) -> ModelInputs:
    """Texts of a first token of their own, a prompt and a response; the first two differ in the first token alone."""
    lengths = (6, 6, 4)
    inputs = tiny_inputs(lengths, left=left, answer=True)
    assert inputs.tokens is not None
    ids = inputs.arguments["input_ids"].clone()
    ids[1] = ids[0]
    ids[1, 0] = 3 if ids[0, 0] != 3 else 4
    spans = {"prompt": torch.stack([inputs.tokens[:, 0] + 1, inputs.tokens[:, 1] - 1], 1)}
    stop = inputs.tokens[:, 1]
    tokens = torch.stack([inputs.tokens[:, 0], stop - 1], 1)
    return replace(inputs, arguments={**inputs.arguments, "input_ids": ids}, tokens=tokens, stop=stop, spans=spans)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("gpt2")


@pytest.mark.parametrize("left", [False, True])
def test_what_precedes_the_counted_tokens_is_run_in_any_part_of_a_batch(model: nn.Module, left: bool) -> None:
    inputs, network = whole_texts(texts(left=left)), HookedNetwork(model)
    whole = network.read(inputs, [SITE])[SITE]
    for row in range(inputs.batch_size):
        one = inputs.take(torch.tensor([row]))
        own = whole[row][inputs.present(SITE)[row]]
        torch.testing.assert_close(network.read(one, [SITE])[SITE][0], own)
        torch.testing.assert_close(network.read(inputs.padded_right(), [SITE])[SITE][row][: len(own)], own)
        assert torch.equal(one.keys[0], inputs.keys[row])
    assert len(inputs.keys.unique()) == 3
    assert not torch.isin(inputs.keys, texts(left=left).keys).any()


def test_prompts_that_are_taken_out_of_texts_keep_what_precedes_them(model: nn.Module) -> None:
    whole = whole_texts(texts())
    prompts, site = whole.prompts(), Site.parse("layer1.block_output@last")
    torch.testing.assert_close(
        HookedNetwork(model).read(prompts, [site])[site], HookedNetwork(model).read(whole, [site])[site]
    )


def test_what_is_kept_of_whole_texts_stays(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "AGAIN", 2)
    inputs, network = whole_texts(texts()), ReplayNetwork(HookedNetwork(model))
    expected = HookedNetwork(model).read(inputs, [SITE])[SITE]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            torch.testing.assert_close(network.read(inputs, [SITE])[SITE], expected)


def test_texts_that_differ_before_the_counted_tokens_alone_are_kept_apart(model: nn.Module) -> None:
    inputs, network = whole_texts(texts()), ReplayNetwork(HookedNetwork(model))
    expected = HookedNetwork(model).read(inputs, [SITE])[SITE]
    assert not torch.allclose(expected[0], expected[1])
    for row in range(3):
        one = inputs.take(torch.tensor([row]))
        torch.testing.assert_close(network.read(one, [SITE])[SITE][0], expected[row][inputs.present(SITE)[row]])


def test_continuations_of_different_prompts_are_kept_apart(model: nn.Module) -> None:
    inputs, network = texts(), ReplayNetwork(HookedNetwork(model))
    for row in range(2):
        one = inputs.take(torch.tensor([row]))
        found, expected = _continued(network, one, [SITE]), _continued(HookedNetwork(model), one, [SITE])
        torch.testing.assert_close(found[SITE], expected[SITE])
