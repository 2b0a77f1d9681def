"""Locates sites in models: the row of a model, its blocks, and the module and columns of a site."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from itrain.architectures.table import ARCHITECTURES, Architecture, End
from itrain.layouts import AttentionWeights, Layout, channels_of, layout_of
from itrain.sites import ATTENTION_WEIGHTS, Site


class Location(NamedTuple):
    """A site in a model: the features in some columns of a module's input or output.

    ``columns`` index the last dimension; None stands for all of it. ``hidden_size`` counts the site's features and is
    None where the module does not tell. ``layout`` brings activations that are not (batch, ..., features) to that.
    """

    module: nn.Module
    end: End
    columns: slice | Tensor | None
    hidden_size: int | None
    layout: Layout | None = None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, (distributed) data parallelism and PEFT.

    FSDP2 and adapters injected by PEFT change the model in place and need nothing.
    """
    return layers(model)[-1]


def layers(model: nn.Module) -> list[nn.Module]:
    """The model's wrappers, from the outside, and the model itself."""
    inner: Any = model
    found: list[nn.Module] = []
    while True:
        found.append(inner)
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return found


def architecture(model: nn.Module) -> Architecture | None:
    """The model's row, by its config's ``model_type``; None if the table has none."""
    return ARCHITECTURES.get(_model_type(unwrap(model)))


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's blocks, whatever its head.

    Raises:
        ValueError: the table does not have the model.
    """
    model = unwrap(model)
    row = architecture(model)
    if row is None:
        name = _model_type(model)
        lack = f"model_type '{name}' is not in the table" if name else "it has no config with a model_type"
        raise ValueError(
            f"{type(model).__name__} has no named layers and components: {lack} of itrain.architectures. "
            "Name its modules instead: module:<path>.output or module:<path>.input"
        )
    base: Any = getattr(model, "base_model", model)
    return base.get_submodule(row.blocks)


def locate(model: nn.Module, site: Site) -> Location:
    """The site's module, and which of its columns are the site's.

    Raises:
        ValueError: the model does not have the site; the message names the nearest thing it has.
    """
    model = unwrap(model)
    if site.layer is None:
        return _locate_module(model, site)
    layers, name = blocks(model), _model_type(model)
    components = ARCHITECTURES[name].components
    if site.layer >= len(layers):
        raise ValueError(f"site '{site}': layer {site.layer} does not exist: {name} has layers 0-{len(layers) - 1}")
    if site.component == ATTENTION_WEIGHTS:
        return _locate_weights(model, layers[site.layer].get_submodule(components["attention_input"].path), site)
    if site.component not in components:
        raise ValueError(
            f"site '{site}': {name} has no component '{site.component}'; did you mean "
            f"'{_nearest(site.component, components)}'? It has {', '.join(components)}"
        )
    path, end, heads = components[site.component]
    block = layers[site.layer]
    module, projection = block.get_submodule(path), block.get_submodule(components["attention_value_output"].path)
    # Modules that do not tell their width, such as a block, carry the residual stream's.
    width = _size(module, end) or _size(projection, "output")
    assert width is not None, "an output projection tells its size"
    if heads is None:
        if site.head is not None:
            having = ", ".join(name for name, component in components.items() if component.heads)
            raise ValueError(f"site '{site}': {site.component} has no heads; these have: {having}")
        return Location(module, end, None, width)
    config: Any = model.config
    num_heads = config.get_text_config().num_attention_heads
    columns = heads(torch.arange(width), num_heads, _size(projection, "input") // num_heads)
    if site.head is not None:
        if not 0 <= site.head < len(columns):
            has = f"{site.component} of {name} has heads 0-{len(columns) - 1}"
            raise ValueError(f"site '{site}': head {site.head} does not exist: {has}")
        columns = columns[site.head]
    return Location(module, end, _compact(columns.flatten(), width, module), columns.numel())


def _locate_weights(model: nn.Module, attention: nn.Module, site: Site) -> Location:
    config: Any = model.config
    own = config.get_text_config()
    used = getattr(own, "_attn_implementation", None) or "eager"
    if used != "eager":
        raise ValueError(
            f"site '{site}': {used} attention computes no weights that could be read or edited; load the model with "
            'attn_implementation="eager", or call model.set_attn_implementation("eager")'
        )
    if site.head is not None and not 0 <= site.head < own.num_attention_heads:
        has = f"{_model_type(model)} has heads 0-{own.num_attention_heads - 1}"
        raise ValueError(f"site '{site}': head {site.head} does not exist: {has}")
    return Location(attention, "weights", None, None, AttentionWeights(site.head))


def _locate_module(model: nn.Module, site: Site) -> Location:
    path, _, end = site.component.removeprefix("module:").rpartition(".")
    if site.head is not None:
        raise ValueError(f"site '{site}': a module named by its path has no heads; use a component of the table")
    try:
        module = model.get_submodule(path)
    except AttributeError as missing:
        inside = [name for name, _ in model.named_modules() if name]
        hint = f"did you mean '{_nearest(path, inside)}'?" if inside else "it has none at all"
        raise ValueError(f"site '{site}': {type(model).__name__} has no module '{path}'; {hint}") from missing
    return Location(module, "input" if end == "input" else "output", None, _size(module, end), layout_of(module))


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")


def _nearest(name: str, names: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def _size(module: nn.Module, end: str) -> int | None:
    """Features of a module's input or output, where its attributes tell; transformers' Conv1D calls them nx and nf."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    if isinstance(module, nn.Embedding):
        return module.embedding_dim if end == "output" else None
    if isinstance(module, nn.RNNCellBase):
        return module.hidden_size if end == "output" else module.input_size
    if (channels := channels_of(module, end)) is not None:
        return channels
    names = ("in_features", "nx") if end == "input" else ("out_features", "nf")
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _compact(columns: Tensor, width: int, module: nn.Module) -> slice | Tensor | None:
    """The columns in the form that is cheapest to index with: None for all, a slice for neighbours."""
    if len(columns) == width:
        return None
    first, last = int(columns[0]), int(columns[-1])
    if last - first + 1 == len(columns):
        return slice(first, last + 1)
    device = next(module.parameters()).device
    return columns if device.type == "meta" else columns.to(device)
