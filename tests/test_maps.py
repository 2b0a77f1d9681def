"""Layouts of what is no text: features are never taken for places in maps, patches and sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification

from itrain.inputs import ModelInputs, PositionError
from itrain.interventions.ablation import Mean
from itrain.interventions.controls import FullVector
from itrain.networks.hooks import HookedNetwork
from itrain.training.interchange import Interchange, count_features
from tests.models import COMMON, HIDDEN, pairs, sites


def test_a_map_has_channels_as_features_and_places_in_reading_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)).eval()
    network, image = HookedNetwork(model), torch.randn(2, 1, 8, 8)
    inputs, (conv, pool) = ModelInputs(arguments={"input": image}), sites("module:0.output@12", "module:3.output@3")
    assert count_features(network, [conv, pool], inputs) == [16, 16]
    found = network.read(inputs, [conv, pool])
    assert torch.equal(found[conv][:, 0], model[0](image)[:, :, 1, 4])
    assert torch.equal(found[pool][:, 0], model(image)[:, :, 0, 3])
    expected = model(image)
    expected[:, :, 0, 3] += 1
    assert torch.equal(network.edit(inputs, [(pool, lambda base: base + 1)]), expected)
    whole = network.edit(inputs, [(pool.at(None), lambda base: base + torch.arange(16.0))])
    assert torch.equal(whole, model(image) + torch.arange(16.0)[:, None, None])
    with pytest.raises(PositionError, match=r"position '64' does not exist in example 0, which has 64 tokens"):
        network.read(inputs, [conv.at("64")])


def test_a_block_of_convolutions_is_a_map_and_what_does_not_tell_is_refused() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU())
    network = HookedNetwork(nn.Sequential(block, nn.ReLU(), nn.Flatten()))
    inputs = ModelInputs(arguments={"input": torch.randn(2, 1, 8, 8)})
    inside, relu, flat = sites("module:0.output", "module:1.output", "module:2.output")
    (image,) = sites("module:0.input")
    assert network.read(inputs, [image])[image].shape == (2, 64, 1)
    assert network.read(inputs, [inside])[inside].shape == (2, 36, 5) and network.hidden_size(inside, inputs) == 5
    assert network.hidden_size(flat, inputs) == 180
    with pytest.raises(ValueError, match=r"shape \(2, 5, 6, 6\), in which features cannot be told .* a convolution"):
        network.hidden_size(relu, inputs)
    with pytest.raises(ValueError, match=r"shape \(2, 5, 6, 6\), so it has no positions .* leave the position out, or"):
        network.read(inputs, [relu.at("12")])


def test_members_share_a_run_of_maps() -> None:
    torch.manual_seed(0)
    network = HookedNetwork(nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten()))
    inputs = ModelInputs(arguments={"input": torch.randn(4, 2, 6)})
    edits = [[(site, torch.neg)] for site in sites("module:0.output@1", "module:0.output")]
    alone = [network.edit(inputs, each) for each in edits]
    assert all(torch.equal(*each) for each in zip(network.edit_each(inputs, edits), alone, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_positions_count_patches() -> None:
    config = AutoConfig.for_model(
        "vit", **COMMON, intermediate_size=20, image_size=8, patch_size=2, num_channels=3, num_labels=2
    )
    network = HookedNetwork(AutoModelForImageClassification.from_config(config).eval())
    inputs = ModelInputs(arguments={"pixel_values": torch.randn(2, 3, 8, 8)})
    (path,) = [name for name, _ in network.model.named_modules() if name.endswith(("layer.0", "layers.0"))]
    (site,) = sites(f"module:{path}.output@12")
    whole = network.read(inputs, [site.at(None)])[site.at(None)]
    assert whole.shape == (2, 17, HIDDEN), "16 patches and the class token"
    assert torch.equal(network.read(inputs, [site])[site][:, 0], whole[:, 12])
    part = Interchange(network, sites=site.at("all"), intervention=Mean, hidden_sizes=[HIDDEN])
    part.fit([(inputs, None)])
    torch.testing.assert_close(part.trained[site.at("all")].mean, whole.mean((0, 1)))
    full = Interchange(network, sites=site, intervention=FullVector, hidden_sizes=[HIDDEN])
    source = ModelInputs(arguments={"pixel_values": torch.randn(2, 3, 8, 8)})
    batch = replace(pairs(inputs, source), groups=(("x",), ("y",)), group=torch.tensor([0, 1]))
    answer = full(batch, full.trained)
    assert torch.equal(answer[1], network(inputs)[1]) and not torch.equal(answer[0], network(inputs)[0])


def test_sequences_of_torch_s_own_modules_have_their_examples_first() -> None:
    torch.manual_seed(0)

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x.transpose(0, 1))[0]

    network, inputs = HookedNetwork(TimeFirst()), ModelInputs(arguments={"x": torch.randn(2, 2, 3)})
    (site,) = sites("module:rnn.output@1")
    plain = network.model(inputs.arguments["x"])
    assert torch.equal(network.read(inputs, [site])[site][:, 0], plain[1])
    edited = network.edit(inputs, [(site, torch.zeros_like)])
    assert torch.equal(edited[0], plain[0]) and not edited[1].any()
