"""What makes two models the same: what they compute, whatever their precision, names and release."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from itrain.identity import LARGEST, difference, identity
from itrain.interventions.das import DAS
from itrain.models import BaseModel
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.sharing import CONFIG, ExportError, export, load
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from itrain.weights import WeightError, fingerprint
from tests.models import ALL_TYPES, tiny_config, tiny_inputs, tiny_model

SITE = Site.parse("layer0.block_output@last")


def kept(model: nn.Module) -> dict[str, Any]:
    """The identity as an export holds it."""
    return json.loads(json.dumps(identity(model), allow_nan=False))


def made(model_type: str = "llama", **settings: Any) -> nn.Module:
    """The same weights whatever the settings, where they do not shape them."""
    config = tiny_config(model_type)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_precision_and_a_longer_vocabulary_are_no_difference(model_type: str) -> None:
    model = tiny_model(model_type)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        saved = kept(deepcopy(model).to(dtype))
        for other in (torch.float32, torch.float16, torch.bfloat16):
            assert difference(saved, deepcopy(model).to(dtype).to(other)) is None, (dtype, other)
    longer = deepcopy(model)
    longer.resize_token_embeddings(48, mean_resizing=False)
    assert difference(kept(model), longer) is None
    assert difference(kept(longer), model) is not None


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_copy_that_was_saved_in_float16_is_no_other_model_in_float32(model_type: str) -> None:
    model = tiny_model(model_type)
    copied = deepcopy(model).half().float()
    assert difference(kept(model), copied) is None and difference(kept(copied), model) is None
    assert difference(kept(copied), deepcopy(model).half()) is None
    with torch.no_grad():
        next(copied.parameters())[5].neg_()
    assert difference(kept(model), copied) is not None


def test_one_weight_that_float16_holds_makes_no_comparison_coarser() -> None:
    """As scales and small biases often are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    model[0].bias.data.copy_(model[0].bias.data.half())
    changed = deepcopy(model)
    changed[1].weight.data *= 1.002
    assert difference(kept(model), changed) == "the weight '1.weight'"


def test_a_fingerprint_is_of_the_weights_alone() -> None:
    model = tiny_model("llama")
    found = {fingerprint(deepcopy(model).to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)}
    found |= {fingerprint(made(rms_norm_eps=0.1)), fingerprint(torch.compile(model, backend="eager"))}  # type: ignore[arg-type]
    assert found == {fingerprint(model)}


def rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **settings}}


SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "rope": ("llama", rope(), rope(rope_theta=500000.0), r"rope_parameters.rope_theta 10000.0 -> 500000.0"),
    "rope's type": ("llama", rope(), rope(rope_type="linear", factor=2.0), r"rope_parameters.rope_type default -> lin"),
    "window": ("mistral", {"sliding_window": 4096}, {"sliding_window": 3}, r"sliding_window 4096 -> 3$"),
    "no window": ("mistral", {"sliding_window": None}, {"sliding_window": 3}, r"sliding_window None -> 3$"),
    "activation": ("gpt2", {}, {"activation_function": "relu"}, r"activation_function gelu_new -> relu$"),
    "epsilon": ("llama", {}, {"rms_norm_eps": 1e-2}, r"rms_norm_eps 1e-06 -> 0.01$"),
    "heads": ("gpt2", {}, {"n_head": 2}, r"n_head 4 -> 2$"),
    "scale": ("gpt2", {}, {"scale_attn_by_inverse_layer_idx": True}, r"inverse_layer_idx False -> True$"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_other_settings_on_the_same_weights_are_another_model(setting: str, tmp_path: Path) -> None:
    model_type, before, after, message = SETTINGS[setting]
    model, other = made(model_type, **before), made(model_type, **after)
    assert fingerprint(model) == fingerprint(other)
    assert difference(kept(model), made(model_type, **before)) is None
    search = AlignmentSearch(network=HookedNetwork(model), sites=[SITE], intervention=partial(DAS, rank=2))
    export(search, tmp_path, base_model=BaseModel(model=model))
    load(tmp_path, made(model_type, **before))
    with pytest.raises(ExportError, match=f"this model is another one, .*: .*{message}"):
        load(tmp_path, other)


@pytest.mark.parametrize(
    "name", ["use_cache", "_attn_implementation", "attention_dropout", "pad_token_id", "name_or_path", "architectures"]
)
def test_settings_that_change_nothing_are_no_difference(name: str) -> None:
    values = {"use_cache": False, "_attn_implementation": "eager", "attention_dropout": 0.5, "pad_token_id": 5}
    values |= {"name_or_path": "other", "architectures": ["other"]}
    model = made()
    saved = kept(model)
    setattr(model.config, name, values[name])
    assert difference(saved, model) is None


def test_a_configuration_of_another_release_is_read_by_the_installed_class() -> None:
    """Names of before, defaults that were not written, and names to come."""
    saved = kept(made(**rope(rope_theta=500000.0)))
    settings = saved["configuration"]
    del settings["rope_parameters"], settings["hidden_act"]
    settings.update(rope_theta=500000.0, what_is_to_come=3)
    assert difference(saved, made(**rope(rope_theta=500000.0))) is None
    assert "rope_theta 500000.0 -> 10000.0" in str(difference(saved, made(**rope())))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("place", range(0, 300, 37))
def test_each_row_and_each_column_counts(axis: int, place: int) -> None:
    """Of a matrix of which not all values are looked at."""
    torch.manual_seed(0)
    model, rounded = nn.Linear(300, 1500), nn.Linear(300, 1500).bfloat16()
    rounded.load_state_dict(model.state_dict())
    changed = deepcopy(model)
    with torch.no_grad():
        changed.weight.select(axis, place)[:] = 0
    assert difference(kept(model), rounded) is None
    assert difference(kept(model), changed) == "the weight 'weight'"
    assert difference(kept(rounded), changed) == "the weight 'weight'"
    assert fingerprint(changed) != fingerprint(model) == fingerprint(rounded)


class Own(nn.Module):
    """A module of one's own, with what no weight tells."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh, scale: float = 1.0, eps: float = 1e-5):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.activation = scale, activation
        self.body = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5, eps=eps), nn.BatchNorm1d(5))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * self.activation(self.body(inputs))


def changed(change: Callable[[Own], object]) -> Own:
    model = Own()
    change(model)
    return model


OWN: dict[str, tuple[Own, str]] = {
    "function": (Own(activation=torch.relu), "Own: activation=tanh, scale=1.0 -> activation=relu, scale=1.0"),
    "number": (Own(scale=2.0), "Own: activation=tanh, scale=1.0 -> activation=tanh, scale=2.0"),
    "epsilon": (Own(eps=1e-2), r"body.2: LayerNorm\(\(5,\), eps=1e-05, .* -> LayerNorm\(\(5,\), eps=0.01"),
    "module": (changed(lambda own: own.body.__setitem__(1, nn.ReLU())), r"body.1: GELU\(approximate='none'\) -> ReLU"),
    "buffer": (changed(lambda own: own.body[3].running_mean.add_(1)), "the weight 'body.3.running_mean'"),
    "modules": (changed(lambda own: own.body.append(nn.ReLU())), "6 modules .* -> 7"),
}


@pytest.mark.parametrize("what", OWN)
def test_modules_of_ones_own_are_told_apart_by_their_attributes(what: str) -> None:
    other, message = OWN[what]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(difference(kept(Own()), other))
    assert difference(kept(Own()), Own().double()) is None


@pytest.mark.filterwarnings("ignore:`is_gradient:FutureWarning")
def test_adapters_count_with_their_scale_and_whether_they_act() -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return get_peft_model(tiny_model("llama"), config)

    saved, other, off = kept(adapted()), adapted(), adapted()
    assert difference(saved, adapted()) is None
    for each in other.modules():
        if isinstance(getattr(each, "scaling", None), dict):
            each.scaling["default"] = 7.0
    assert "scaling={'default': 4.0} -> active=['default'], disabled=False, scaling={'default': 7.0}" in str(
        difference(saved, other)
    )
    off.base_model.disable_adapter_layers()
    assert "disabled=True" in str(difference(saved, off))
    assert difference(saved, tiny_model("llama")) == "2 modules that no configuration describes -> 0"


class Int8(nn.Module):
    """A linear layer whose weight is a buffer of integers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("integers", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ (self.scale * self.integers.to(inputs.dtype)).T


def own_int8() -> nn.Module:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp.up_proj = Int8(block.mlp.up_proj).eval()
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TypedStorage.*:UserWarning")
def torch_int8() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(tiny_model("llama"), {nn.Linear}, dtype=torch.qint8)


def offloaded() -> nn.Module:
    """The weights lie on the meta device between runs."""
    return cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("make", [own_int8, torch_int8, offloaded])
def test_quantised_and_offloaded_models_are_exported_and_loaded(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, inputs = make(), tiny_inputs(answer=True)
    network = make_network(model)
    torch.testing.assert_close(network.edit(inputs, [(SITE, lambda base: base)]), network(inputs))
    search = AlignmentSearch(network=HookedNetwork(model), sites=[SITE], intervention=partial(DAS, rank=2))
    export(search, tmp_path, base_model=BaseModel(model=model))
    load(tmp_path, make())
    plain = tiny_model("llama")
    if make is offloaded:
        load(tmp_path, plain)
    else:
        with pytest.raises(ExportError, match="another one"):
            load(tmp_path, plain)


def test_weights_without_values_are_refused_by_name() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 4)
    with pytest.raises(WeightError, match=r"Linear: the weight 'weight' has no values .it is on the meta device"):
        BaseModel(model=model)
    with pytest.raises(WeightError, match="LazyLinear: the weight 'weight' is not initialised; run the model once"):
        BaseModel(model=nn.LazyLinear(3))


HOSTILE: dict[str, dict[str, Any]] = {
    "no weights": {"weights": None},
    "weights of text": {"weights": [["a", "b", "c", "d"]]},
    "too short": {"weights": [[1]]},
    "a large number": {"configuration": {"model_type": "llama", "num_hidden_layers": LARGEST + 1}},
    "a text": {"configuration": "llama"},
    "settings of the wrong kind": {
        "configuration": {"model_type": "llama", "rope_parameters": 3, "num_hidden_layers": "x"}
    },
    "no modules": {"modules": 3},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_damaged_identity_is_refused_in_a_line(what: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    search = AlignmentSearch(network=HookedNetwork(model), sites=[SITE], intervention=partial(DAS, rank=2))
    export(search, tmp_path, base_model=BaseModel(model=model))
    config = json.loads((tmp_path / CONFIG).read_text())
    config["base_model"]["identity"].update(HOSTILE[what])
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ExportError) as refused:
        load(tmp_path, model)
    assert "\n" not in str(refused.value)


def test_an_identity_is_small() -> None:
    """As an export is: of a model of 12 blocks."""
    config = tiny_config("gpt2")
    config.n_layer = 12
    assert sys.getsizeof(json.dumps(identity(AutoModelForCausalLM.from_config(config)))) < 10_000
