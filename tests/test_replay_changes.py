"""Replay forgets what it kept of a model that has changed, however that was done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.networks.replay.plan import AGAIN
from itrain.sites import Site
from tests.models import CAUSAL_TYPES, tiny_config, tiny_inputs, tiny_model
from tests.replaying import HERE, answer_and_gradients, distance, examples, replayed

LOW = "model.layers.0."
"""The block below the edit, whose output replay keeps."""
SITE = Site.parse(HERE[0])
Change = Callable[[LlamaForCausalLM], object]


def adapted() -> nn.Module:
    """A model with two adapters, both of which change what it computes."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), config)
    model.add_adapter("other", config)
    return model.eval()


def warm(model: nn.Module) -> ReplayNetwork:
    """A network that has kept what it needs of the examples, and has just looked at the model."""
    network = make_network(model)
    assert isinstance(network, ReplayNetwork)
    for _ in range(2):
        answer_and_gradients(network, HERE, examples(), examples(seed=1))
    assert replayed(network, HERE, "suffix")
    return network


def off(network: ReplayNetwork) -> float:
    """How far replay is from plain hooks."""
    expected = answer_and_gradients(network.hooked, HERE, examples(), examples(seed=1))
    return max(distance(answer_and_gradients(network, HERE, examples(), examples(seed=1)), expected) for _ in range(2))


def checks_a_change(model: nn.Module, change: Callable[[nn.Module], object]) -> None:
    network = warm(model)
    before = answer_and_gradients(network.hooked, HERE, examples(), examples(seed=1))
    change(network.model)
    after = answer_and_gradients(network.hooked, HERE, examples(), examples(seed=1))
    assert distance(after, before) > 1e-3, "the change matters"
    assert off(network) < 1e-5


def in_inference_mode(model: LlamaForCausalLM) -> None:
    with torch.inference_mode():
        model.model.layers[0].mlp.up_proj.weight.mul_(3)


def other_forward(model: LlamaForCausalLM) -> None:
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: 3 * forward(hidden)


def other_bound_forward(model: LlamaForCausalLM) -> None:
    norm = model.model.layers[0].input_layernorm
    norm.forward = MethodType(lambda self, hidden: self.weight * hidden, norm)


def other_class(model: LlamaForCausalLM) -> None:
    mlp = model.model.layers[0].mlp
    kind = type(mlp)
    mlp.__class__ = type("Twice", (kind,), {"forward": lambda self, hidden: 2 * kind.forward(self, hidden)})


def other_block(model: LlamaForCausalLM) -> None:
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Tanh()).eval()


CHANGES: dict[str, Change] = {
    "weight": lambda model: model.get_parameter(f"{LOW}mlp.up_proj.weight").detach().mul_(3),
    "weight in inference mode": in_inference_mode,
    "weight's data exchanged": lambda model: setattr(
        model.model.layers[0].mlp.up_proj.weight, "data", 3 * model.model.layers[0].mlp.up_proj.weight.data
    ),
    "buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    "buffer exchanged": lambda model: setattr(model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq * 2),
    "forward": other_forward,
    "bound forward": other_bound_forward,
    "class": other_class,
    "module": other_block,
    "activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.ReLU().eval()),
    "function": lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.tanh),
    "epsilon": lambda model: setattr(model.model.layers[0].input_layernorm, "variance_epsilon", 1.0),
    "scale of attention": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 5.0),
    "scale of rotary embedding": lambda model: setattr(model.model.rotary_emb, "attention_scaling", 3.0),
    "hook": lambda model: model.model.layers[0].register_forward_hook(lambda module, args, output: 2 * output),
    "pre-hook": lambda model: model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_at_once(change: str) -> None:
    model = tiny_model("llama")
    if change in ("activation", "function"):
        # transformers' modules are no functions; a module's place can be taken by one all the same.
        del model.model.layers[0].mlp._modules["act_fn"]
        model.model.layers[0].mlp.act_fn = torch.nn.functional.silu
    checks_a_change(model, CHANGES[change])


ADAPTERS: dict[str, Callable[[nn.Module], object]] = {
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "switched": lambda model: (model.set_adapter("other"), model.requires_grad_(False)),
    "rescaled in place": lambda model: [each.scaling.update(default=9.0) for each in lora_layers(model)],
    "rescaled": lambda model: [each.scale_layer(4.0) for each in lora_layers(model)],
    "merged": lambda model: (lora_layers(model)[0].scaling.update(default=9.0), model.merge_adapter()),
    "removed": lambda model: (model.delete_adapter("default"), model.set_adapter("other"), model.requires_grad_(False)),
}


def lora_layers(model: nn.Module) -> list:
    return [each for each in model.modules() if isinstance(getattr(each, "scaling", None), dict)]


@pytest.mark.filterwarnings("ignore:Adapter default was active:UserWarning", "ignore:`is_gradient:FutureWarning")
@pytest.mark.parametrize("change", ADAPTERS)
def test_a_change_of_adapters_is_noticed_at_once(change: str) -> None:
    checks_a_change(adapted(), ADAPTERS[change])


@pytest.mark.filterwarnings("ignore:`is_gradient:FutureWarning")
def test_a_model_is_compared_with_and_without_its_adapter() -> None:
    """Turn by turn, as for base against finetuned."""
    model = adapted()
    network = warm(model)
    for disabled in (True, False, True):
        with model.disable_adapter() if disabled else nullcontext():
            assert off(network) < 1e-5


