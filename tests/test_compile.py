"""Compiled blocks give what plain hooks give, are those that no edit acts within, and never fail in silence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM

from itrain.architectures import blocks
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import CompileError, ReplayNetwork, compiled
from itrain.sites import Site
from tests.models import tiny_config, tiny_inputs, tiny_model
from tests.replaying import answer_and_gradients, distance, examples, replayed

# Said while torch.compile looks at an activation.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

TYPES = ["gpt2", "gpt_neox", "llama"]
SITES = [
    "layer0.block_output@2",
    "layer0.block_output@last",
    "layer0.attention_output@2",
    "layer0.mlp_activation@last",
]
Backend = Callable[[Any], None]


@pytest.fixture(autouse=True, scope="module")
def set_backend() -> Iterator[Backend]:
    """Sets what runs the graphs, at first torch's own operators, so that no C++ is compiled."""
    usual = compiled.BACKEND

    def use(backend: Any) -> None:
        compiled.BACKEND = backend
        compiled.compiled_call.cache_clear()
        torch.compiler.reset()

    use("aot_eager")
    yield use
    use(usual)


@pytest.fixture
def backend(set_backend: Backend) -> Iterator[Backend]:
    """Sets it for one test; the others find each other's graphs."""
    yield set_backend
    set_backend("aot_eager")


def network(model: nn.Module) -> ReplayNetwork:
    made = make_network(model, replay="on", compile=True)
    assert isinstance(made, ReplayNetwork)
    return made


def doubled(network: Any, site: str) -> list[Tensor]:
    """The answer, computed without gradients."""
    with torch.no_grad():
        return [network.edit(examples("left"), [(Site.parse(site), lambda activation: 2 * activation)])]


def check(model_type: str, site: str) -> None:
    ours, base = network(tiny_model(model_type)), examples("left")
    expected = answer_and_gradients(ours.hooked, [site], base)
    for _ in range(3):
        assert distance(answer_and_gradients(ours, [site], base), expected) < 1e-5
        assert distance(doubled(ours, site), doubled(ours.hooked, site)) < 1e-5
    plan = ours.plan([[Site.parse(site)]])
    assert replayed(ours, [site], "suffix") and plan is not None and list(plan.compiled) == [1]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("model_type", [pytest.param("gpt2", marks=pytest.mark.slow), *TYPES[1:]])
def test_compiled_blocks_equal_hooks(model_type: str, site: str) -> None:
    check(model_type, site)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("model_type", TYPES)
def test_blocks_in_machine_code_equal_hooks(model_type: str, backend: Backend) -> None:
    backend("inductor")
    for site in SITES[:2]:
        check(model_type, site)


