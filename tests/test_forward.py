"""The names by which models' forwards are called, as the installed release has them and as others had."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from itrain.architectures import blocks
from itrain.networks.forward import CACHE, WINDOWS, cache_arguments, cache_of, checkpoint_of, takes_any_mask
from tests.models import ALL_TYPES, CAUSAL_TYPES, HIDDEN, VOCABULARY, tiny_config, tiny_inputs, tiny_model
from tests.test_recomputation import enable_checkpointing


class Sum(nn.Module):
    """A language model of a token and the sum of those before it, which is its cache."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def follow(self, input_ids: Tensor, earlier: Tensor | None, name: str) -> SimpleNamespace:
        sums = self.embed(input_ids).cumsum(1) + (0 if earlier is None else earlier)
        return SimpleNamespace(**{"logits": self.head(sums), name: sums[:, -1:]})


class Earlier(Sum):
    """Its forward as releases before the renaming have it."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Any = None,
        use_cache: bool = False,
        **rest: Any,
    ) -> SimpleNamespace:
        return self.follow(input_ids, past_key_values, "past_key_values")


class Later(Sum):
    """Its forward as releases after the renaming have it: what has the old name vanishes."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, use_cache: bool = False, **rest: Any
    ) -> SimpleNamespace:
        return self.follow(input_ids, cache, "cache")


def deprecated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers does while both names are taken."""

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        assert "past_key_values" not in kwargs, "the old name, which a release prints a line about"
        return forward(*args, **kwargs)

    return renamed


class Between(Later):
    """Its forward as the releases in between have it, and an output that has both names."""

    @deprecated
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, use_cache: bool = False, **rest: Any
    ) -> SimpleNamespace:
        output = self.follow(input_ids, cache, "cache")
        output.past_key_values = None
        return output


@pytest.mark.parametrize("release", [Earlier, Between, Later])
def test_texts_go_on_from_the_cache_whatever_its_name(release: type[Sum]) -> None:
    model, tokens = release(), tiny_inputs().arguments["input_ids"]
    mask = torch.ones_like(tokens)
    cache = cache_of(model(tokens[:, :2], mask, use_cache=True))
    rest = model(tokens[:, 2:], mask, **cache_arguments(model, cache))
    torch.testing.assert_close(rest.logits, model(tokens, mask).logits[:, 2:])


@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_each_model_takes_its_cache_by_one_of_the_names(model_type: str) -> None:
    model, inputs = tiny_model(model_type), tiny_inputs()
    output = model(**inputs.arguments, use_cache=True)
    kept = cache_of(output)
    assert kept.get_seq_length() == inputs.length
    (name, _), (use, _) = cache_arguments(model, kept).items()
    assert name in inspect.signature(type(model).forward).parameters
    assert (name in CACHE) and use == "use_cache"


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_every_window_of_a_configuration_is_known(model_type: str) -> None:
    config = tiny_config(model_type).get_text_config()
    sizes = {name for name in config.to_dict() if re.search("window|chunk", name)}
    # Of these one says whether the window is used, one above which layer, one how often, and one is of the MLP.
    others = {"use_sliding_window", "max_window_layers", "_sliding_window_pattern", "chunk_size_feed_forward"}
    assert sizes - others <= {*WINDOWS}


def test_masks_are_taken_within_windows_and_by_attention_that_reads_them() -> None:
    windowed = tiny_model("gemma3_text")
    windowed.config.sliding_window = 6
    assert takes_any_mask(windowed, 6) and not takes_any_mask(windowed, 7)
    plain = tiny_model("llama")
    assert takes_any_mask(plain, 10**6)
    plain.config._attn_implementation = "flash_attention_2"
    assert not takes_any_mask(plain, 1)


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_each_models_blocks_tell_what_recomputes_them(model_type: str) -> None:
    model = tiny_model(model_type).train()
    assert not any(map(checkpoint_of, blocks(model)))
    enable_checkpointing(model, reentrant=False)
    assert all(map(checkpoint_of, blocks(model)))
    assert not any(map(checkpoint_of, blocks(model.eval())))


def test_a_forward_without_a_cache_is_refused_by_name() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor, **rest: Any) -> Tensor:
            return input_ids

    with pytest.raises(
        ValueError, match="Plain's forward names no argument for a cache: none of cache, past_key_value"
    ):
        cache_arguments(Plain(), None)
    assert cache_of(torch.zeros(1)) is None
