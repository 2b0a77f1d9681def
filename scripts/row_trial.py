"""Tries a row of the table of architectures on a tiny random model; for architecture_table.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from tiny_models import CONFIG_MAPPING_NAMES, CONFIGS, FIRST, INSIDE, MORE, VOCABULARY, row_model
from torch import Tensor, nn

from itrain.architectures import ARCHITECTURES, blocks, has
from itrain.inputs import ModelInputs, TwoTexts
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.sites import ATTENTION_WEIGHTS, Site

CLOSE = 1e-5


class RowError(AssertionError):
    """A row does not hold what it says."""


def require(holds: bool, model_type: str, what: object) -> None:
    """Say which row does not hold what it says.

    Raises:
        RowError: it does not.
    """
    if not holds:
        raise RowError(f"row '{model_type}' of itrain.architectures: {what}")


def text(length: int, *, seed: int) -> ModelInputs:
    """Two random texts, of which the last token answers."""
    ids = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))
    whole = torch.tensor([[0, length]]).expand(2, 2)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return ModelInputs(arguments=arguments, answer=whole[:, 1] - 1, tokens=whole)


def inputs_of(model: nn.Module, *, seed: int) -> ModelInputs:
    """What the model is given: a text, two texts for an encoder and a decoder, an image, a spectrogram."""
    config: Any = model.config
    row, main = ARCHITECTURES[config.model_type], getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(seed)
    own = getattr(config, "vision_config", config)
    if main == "input_features":
        size = (2, own.num_mel_bins, 2 * own.max_source_positions)
        return ModelInputs(arguments={main: torch.randn(size, generator=generator)})
    image = {}
    if main == "pixel_values" or (row.stacks and own is not config):
        size = (2, own.num_channels, own.image_size, own.image_size)
        image = {"pixel_values": torch.randn(size, generator=generator)}
    if main == "pixel_values":
        return ModelInputs(arguments=image)
    if "decoder" in row.stacks:
        return TwoTexts.of(text(6, seed=seed), text(4, seed=seed + 7))
    found = text(6, seed=seed)
    return replace(found, arguments={**found.arguments, **image}) if image else found


def try_row(model_type: str) -> str | None:
    """Try all that the page says of a row; return why it cannot be tried with the installed transformers.

    Raises:
        RowError: the row does not hold.
    """
    if model_type not in CONFIG_MAPPING_NAMES:
        return "this release has no such model"
    if model_type not in {*FIRST, *CONFIGS, *INSIDE, "gemma3"}:
        return "scripts/tiny_models.py builds none"
    model = tiny(model_type)
    base = inputs_of(model, seed=0)
    try:
        model(**base.arguments)
    except AttributeError as error:
        return f"it cannot run its own model: {error}"
    models = [model, *([row_model(model_type, **MORE[model_type])] if model_type in MORE else [])]
    _try_streams(model_type, model)
    _try_components(model_type, [HookedNetwork(each) for each in models])
    _try_weights(model_type)
    return None


@lru_cache(maxsize=1)
def tiny(model_type: str) -> nn.Module:
    return row_model(model_type)


def _try_streams(model_type: str, model: nn.Module) -> None:
    """Block by block: reads are transformers' hidden states, edits are those of a hook written by hand."""
    network, base, source = HookedNetwork(model), inputs_of(model, seed=0), inputs_of(model, seed=1)
    output = model(**base.arguments, output_hidden_states=True)
    for stack in ARCHITECTURES[model_type].stacks or [None]:
        named = "block_output" if stack is None else f"{stack}.block_output"
        sites = [Site(layer=layer, component=named) for layer in range(len(blocks(model, stack)))]
        hidden = list(_returned(output, "hidden_states", stack))
        values = network.read(source, sites)
        for site, found in list(network.read(base, sites).items())[:-1]:  # a norm may follow the last one
            require(any(_equal(found, each) for each in hidden), model_type, f"{site} is no hidden state")
        for layer, site in enumerate(sites):
            edited = network.edit(base, [(site, partial(_put, values[site]))])
            handle = blocks(model, stack)[layer].register_forward_hook(partial(_by_hand, values[site]))
            expected = network(base)
            handle.remove()
            require(_distance(edited, expected) < CLOSE, model_type, f"an edit of {site} differs from a hook's")
            require(_distance(edited, network(base)) > CLOSE, model_type, f"an edit of {site} changes nothing")


