"""The randomly initialised twin of a base model: other weights, all else alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from itrain.models import BaseModel, ModelError, load_embedded, with_random_weights
from tests.models import tiny_model
from tests.planted import Planted


def planted() -> BaseModel:
    return BaseModel(model=Planted(), name="planted")


BASES = {
    "tiny world": load_embedded,
    "planted": planted,
    **{each: lambda each=each: BaseModel(model=tiny_model(each)) for each in ("gpt2", "llama", "bert")},
}
each_base = pytest.mark.parametrize("make", BASES.values(), ids=list(BASES))


@each_base
def test_a_twin_has_other_weights_of_the_same_shapes_and_leaves_the_original_alone(make) -> None:
    base, state = make(), torch.get_rng_state()
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    twin = with_random_weights(base, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(twin.model) is type(base.model) and twin.tokenizer is base.tokenizer
    for (name, weight), (other, drawn) in zip(
        base.model.named_parameters(), twin.model.named_parameters(), strict=True
    ):
        assert (other, drawn.shape, drawn.dtype) == (name, weight.shape, weight.dtype)
        assert weight.ndim == 1 or (not torch.equal(drawn, weight) and drawn.data_ptr() != weight.data_ptr()), name
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.state_dict().items())


@each_base
def test_a_seed_gives_one_twin(make) -> None:
    prints = [with_random_weights(make(), seed=seed).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_a_twin_keeps_precision_mode_and_tied_weights() -> None:
    model = tiny_model("gpt2").to(torch.bfloat16)
    twin = with_random_weights(BaseModel(model=model), seed=0).model
    assert {weight.dtype for weight in twin.parameters()} == {torch.bfloat16}
    assert twin.training == model.training
    assert twin.lm_head.weight is twin.transformer.wte.weight


def test_a_model_that_cannot_be_initialised_anew_is_told() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(ModelError, match=r"Own at '1' has weights and no reset_parameters\(\).*random_model=false"):
        with_random_weights(BaseModel(model=nn.Sequential(nn.Linear(3, 3), Own())), seed=0)
    added = tiny_model("gpt2")
    added.added = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="not those of its architecture"):
        with_random_weights(BaseModel(model=added), seed=0)
