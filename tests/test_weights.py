"""Models whose files lack weights, or hold others, are refused by name: nothing is drawn at random in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import BertModel, PreTrainedTokenizerFast

from itrain.models import ModelError, load_pretrained
from itrain.networks.choose import make_network
from tests.models import ALL_TYPES, HIDDEN, sites, tiny_config, tiny_inputs, tiny_model

UP = "model.layers.1.mlp.up_proj.weight"


def saved(folder: Path, model_type: str = "llama", model: torch.nn.Module | None = None) -> str:
    """A folder with a model and a tokenizer."""
    (model or tiny_model(model_type)).save_pretrained(folder)  # type: ignore[operator]
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def damaged(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    name = saved(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "gpt_neox", "llama", "opt"])
def test_a_whole_model_is_loaded(model_type: str, tmp_path: Path) -> None:
    """Tied weights, and buffers that are made anew, are not missing."""
    assert model_type in ALL_TYPES
    assert load_pretrained(name=saved(tmp_path, model_type)).model.config.model_type == model_type


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda weights: weights.pop(UP), f"its files lack '{UP}', which would be drawn at random"),
    "head": (lambda weights: weights.pop("lm_head.weight"), "its files lack 'lm_head.weight', which would be drawn"),
    "two": (lambda weights: (weights.pop(UP), weights.pop("model.norm.weight")), f"lack '{UP}' and 1 more, which"),
    "shape": (lambda weights: weights.update({UP: torch.zeros(3, 3)}), rf"'{UP}' in the shape \(3, 3\), .* \(20, 16\)"),
    "place": (
        lambda weights: weights.update({UP.replace("weight", "bias"): torch.zeros(20)}),
        "'model.layers.1.mlp.up_proj.bias', for which LlamaForCausalLM has no place",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_weights_than_the_models_are_refused(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    with pytest.raises(ModelError, match=message) as refused:
        load_pretrained(name=damaged(tmp_path, change))
    assert "\n" not in str(refused.value)


def test_weights_of_modules_that_the_model_does_not_have_are_left_there(tmp_path: Path) -> None:
    name = damaged(tmp_path, lambda weights: weights.update({"score.weight": torch.zeros(2, HIDDEN)}))
    assert load_pretrained(name=name).name == name


@pytest.mark.parametrize("pooled", [True, False])
def test_an_encoder_without_a_head_is_read_and_gives_no_answers(pooled: bool, tmp_path: Path) -> None:
    """A head drawn at random would answer; and nothing else is drawn, so that the model is the same each time."""
    name = saved(tmp_path, model=BertModel(tiny_config("bert"), add_pooling_layer=pooled).eval())
    with pytest.warns(UserWarning, match="its files have no language-model head, so it has activations and no answers"):
        first, again = (load_pretrained(name=name) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    inputs, (site,) = tiny_inputs(answer=True), sites("layer0.block_output@last")
    for replay in ("auto", "off"):
        network = make_network(first.model, replay=replay)  # type: ignore[arg-type]
        assert network.read(inputs, [site])[site].shape == (2, 1, HIDDEN)
        with pytest.raises(ValueError, match="BertModel has no language-model head"):
            network.edit(inputs, [(site, torch.zeros_like)])