def _put(value: Tensor, base: Tensor) -> Tensor:
    return value


def _by_hand(value: Tensor, module: nn.Module, arguments: Any, output: Any) -> Any:
    return value if isinstance(output, Tensor) else (value, *output[1:])


def _returned(output: Mapping[str, Any], kind: str, stack: str | None) -> Iterator[Any]:
    """The hidden states or attentions that a model returned, of a stack if it has several."""
    for name, value in output.items():
        if stack is None or name.startswith(stack):
            if isinstance(value, Mapping):
                yield from _returned(value, kind, None)
            elif name.endswith(kind) and isinstance(value, tuple):
                yield from value


def _try_components(model_type: str, networks: list[HookedNetwork]) -> None:
    """Each component is had by some block, has its size, and an edit of it changes the answer."""
    for component in ARCHITECTURES[model_type].components:
        stack = component.rpartition(".")[0] or None
        places = [
            (network, site)
            for network in networks
            for layer in range(len(blocks(network.model, stack)))
            if has(network.model, site := Site(layer=layer, component=component))
        ]
        require(bool(places), model_type, f"no block has {component}")
        network, site = places[0]
        base = inputs_of(network.model, seed=0)
        found, before = network.read(base, [site])[site], network(base)
        require(found.shape[-1] == network.hidden_size(site), model_type, f"{site} has another size than it says")
        same = network.edit(base, [(site, lambda base: base)])
        require(_distance(same, before) < CLOSE, model_type, f"what {site} holds, put back, changes the answer")
        noise = 10 * torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
        changed = network.edit(base, [(site, lambda base, noise=noise: base + noise)])
        require(_distance(changed, before) > CLOSE, model_type, f"an edit of {site} changes nothing")


def replay_of(model_type: str) -> str:
    """How much of a run is skipped, and why no more, once replay has been compared with hooks.

    Raises:
        RowError: replay and hooks differ.
    """
    model = tiny(model_type)
    network = make_network(model)
    if isinstance(network, HookedNetwork):
        return f"none: {network.why}"
    assert isinstance(network, ReplayNetwork), "the model is in this process"
    base = inputs_of(model, seed=0)
    site = Site(layer=0, component="block_output", position=None if base.tokens is None else "last")
    value = network.hooked.read(inputs_of(model, seed=1), [site])[site]
    expected = network.hooked.edit(base, [(site, partial(_put, value))])
    for _ in range(3):  # compared at first, filled then, replayed at last
        found = network.edit(base, [(site, partial(_put, value))])
        require(_distance(found, expected) < CLOSE, model_type, "replay differs from hooks")
    (choice,) = network.levels([[site]])
    level = "none" if choice.level == "stop" else choice.level
    return f"{level}: {choice.reason}" if choice.reason else level


def _try_weights(model_type: str) -> None:
    """Attention weights are those that transformers returns, of the blocks that have any."""
    row = ARCHITECTURES[model_type]
    stacks = [f"{each}." for each in row.stacks] or [""]
    if not row.weights or f"{stacks[0]}attention_input" not in row.components:
        return
    model = row_model(model_type, attention="eager")
    network, base = HookedNetwork(model), inputs_of(model, seed=0)
    output = model(**base.arguments, output_attentions=True)
    for stack in stacks:
        place = Site(layer=0, component=f"{stack}{ATTENTION_WEIGHTS}")
        layers = range(len(blocks(model, place.stack)))
        sites = [site for layer in layers if has(model, site := replace(place, layer=layer))]
        theirs = [each for each in _returned(output, "attentions", place.stack) if each is not None]
        require(bool(sites), model_type, f"no block has {place.component}")
        for site, found in network.read(base, sites).items():
            mine = [each for each in theirs if _equal(found, each.transpose(1, 2).flatten(2))]
            require(bool(mine), model_type, f"{site} differs from what transformers returns")


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