@pytest.mark.parametrize(
    ("site", "places"),
    [
        ("layer0.block_input@2", [0, 1]),
        ("layer0.block_output@2", [1]),
        ("layer0.attention_output@2", [1]),
        ("layer1.attention_value_output.head1@2", []),
        ("module:gpt_neox.layers.1.mlp.dense_4h_to_h.output@2", []),
        ("layer1.block_output@2", []),
    ],
)
def test_blocks_that_an_edit_acts_within_are_left_as_they_are(site: str, places: list[int], backend: Backend) -> None:
    """And the others do run compiled."""
    runs: list[GraphModule] = []

    def counted(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return lambda *args: runs.append(graph) or graph(*args)

    backend(counted)
    ours, base = network(tiny_model("gpt_neox")), examples()
    expected = answer_and_gradients(ours.hooked, [site], base)
    answer_and_gradients(ours, [site], base)
    runs.clear()
    assert distance(answer_and_gradients(ours, [site], base), expected) < 1e-5
    plan = ours.plan([[Site.parse(site)]])
    assert plan is not None and list(plan.compiled) == places
    assert len(runs) == len(places)


def test_blocks_share_graphs_and_keep_their_weights(backend: Backend) -> None:
    """Of any place, batch and length; the last, whose MLP runs for the answer only, has its own."""
    graphs: list[GraphModule] = []
    backend(lambda graph, inputs: graphs.append(graph) or graph)
    config = tiny_config("llama")
    config.num_hidden_layers = 5
    ours, site = network(AutoModelForCausalLM.from_config(config).eval()), "layer0.block_output@word"
    for lengths in ((7, 5, 6), (9, 8, 9, 6, 7)):
        base = tiny_inputs(lengths, answer=True, spans={"word": torch.tensor([[2, 4]] * len(lengths))})
        expected = answer_and_gradients(ours.hooked, [site], base)
        assert distance(answer_and_gradients(ours, [site], base), expected) < 1e-5
        assert len(graphs) == 2
    with torch.no_grad():
        for parameter in blocks(ours.model)[2].parameters():
            parameter.mul_(1.5)
    changed = answer_and_gradients(ours.hooked, [site], base)
    assert distance(changed, expected) > 1e-3
    assert distance(answer_and_gradients(ours, [site], base), changed) < 1e-5
    assert len(graphs) == 2


def test_members_side_by_side_share_a_run_of_compiled_blocks() -> None:
    """As do others after them, of which there are more."""
    ours, base = network(tiny_model("gpt_neox")), examples("left")
    for factors in ((2.0, 3.0), (4.0, 5.0, 6.0)):
        members = [
            [(Site.parse(site), lambda activation, factor=factor: factor * activation)]
            for factor, site in zip(factors, SITES[:3], strict=False)
        ]
        with torch.no_grad():
            found, expected = ours.edit_each(base, members), ours.hooked.edit_each(base, members)
        assert distance(found, expected) < 1e-5


def test_what_cannot_be_compiled_is_said(backend: Backend) -> None:
    def refuse(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise NotImplementedError("no such operator")

    backend(refuse)
    with pytest.raises(CompileError, match=r"block 1 fails when compiled, .*; network.compile=false leaves") as said:
        answer_and_gradients(network(tiny_model("gpt2")), SITES[:1], examples())
    assert "no such operator" in str(said.value.__cause__)


def test_a_wrong_result_is_said(backend: Backend) -> None:
    # Each example gets another one's result; scaled ones would be the same again after the final norm.
    backend(lambda graph, inputs: lambda *args: tuple(output.roll(1, 0) for output in graph(*args)))
    with pytest.raises(CompileError, match=r"compiled blocks: answer or gradient differs .*; network.compile=false"):
        answer_and_gradients(network(tiny_model("gpt2")), SITES[:1], examples())


def test_compile_without_replay_is_refused() -> None:
    with pytest.raises(ValueError, match="replay is off; leave compile out"):
        make_network(tiny_model("gpt2"), replay="off", compile=True)
    with pytest.raises(ValueError, match="the model's weights are trained; leave compile out"):
        make_network(tiny_model("gpt2"), trainable=True, compile=True)
    assert isinstance(make_network(tiny_model("gpt2"), replay="off"), HookedNetwork)


@pytest.mark.parametrize(
    ("site", "line"),
    [
        ("layer0.block_input@2", "blocks 0-1 and the head, from the first edited token on; 2 blocks compiled; "),
        ("layer0.mlp_output@2", "blocks 0-1 and the head, from the first edited token on; one block compiled; "),
        ("layer1.block_output@2", "the head only, from the first edited token on; nothing compiled; "),
        (
            "layer0.mlp_output",
            "the whole model (a site without a position edits all tokens, and no block lies below); nothing compiled; ",
        ),
        (
            "module:model.norm.output@2",
            "the whole model, under plain hooks (an edited site lies outside the blocks); nothing compiled",
        ),
    ],
)
def test_what_is_compiled_is_said(site: str, line: str) -> None:
    said = make_network(tiny_model("llama"), compile=True).prepare([[Site.parse(site)]], [examples()])
    assert said.startswith(line)
    assert re.search("; (2 blocks|one block|nothing) compiled", said)
