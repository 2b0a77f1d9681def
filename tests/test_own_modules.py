"""Modules that are no transformer: recurrent cells, convolutions, perceptrons, modules with several outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from itrain.inputs import ModelInputs
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from tests.models import VOCABULARY, hook_count, sites, tiny_inputs, tiny_model


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head, self.unused = nn.GRUCell(3, 5), nn.Linear(5, 2), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 5)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


def test_a_recurrent_cell_is_read_and_edited_at_one_step():
    torch.manual_seed(0)
    network, inputs = HookedNetwork(Recurrent()), ModelInputs(arguments={"x": torch.randn(2, 4, 3)})
    (site,) = sites("module:cell.output.step1")
    cell, x = network.model.cell, inputs.arguments["x"]
    second = cell(x[:, 1], cell(x[:, 0], torch.zeros(2, 5)))
    assert torch.allclose(network.read(inputs, [site])[site], second)
    expected = network.model.head(cell(x[:, 3], cell(x[:, 2], second + 1)))
    assert torch.allclose(network.edit(inputs, [(site, lambda base: base + 1)]), expected)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("module:cell.output", "called several times in a run; name one call, for example '.step0'"),
        ("module:cell.output.step4", "was called 4 times in this run"),
        ("module:unused.output", "was not called in this run"),
    ],
)
def test_a_site_without_exactly_one_call_is_an_error(site, message):
    network, inputs = HookedNetwork(Recurrent()), ModelInputs(arguments={"x": torch.randn(2, 4, 3)})
    with pytest.raises(RuntimeError, match=message):
        network.read(inputs, sites(site))
    with pytest.raises(RuntimeError, match=message):
        network.edit(inputs, [(site, torch.zeros_like) for site in sites(site)])
    assert hook_count(network.model) == 0


def test_members_share_a_run_of_any_module():
    torch.manual_seed(0)
    network, inputs = HookedNetwork(Recurrent()), ModelInputs(arguments={"x": torch.randn(2, 4, 3)})
    edits = [
        [(site, lambda base, factor=factor: factor * base) for site in sites(f"module:cell.output.step{step}")]
        for factor, step in ((2, 1), (3, 1), (4, 2))
    ]
    alone = torch.stack([network.edit(inputs, each) for each in edits])
    assert (alone[0] - alone[1]).norm() > 0.01
    torch.testing.assert_close(torch.stack(network.edit_each(inputs, edits)), alone)


class TimeFirst(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(self.cell(step)) for step in x.unbind(1)])


def test_members_cannot_share_an_output_without_rows_of_examples():
    network, inputs = HookedNetwork(TimeFirst()), ModelInputs(arguments={"x": torch.randn(2, 3, 3)})
    edits = [(site, torch.neg) for site in sites("module:cell.output.step1")]
    assert network.edit(inputs, edits).shape == (3, 2, 2)
    with pytest.raises(ValueError, match=r"output has shape \(3, 4, 2\) in a run of 4 .* cannot share"):
        network.edit_each(inputs, [edits, edits])


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2))


def test_whole_activations_of_a_convolution():
    network, inputs = HookedNetwork(convolutional()), ModelInputs(arguments={"input": torch.randn(2, 1, 3, 3)})
    (site,) = sites("module:0.output")
    convolved = network.model[0](inputs.arguments["input"]).flatten(2).transpose(1, 2)
    assert (convolved < 0).any()
    assert torch.equal(network.read(inputs, [site])[site], convolved), "the ReLU that follows works in place"
    source = torch.randn(2, 4, 3)
    before, expected = source.clone(), network.model[3](source.transpose(1, 2).relu().flatten(1))
    assert torch.allclose(network.edit(inputs, [(site, lambda _: source)]), expected)
    assert torch.equal(source, before)


def test_whole_activations_of_a_perceptron_and_its_sizes():
    torch.manual_seed(0)
    network = HookedNetwork(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    inputs, (hidden,) = ModelInputs(arguments={"input": torch.randn(4, 3)}), sites("module:1.output")
    assert network.read(inputs, [hidden])[hidden].shape == (4, 5)
    assert network.hidden_size(hidden, inputs) == 5
    with pytest.raises(ValueError, match="ReLU does not tell its size; pass an example input"):
        network.hidden_size(hidden)
    with pytest.raises(ValueError, match="leave the position out"):
        network.read(inputs, [hidden.at("0")])


def test_a_module_with_several_outputs_is_edited_in_its_first():
    network, inputs = HookedNetwork(tiny_model("gpt2")), tiny_inputs()
    attention, base = sites("module:transformer.h.0.attn.output@last", "module:transformer.output@last")
    zeroed = network.edit(inputs, [(attention, torch.zeros_like)])
    assert torch.equal(zeroed, network.edit(inputs, [(Site.parse("layer0.attention_output@last"), torch.zeros_like)]))
    logits = network.edit(inputs, [(base, torch.zeros_like)])
    assert torch.equal(logits[:, -1], torch.zeros(2, VOCABULARY))
    assert torch.equal(logits[:, :-1], network(inputs)[:, :-1])
