"""Reading in a run that is edited: by hand, with hooks and with replay, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from itrain.inputs import ModelInputs
from itrain.networks.base import Network
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import EditAt
from itrain.sites import Site
from tests.models import hook_count, tiny_inputs, tiny_model
from tests.test_recomputation import enable_checkpointing


class Block(nn.Module):
    """Adds to each token what it makes of the sum of those up to it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(hidden.cumsum(1) @ self.weight)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(Block(torch.randn(4, 4, generator=generator).double()) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def site(block: int, position: str) -> Site:
    return Site.parse(f"module:blocks.{block}.output@{position}")


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).double()


def test_collection_under_an_edit_by_hand(hidden: Tensor) -> None:
    """Token 1 is edited above block 0; tokens 1 and 2 change there and above, and token 0 nowhere."""
    model = Blocks()
    network = HookedNetwork(model)
    added = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    sites = [site(0, "1"), site(1, "all"), site(2, "last")]
    found = network.read(ModelInputs(arguments={"hidden": hidden}), sites, [(site(0, "1"), lambda h: h + added)])

    w0, w1, w2 = (block.weight for block in model.blocks)
    one = hidden + torch.tanh(hidden.cumsum(1) @ w0)
    one = torch.stack([one[:, 0], one[:, 1] + added, one[:, 2]], 1)
    two = one + torch.tanh(one.cumsum(1) @ w1)
    three = two + torch.tanh(two.cumsum(1) @ w2)
    expected = [one[:, 1:2], two, three[:, 2:]]
    for where, each in zip(sites, expected, strict=True):
        torch.testing.assert_close(found[where], each, rtol=0, atol=1e-12)
    assert torch.equal(
        two[:, 0], network.read(ModelInputs(arguments={"hidden": hidden}), [site(1, "0")])[site(1, "0")][:, 0]
    )
    (gradient,) = torch.autograd.grad(sum(each.square().sum() for each in found.values()), added)
    (by_hand,) = torch.autograd.grad(sum(each.square().sum() for each in expected), added)
    torch.testing.assert_close(gradient, by_hand, rtol=0, atol=1e-12)
    assert hook_count(model) == 0


def test_a_site_is_read_after_its_edits_and_before_those_above(hidden: Tensor) -> None:
    network, inputs = HookedNetwork(Blocks()), ModelInputs(arguments={"hidden": hidden})
    here = site(1, "last")
    plain = network.read(inputs, [here])[here]
    edits = [(here, lambda h: h + 1), (here, lambda h: 2 * h), (site(2, "last"), torch.zeros_like)]
    assert torch.equal(network.read(inputs, [here], edits)[here], 2 * (plain + 1)), "in the order given"
    assert torch.equal(network.read(inputs, [here], edits[2:])[here], plain)
    for stop_early in (False, True):
        assert torch.equal(network.read(inputs, [here], edits[2:], stop_early=stop_early)[here], plain)


def test_an_edit_of_a_response_does_not_reach_what_is_read_of_the_prompt() -> None:
    """The first 4 tokens are the prompt, and the last 2 the response, which counts as generated."""
    network, whole = HookedNetwork(tiny_model("gpt2")), tiny_inputs((6, 6))
    inputs = replace(whole, tokens=torch.tensor([[0, 4], [0, 4]]), stop=torch.tensor([6, 6]))
    edit, prompt = (Site.parse(f"layer0.block_output@{position}") for position in ("last", "all"))
    plain = network.read(inputs, [prompt])[prompt]
    for acts in ("generated", (0,)):
        found = network.read(inputs, [prompt], [EditAt(edit, torch.zeros_like, acts)])
        assert torch.equal(found[prompt], plain)
    acting = network.read(inputs, [prompt], [EditAt(edit, torch.zeros_like, "all")])[prompt]
    assert torch.equal(acting[:, :3], plain[:, :3]) and not acting[:, 3].any()


def test_an_edit_that_never_acts_is_an_error(hidden: Tensor) -> None:
    model = Blocks()
    model.spare = nn.Linear(4, 4)
    network = HookedNetwork(model)
    with pytest.raises(RuntimeError, match=r"spare\.output': its module was not called"):
        network.read(
            ModelInputs(arguments={"hidden": hidden}),
            [site(1, "last")],
            [(Site.parse("module:spare.output"), lambda h: h)],
        )


def test_a_model_without_a_head_is_read_under_edits() -> None:
    network = HookedNetwork(tiny_model("gpt2", head="none"))
    read, edit = (Site.parse(text) for text in ("layer1.block_output@last", "layer0.block_output@first"))
    inputs = tiny_inputs(answer=True)
    found = network.read(inputs, [read], [(edit, torch.zeros_like)])[read]
    assert not torch.allclose(found, network.read(inputs, [read])[read])


MAKES: dict[str, Callable[[nn.Module], Network]] = {
    "hooks": HookedNetwork,
    "replay": lambda model: make_network(model, replay="on"),
}


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma3_text"])
@pytest.mark.parametrize("left", [False, True])
def test_replay_reads_what_hooks_read_whatever_was_kept(model_type: str, left: bool) -> None:
    model = tiny_model(model_type)
    inputs = tiny_inputs((6, 4), left=left, answer=True)
    edit, lower, same, upper = (
        Site.parse(text)
        for text in (
            "layer0.mlp_output@1",
            "layer0.block_input@all",
            "layer0.block_output@1",
            "layer1.attention_output@last",
        )
    )
    scale = torch.tensor(3.0, requires_grad=True)
    results: dict[str, list[Tensor]] = {}
    for name, make in MAKES.items():
        network = make(model)
        network.prepare([[edit]], [inputs], [inputs])
        plain = network.read(inputs, [lower, same, upper])
        found = network.read(inputs, [lower, same, upper], [(edit, lambda h: h + scale * torch.arange(16))])
        assert torch.equal(found[lower], plain[lower]) and not torch.allclose(found[upper], plain[upper])
        again = network.read(inputs, [lower, same, upper])
        assert all(torch.equal(again[where], plain[where]) for where in plain), "nothing edited was kept"
        results[name] = [*found.values(), torch.autograd.grad(found[upper].sum(), scale)[0]]
    for one, other in zip(results["hooks"], results["replay"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_checkpointed_chain_carries_its_gradient_or_is_refused() -> None:
    """Reentrant checkpointing runs a block without gradients, so that the edits below would not learn."""
    edit, read = (Site.parse(text) for text in ("layer0.mlp_output@1", "layer1.mlp_output@last"))
    gradients = []
    for reentrant in (None, False, True):
        model = tiny_model("llama").train()
        if reentrant is not None:
            enable_checkpointing(model, reentrant=reentrant)
        network = HookedNetwork(model, trainable=True)
        model.requires_grad_(False)
        scale = torch.tensor(2.0, requires_grad=True)

        def collected(network: Network = network, scale: Tensor = scale) -> Tensor:
            return network.read(tiny_inputs(), [read], [(edit, lambda h: h * scale)])[read]

        if reentrant:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                collected()
        else:
            gradients.append(torch.autograd.grad(collected().square().sum(), scale)[0])
    torch.testing.assert_close(*gradients)