@pytest.mark.parametrize(("name", "value"), [("final_logit_softcapping", 2.0), ("sliding_window", 2)])
def test_a_change_of_the_configuration_is_noticed_at_once(name: str, value: object) -> None:
    """Of what is read in each run, in parts of the configuration too."""
    config = tiny_config("gemma2")
    config.layer_types = ["sliding_attention", "sliding_attention"]
    network = warm(AutoModelForCausalLM.from_config(config).eval())
    setattr(network.model.config, name, value)
    assert not network._state.holds()
    assert off(network) < 1e-5


def test_hooks_on_all_modules_are_noticed() -> None:
    network = warm(tiny_model("llama"))
    block = network.model.model.layers[0].mlp
    handle = register_module_forward_hook(lambda module, args, output: 2 * output if module is block else None)
    try:
        assert off(network) == 0
        assert "hooks on all modules" in network.prepare([[SITE]], [examples()])
    finally:
        handle.remove()
    assert off(network) < 1e-5 and replayed(network, HERE, "suffix")


def test_backward_hooks_see_all_they_should() -> None:
    network = warm(tiny_model("llama"))
    network.model.model.layers[1].register_full_backward_hook(lambda module, into, out: (2 * into[0],))
    assert off(network) == 0


@contextmanager
def untraced(model: nn.Module) -> Iterator[None]:
    """A change of every weight of a module that leaves no trace."""
    weight = model.get_parameter(f"{LOW}mlp.up_proj.weight")
    version = weight._version
    weight.data.mul_(3)
    assert weight._version == version
    yield


@pytest.mark.parametrize("where", ["prepare", "idle", "runs"])
def test_a_write_without_a_trace_is_noticed_by_values(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = warm(tiny_model("llama"))
    network._patience = 1e9
    with untraced(network.model):
        assert off(network) > 1e-3, "not at once"
    if where == "prepare":
        with pytest.warns(UserWarning, match="changed without a trace .its weights have other values"):
            network.prepare([[SITE]], [examples()], [examples(seed=1)])
    elif where == "idle":
        network._patience = 0
    else:
        network._looks = AGAIN
    with pytest.warns(UserWarning, match="changed without a trace") if where != "prepare" else nullcontext():
        assert off(network) < 1e-5
    assert replayed(network, HERE, "suffix")


def test_weights_of_inference_mode_are_looked_at_too() -> None:
    """They have no version."""
    with torch.inference_mode():
        network = make_network(tiny_model("llama"))
        for _ in range(2):
            network.edit(examples(), [(SITE, lambda base: 2 * base)])
        network.model.model.layers[0].mlp.up_proj.weight.mul_(3)
        expected = network.hooked.edit(examples(), [(SITE, lambda base: 2 * base)])
        network._patience = 0
        with pytest.warns(UserWarning, match="changed without a trace"):
            assert distance([network.edit(examples(), [(SITE, lambda base: 2 * base)])], [expected]) < 1e-5


def test_another_function_that_forwards_call_is_noticed_by_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """For edits, and for activations that are read."""
    network = warm(tiny_model("llama"))
    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", lambda q, k, *rest: (q, k))
    assert off(network) > 1e-3, "not at once"
    network._reads = AGAIN
    with pytest.warns(UserWarning, match="changed without a trace .other activations at 'layer0.block_output@word'"):
        assert off(network) < 1e-5
    monkeypatch.undo()
    plan = network.plan([[SITE]])
    assert plan is not None
    plan.since = AGAIN
    with pytest.warns(UserWarning, match="changed without a trace .answer or gradient differs"):
        network.edit(examples(), [(SITE, lambda base: 2 * base)])
    assert off(network) < 1e-5 and replayed(network, HERE, "suffix")


@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_what_is_not_changed_is_not_dropped(model_type: str) -> None:
    """A model's own runs, and looks at it, leave what was kept."""
    network = warm(tiny_model(model_type))
    kept = list(network.stores)
    network._patience, network._looks, network._reads = 0, AGAIN, AGAIN
    network.plan([[SITE]]).since = AGAIN  # type: ignore[union-attr]
    assert off(network) < 1e-5
    assert all(now is then for now, then in zip(network.stores, kept, strict=True))
    assert all(store.used for store in kept)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_texts_that_change_the_rotary_embedding_are_left_to_hooks(rope_type: str) -> None:
    """And shorter ones are replayed, before and after."""
    config = tiny_config("llama")
    config.max_position_embeddings = 16
    more = {"factor": 2.0} if rope_type == "dynamic" else {"short_factor": [1.0, 1.0], "long_factor": [3.0, 2.0]}
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4, "original_max_position_embeddings": 8, **more}
    torch.manual_seed(0)
    network = make_network(AutoModelForCausalLM.from_config(config).eval())
    assert isinstance(network, ReplayNetwork)
    long, short = tiny_inputs((14, 12), answer=True), tiny_inputs((6, 5), answer=True, seed=1)
    where = ["layer0.block_output@last"]
    for inputs in (short, long, short, long, short):
        expected = answer_and_gradients(HookedNetwork(network.model), where, inputs)
        assert distance(answer_and_gradients(network, where, inputs), expected) < 1e-5
    assert replayed(network, where, "suffix")
    line = network.prepare([[Site.parse(where[0])]], [long])
    assert "rotary embedding depends on the longest text of a run from 8 tokens on" in line
