"""Members side by side, gradient checkpointing, caches and files of the rows that tests/test_rows.py has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from itrain.architectures import ARCHITECTURES, blocks, has
from itrain.models import load_pretrained
from itrain.networks.attached import AttachedEdits
from itrain.networks.choose import make_network
from itrain.networks.forward import WINDOWS, cache_arguments, cache_of, checkpoint_of, takes_any_mask
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.sites import Site
from scripts.tiny_models import INSIDE, ROWS, row_config, row_model
from tests.models import tiny_inputs
from tests.replaying import distance, examples
from tests.test_recomputation import enable_checkpointing
from tests.test_rows import CAUSAL, precise, quickly
from tests.test_side_by_side import answers_and_gradients, side_by_side

MEMBERS = [
    ["layer0.block_output@word"],
    ["layer0.block_output@last"],
    ["layer1.mlp_output@2", "layer0.block_output@-2"],
    ["layer1.router_output@word.first"],
    ["layer0.block_output@first"],
]


@pytest.mark.parametrize("model_type", quickly(CAUSAL))
def test_each_member_is_as_if_alone(model_type: str) -> None:
    network = make_network(precise(row_model(model_type)), replay="on")
    assert isinstance(network, ReplayNetwork)
    members = [[Site.parse(site) for site in each] for each in MEMBERS]
    members = [each for each in members if all(has(network.model, site) for site in each)]
    base, source = examples("right"), examples("right", seed=1)
    expected = answers_and_gradients(network.hooked, members, base, source, together=False)
    for _ in range(2):
        assert distance(answers_and_gradients(network, members, base, source), expected) < 1e-5
    assert ARCHITECTURES[model_type].recurrent or side_by_side(network, members)


@pytest.mark.parametrize("model_type", quickly(ROWS))
def test_each_models_blocks_tell_what_recomputes_them(model_type: str) -> None:
    model = row_model(model_type).train()
    assert not any(map(checkpoint_of, blocks(model)))
    enable_checkpointing(model, reentrant=False)
    assert all(map(checkpoint_of, blocks(model)))


@pytest.mark.parametrize("model_type", ["gpt_oss", "mamba2", "t5"])
def test_recomputed_blocks_are_edited_again(model_type: str) -> None:
    """Gradients with and without gradient checkpointing are equal."""
    stack = "encoder." if ARCHITECTURES[model_type].stacks else ""
    site = Site.parse(f"{stack}layer0.mixer_output@2" if model_type == "mamba2" else f"{stack}layer0.mlp_output@2")
    found = []
    for recomputes in (False, True):
        model = row_model(model_type)
        if recomputes:
            enable_checkpointing(model, reentrant=False)
            for block in blocks(model):
                block.training = True
        network, shift = HookedNetwork(model, trainable=True), torch.ones(16, requires_grad=True)
        network.edit(
            tiny_inputs(answer=True), [(site, lambda base, shift=shift: base * shift)]
        ).square().sum().backward()
        found.append(shift.grad)
    torch.testing.assert_close(*found)
    assert found[0] is not None and found[0].norm() > 0


@pytest.mark.parametrize("model_type", ROWS)
def test_every_window_of_a_configuration_is_known(model_type: str) -> None:
    sizes = {name for name in row_config(model_type).get_text_config().to_dict() if re.search("window|chunk", name)}
    # Of these some say whether or where the window is used, and the chunks are those of an MLP and of a scan.
    others = {"use_sliding_window", "max_window_layers", "_sliding_window_pattern", "sliding_window_pattern"}
    assert sizes - others - {"chunk_size_feed_forward", "chunk_size"} <= {*WINDOWS}


def test_a_window_of_no_tokens_is_none() -> None:
    """As Qwen 2's mixtures have it."""
    model = row_model("qwen2_moe", sliding_window=0)
    assert takes_any_mask(model, 10**6)


def test_a_state_that_was_filled_before_edits_were_attached_is_refused() -> None:
    """A state does not tell how many tokens it has seen; one that is filled inside is counted."""
    model, tokens = row_model("mamba"), tiny_inputs().arguments["input_ids"]
    cache = cache_of(model(tokens[:, :4], use_cache=True))
    edit = (Site.parse("layer0.block_output@1"), torch.neg)
    with AttachedEdits(model, [edit]):
        with pytest.raises(ValueError, match="given the state of a text that it did not run itself"):
            model(tokens[:, 4:5], **cache_arguments(model, cache))
        inside = cache_of(model(tokens[:, :4], use_cache=True))
        found = model(tokens[:, 4:5], **cache_arguments(model, inside)).logits[:, -1]
        whole = model(tokens[:, :5]).logits[:, -1]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", quickly(sorted(set(ROWS) - set(INSIDE))))
def test_saved_models_are_loaded_with_the_head_that_answers(model_type: str, tmp_path: Path) -> None:
    """Of models of images and text the text's part is loaded, where that has a class of its own."""
    made: Any = row_model(model_type)
    made.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path)).model
    assert type(loaded) is type(made)
    inputs = tiny_inputs(answer=True)
    torch.testing.assert_close(HookedNetwork(loaded)(inputs), HookedNetwork(made)(inputs))
