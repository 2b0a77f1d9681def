"""What tests of replay share: edits, texts, and the answer and gradients that two networks have to agree on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from itrain.architectures import ARCHITECTURES
from itrain.inputs import ModelInputs
from itrain.networks.replay import ReplayNetwork
from itrain.sites import Site
from tests.models import tiny_inputs

PADDINGS = {"unpadded": ((7, 7, 7, 7), False), "right": ((7, 5, 6, 5), False), "left": ((7, 5, 6, 5), True)}
EDITED = {
    "one token": ["layer0.block_output@2"],
    "last token": ["layer0.block_output@last"],
    "last block": ["layer1.block_output@last"],
    "own tokens": ["layer1.block_input@word.first"],
    "ragged": ["layer0.block_output@word"],
    "first block": ["layer0.attention_output@2"],
    "several tokens": ["layer1.mlp_output@2+-2"],
    "one head": ["layer1.attention_value_output.head1@word"],
    "two sites": ["layer1.attention_output@last", "layer0.block_output@word"],
}
HERE = ["layer0.block_output@word"]


def examples(padding: str = "unpadded", seed: int = 0) -> ModelInputs:
    """Texts with a span ``word`` of one to three tokens, in other places in each."""
    lengths, left = PADDINGS[padding]
    start = torch.tensor([2, 1, 3, 2])
    spans = torch.stack([start, start + torch.tensor([1, 3, 2, 1])], 1)
    first = max(lengths) - torch.tensor(lengths) if left else torch.zeros(len(lengths), dtype=torch.long)
    return tiny_inputs(lengths, left=left, answer=True, spans={"word": spans + first[:, None]}, seed=seed)


def answer_and_gradients(
    network: nn.Module, sites: Sequence[str], base: ModelInputs, source: ModelInputs | None = None
) -> list[Tensor]:
    """The answer under a low-rank interchange at each site, and its gradient in the interchanges' weights."""
    places = [Site.parse(site) for site in sites]
    precision = torch.promote_types(next(network.parameters()).dtype, torch.float32)
    torch.manual_seed(1)
    sizes = [network.hidden_size(site, base) for site in places]
    weights = [torch.randn(size, 2, dtype=precision).to(base.device).requires_grad_() for size in sizes]
    sources = network.read(base if source is None else source, places)

    def swap(weight: Tensor, source: Tensor, base: Tensor) -> Tensor:
        return base + (source - 0.5 * base) @ weight @ weight.T

    edits = [(site, partial(swap, weight, sources[site])) for site, weight in zip(places, weights, strict=True)]
    answer = network.edit(base, edits)
    answer.float().square().sum().backward()
    return [answer.detach().float(), *(weight.grad for weight in weights)]


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(ours, theirs, strict=True))


def replayed(network: ReplayNetwork, sites: Sequence[str], level: str) -> bool:
    """Whether the sites were replayed at the level, and passed the comparison with hooks."""
    plan = network.plan([[Site.parse(site) for site in sites]])
    return plan is not None and plan.choice.level == level and (level, False, True) in plan.agreed


def has(model_type: str, sites: Sequence[str]) -> bool:
    return all(Site.parse(site).component in ARCHITECTURES[model_type].components for site in sites)


def mixed_up(network: ReplayNetwork) -> None:
    """Give each example what was kept of another."""
    for store in network.stores:
        store.spans = store.spans.roll(1, 0)


def vars_of(inputs: ModelInputs) -> dict:
    return {name: getattr(inputs, name) for name in ("arguments", "answer", "tokens", "spans")}


def cost(network: nn.Module, sites: Sequence[str], base: ModelInputs, source: ModelInputs) -> int:
    """The floating-point operations of a step."""
    with FlopCounterMode(display=False) as counter:
        answer_and_gradients(network, sites, base, source)
    return counter.get_total_flops()
