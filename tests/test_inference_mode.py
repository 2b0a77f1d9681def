"""What was first used in inference mode serves a step with gradients afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from itrain.inputs import ModelInputs
from itrain.networks.choose import make_network
from itrain.sites import Site
from tests.models import tiny_model
from tests.replaying import answer_and_gradients, distance, examples

SITES = [
    "layer0.block_output@word",
    "layer1.attention_value_output.head1@last",
    "layer0.query_output.head2",
    "layer1.mlp_output@2+-2",
]


def use(network: nn.Module, inputs: ModelInputs) -> None:
    """Everything that a validation asks for."""
    for name in SITES:
        site = Site.parse(name)
        network.edit(inputs, [(site, lambda base: 2 * base)])
        network.read(inputs, [site])
    network.edit_each(inputs, [[(Site.parse(name), torch.zeros_like)] for name in SITES])
    assert inputs.keys is not None and inputs.unpadded in (True, False) and inputs.earliest_answer is not None


def made_anew(inputs: ModelInputs) -> ModelInputs:
    """Whose own tensors are of inference mode, as those that a loader makes in a validation."""
    copied = {name: value.clone() for name, value in inputs.arguments.items()}
    spans = {name: value.clone() for name, value in inputs.spans.items()}
    assert inputs.answer is not None and inputs.tokens is not None
    return ModelInputs(arguments=copied, answer=inputs.answer.clone(), tokens=inputs.tokens.clone(), spans=spans)


HOW: dict[str, Callable[[ModelInputs], ModelInputs]] = {
    "same": lambda inputs: inputs,
    "taken": lambda inputs: inputs.take(torch.tensor([2, 0, 1])),
    "moved": lambda inputs: inputs.take(torch.tensor([2, 0, 1])).to("cpu").among(torch.tensor([1, 4, 9])),
    "made": made_anew,
}


@pytest.mark.parametrize("padding", ["unpadded", "left"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["hooks", "trained", "replay"])
def test_inputs_and_networks_serve_training_after_inference_mode(kind: str, how: str, padding: str) -> None:
    def network() -> nn.Module:
        return make_network(
            tiny_model("llama"), replay="auto" if kind == "replay" else "off", trainable=kind == "trained"
        )

    fresh, used = network(), network()
    inputs = examples(padding)
    with torch.inference_mode():
        inputs = HOW[how](inputs)
        use(used, inputs)
    for site in SITES:
        expected = answer_and_gradients(fresh, [site], HOW[how](examples(padding)))
        assert distance(answer_and_gradients(used, [site], inputs), expected) < 1e-5
    if kind == "trained":
        pairs = zip(used.parameters(), fresh.parameters(), strict=True)
        assert all(torch.allclose(ours.grad, theirs.grad, atol=1e-4) for ours, theirs in pairs)  # type: ignore[arg-type]
