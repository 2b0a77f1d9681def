"""Gradient checkpointing by the network: blocks are computed again in the backward pass, and nothing else changes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from itrain.architectures import ARCHITECTURES, blocks
from itrain.interventions.das import DAS
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from itrain.training.iit import InterchangeInterventionTraining
from tests.models import hook_count, pairs, tiny_inputs, tiny_model

TYPES = ["gpt2", "llama", "gpt_neox"]
EVERY = [(kind, name) for kind in TYPES for name in ARCHITECTURES[kind].components]


def gradients(
    kind: str, component: str, *, trainable: bool, checkpointing: bool, replay: str = "off"
) -> dict[str, Tensor]:
    """Of the rotation and, where it is trained, of the model, after a step of an interchange at the component."""
    model = tiny_model(kind)
    network = make_network(
        model,
        trainable=trainable,
        replay=replay,  # type: ignore[arg-type]
        gradient_checkpointing=checkpointing,
    )
    sites = [f"layer0.{component}@1", f"layer1.{component}@last"]
    torch.manual_seed(0)
    common = {"network": network, "sites": sites, "intervention": partial(DAS, rank=2)}
    batch = pairs(tiny_inputs(answer=True), tiny_inputs(answer=True, seed=1))
    if trainable:
        training = InterchangeInterventionTraining(**common, optimizer=torch.optim.Adam)
        network.train()
        loss = training.interchange_losses(batch)["interchange"].sum() + training.task_loss(batch).sum()
    else:
        training = AlignmentSearch(**common)
        loss = training.interchange(batch, training.trained).square().sum()
    forwards, hooks = [block.forward for block in blocks(model)], hook_count(model)
    loss.backward()
    assert [block.forward for block in blocks(model)] == forwards and hook_count(model) == hooks
    named = {name: each.grad for name, each in training.interchange.named_parameters()}
    named |= {name: each.grad for name, each in model.named_parameters()} if trainable else {}
    return {name: each for name, each in named.items() if each is not None}


def require_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(("kind", "component"), EVERY)
def test_every_component_has_the_gradients_of_a_run_that_keeps_all(kind: str, component: str, trainable: bool) -> None:
    found = gradients(kind, component, trainable=trainable, checkpointing=True)
    require_alike(found, gradients(kind, component, trainable=trainable, checkpointing=False))


@pytest.mark.parametrize("component", ["block_output", "mlp_activation"])
def test_replay_computes_the_blocks_above_the_edits_again(component: str) -> None:
    found = gradients("llama", component, trainable=False, checkpointing=True, replay="on")
    require_alike(found, gradients("llama", component, trainable=False, checkpointing=False))


def test_blocks_run_twice_and_only_where_there_is_a_backward_pass() -> None:
    network, runs = HookedNetwork(tiny_model("llama"), gradient_checkpointing=True), []
    blocks(network.model)[1].mlp.register_forward_pre_hook(lambda *given: runs.append(1))
    site, scale = Site.parse("layer0.block_output@last"), torch.ones((), requires_grad=True)
    answer = network.edit(tiny_inputs(answer=True), [(site, lambda base: base * scale)])
    assert len(runs) == 1
    answer.sum().backward()
    assert len(runs) == 2 and scale.grad is not None
    with torch.no_grad():
        network.edit(tiny_inputs(answer=True), [(site, torch.zeros_like)])
    assert len(runs) == 3


def test_a_setting_that_cannot_act_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing: Linear has no named layers"):
        make_network(nn.Linear(2, 2), gradient_checkpointing=True)
    with pytest.raises(ValueError, match="compile=true and gradient_checkpointing=true exclude each other"):
        make_network(tiny_model("llama"), compile=True, gradient_checkpointing=True)
    network = make_network(tiny_model("llama"), replay="off", gradient_checkpointing=True)
    assert network.prepare([], []) == (
        "the whole model, under plain hooks (replay is off); blocks are computed again in the backward pass"
    )
