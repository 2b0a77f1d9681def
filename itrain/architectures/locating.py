"""Locates sites in models: the row of a model, its blocks, and the module and columns of a site."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from itrain.architectures.parts import Architecture, End
from itrain.architectures.registering import GivenRow, described_row, model_type_of, nearest, parse_row, row_of
from itrain.layouts import AttentionWeights, Layout, channels_of, layout_of
from itrain.sites import ATTENTION_WEIGHTS, Site

WHOLE_ENDS = "_itrain_whole_ends"
"""Where a module in which tensor parallelism splits activations says which ends of it have them whole."""


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
    """The model's row: given with it, registered for its class or its config's ``model_type``, or the table's."""
    return row_of(unwrap(model))


def blocks(model: nn.Module, stack: str | None = None) -> nn.ModuleList:
    """The model's blocks, whatever its head: of all its stacks, one after the other, or of one.

    Raises:
        ValueError: the table does not have the model, or its row from outside names no list of blocks.
    """
    model = unwrap(model)
    row = architecture(model)
    if row is None:
        name = model_type_of(model)
        table = f"model_type '{name}' is not in the table of itrain.architectures"
        lack = table if name else "it has no config with a model_type"
        raise ValueError(
            f"{type(model).__name__} has no named layers and components: {lack}. "
            "Add its row by itrain.register_architecture or model.components, or name its modules instead: "
            "module:<path>.output or module:<path>.input"
        )
    if isinstance(row, GivenRow):
        return _given_blocks(model, row.blocks)
    base: Any = getattr(model, "base_model", model)
    if stack is not None:
        return _first(base, row.stacks[stack])
    if row.stacks:
        # A classifier of images has the one tower alone.
        found = [_submodule(base, path) for path in row.stacks.values()]
        return nn.ModuleList(block for each in found if isinstance(each, nn.ModuleList) for block in each)
    return _first(base, row.blocks)


def _given_blocks(model: nn.Module, path: str) -> nn.ModuleList:
    """The blocks at the path of a row from outside, from the model without its head or with it.

    Raises:
        ValueError: there is no list of modules.
    """
    starts = [getattr(model, "base_model", model)] if model_type_of(model) else []
    modules = (_submodule(start, path) for start in (*starts, model))
    found = next((each for each in modules if each is not None), None)
    if isinstance(found, nn.ModuleList | nn.Sequential) and len(found):
        return found if isinstance(found, nn.ModuleList) else nn.ModuleList(found)
    lists = [each for each, part in model.named_modules() if each and isinstance(part, nn.ModuleList | nn.Sequential)]
    hint = f"did you mean '{nearest(path, lists)}'?" if lists else "put its blocks into an nn.ModuleList"
    what = "no module" if found is None else "no list of blocks"
    raise ValueError(f"the row of {_name(model)}: blocks: {type(model).__name__} has {what} at '{path}'; {hint}")


def require_components(model: nn.Module) -> None:
    """Refuse a model of whose row from outside a path is in no block.

    Raises:
        ValueError: the message names the component and the nearest path.
    """
    row, layers = architecture(model), blocks(model)
    assert row is not None, "models with blocks have a row"
    for name, component in row.components.items():
        if all(_submodule(block, component.path) is None for block in layers):
            raise ValueError(
                f"the row of {_name(unwrap(model))}: components.{name}.path: {_lacking(layers, component.path)}"
            )


def otherwise_described(saved: Any, model: nn.Module) -> str | None:
    """How a model's components differ from those that an export was trained with; None where they do not.

    Args:
        saved: the row from outside that the export has, as data that anybody may have written; None: it has none.
        model: the model that it is put on.
    """
    try:
        there = None if saved is None else parse_row(saved, "the components of its base model")
    except ValueError as error:
        return str(error)
    row = architecture(model)
    if described_row(there) == described_row(row):
        return None
    kind = _name(unwrap(model))
    if there is None:
        return f"it was trained with the components that itrain has for {kind}; load the model without others"
    state = "has none" if row is None else "has others"
    return (
        f"it was trained with components of its own for {kind}, which {state} here; call "
        "itrain.register_architecture with the row that was trained with, before the model is used"
    )


def locate(model: nn.Module, site: Site) -> Location:
    """The site's module, and which of its columns are the site's.

    Raises:
        ValueError: the model does not have the site; the message names the nearest thing it has. Or tensor parallelism
            leaves each process a part of its activations.
    """
    location = _locate(unwrap(model), site)
    if location.end not in getattr(location.module, WHOLE_ENDS, (location.end,)):
        raise ValueError(
            f"site '{site}': under tensor parallelism each process has only some of its features; take the output "
            "of the block, the attention or the MLP, or use trainer=fsdp"
        )
    return location


def _locate(model: nn.Module, site: Site) -> Location:
    if site.layer is None:
        return _locate_module(model, site)
    blocks(model)
    name, row = _name(model), architecture(model)
    assert row is not None, "models with blocks have a row"
    if row.stacks and site.stack not in row.stacks:
        stacks = " or ".join(f"'{stack}.layer{site.layer}.{site.component}'" for stack in row.stacks)
        raise ValueError(f"site '{site}': {name} has several stacks of blocks; write {stacks}")
    if row.stacks and _submodule(getattr(model, "base_model", model), row.stacks[site.stack or ""]) is None:
        raise ValueError(f"site '{site}': {type(model).__name__} has no {site.stack} stack")
    layers, components = blocks(model, site.stack if row.stacks else None), row.components
    if site.layer >= len(layers):
        raise ValueError(f"site '{site}': layer {site.layer} does not exist: {name} has layers 0-{len(layers) - 1}")
    stack = f"{site.stack}." if row.stacks else ""
    if site.is_weights and row.weights and site.component == f"{stack}{ATTENTION_WEIGHTS}":
        return _locate_weights(model, _module(layers, site, components[f"{stack}attention_input"].path), site)
    if site.component not in components:
        raise ValueError(
            f"site '{site}': {name} has no component '{site.component}'; did you mean "
            f"'{nearest(site.component, components)}'? It has {', '.join(components)}"
        )
    path, end, heads, part, layout = components[site.component]
    block = layers[site.layer]
    module = _module(layers, site, path)
    if isinstance(row, GivenRow):
        layout = layout or layout_of(module)
    # Modules that do not tell their width, such as a block, carry the residual stream's.
    width = _size(module, end) or _stream(block, row, stack, path)
    if heads is None:
        if site.head is not None:
            raise ValueError(f"site '{site}': {site.component} has no heads; these have: {_with_heads(row)}")
        if width is None:
            return Location(module, end, None, None, layout)
        columns = torch.arange(width) if part is None else part(torch.arange(width), block)
        return Location(module, end, _compact(columns, width, module), columns.numel(), layout)
    if width is None:
        raise ValueError(
            f"site '{site}': {type(module).__name__} does not tell its width, which heads need; name a projection"
        )
    columns = _by_head(model, site, layers, width)
    if site.head is not None:
        if not 0 <= site.head < len(columns):
            has = f"{site.component} of {name} has heads 0-{len(columns) - 1}"
            raise ValueError(f"site '{site}': head {site.head} does not exist: {has}")
        columns = columns[site.head]
    return Location(module, end, _compact(columns.flatten(), width, module), columns.numel(), layout)


def _module(layers: nn.ModuleList, site: Site, path: str) -> nn.Module:
    """The module of the site's block at a path, or at the first of alternative ones that it has.

    Raises:
        ValueError: this block has none of them; the message names blocks that have.
    """
    assert site.layer is not None, "the site names a layer"
    found = [_submodule(block, path) for block in layers]
    module = found[site.layer]
    if module is None:
        having = [str(layer) for layer, each in enumerate(found) if each is not None]
        others = f"layers {', '.join(having)} have it" if having else _lacking(layers, path)
        raise ValueError(f"site '{site}': layer {site.layer} has no {site.component}; {others}")
    return module


def _lacking(layers: nn.ModuleList, path: str) -> str:
    inside = dict.fromkeys(name for block in layers for name, _ in block.named_modules() if name)
    hint = f"; did you mean '{nearest(path, inside)}'?" if inside else ""
    return f"no layer of this model has '{path}'{hint}"


def _first(base: nn.Module, path: str) -> Any:
    """The first of the paths' modules that there is."""
    found = _submodule(base, path)
    return base.get_submodule(path) if found is None else found


def _submodule(block: nn.Module, path: str) -> nn.Module | None:
    for each in path.split("|"):
        try:
            return block.get_submodule(each)
        except AttributeError:
            continue
    return None


def _stream(block: nn.Module, row: Architecture, stack: str, path: str) -> int | None:
    """The width of the residual stream, from a projection that joins it; None where it cannot be known."""
    if isinstance(row, GivenRow) and path:
        return None  # The module could be anything.
    joining = ("attention_output", "mixer_output", "mlp_output")
    paths = [row.components[name].path for each in joining if (name := f"{stack}{each}") in row.components]
    found = (_submodule(block, path) for path in paths)
    return next((size for each in found if each is not None and (size := _size(each, "output"))), None)


def _config_at(model: nn.Module, site: Site) -> Any:
    """The configuration of the site's stack: a tower of images has one of its own."""
    config: Any = getattr(model, "config", None)
    own = getattr(config, f"{site.stack}_config", None)
    if own is not None:
        return own
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _num_heads(model: nn.Module, site: Site) -> int:
    row, own = architecture(model), _config_at(model, site)
    if isinstance(row, GivenRow) and row.num_heads is not None:
        return row.num_heads
    # Of an encoder and a decoder with numbers of their own.
    found = getattr(own, f"{site.stack}_attention_heads", getattr(own, "num_attention_heads", None))
    if found is None:
        raise ValueError(f"site '{site}': {_name(model)} does not say how many heads it has; add num_heads to its row")
    return found


def has(model: nn.Module, site: Site) -> bool:
    """Whether the model has the site."""
    try:
        locate(model, site)
    except ValueError:
        return False
    return True


def heads_of(model: nn.Module, site: Site) -> int:
    """How many attention heads the site's component has; keys and values may have fewer than queries.

    Raises:
        ValueError: the model does not have the site, or it has no heads; the message names what has.
    """
    model, row = unwrap(model), architecture(model)
    module, end, _, _, _ = locate(model, replace(site, head=None))
    assert row is not None and site.layer is not None, "a site that is located in a layer"
    if end == "weights":
        return _num_heads(model, site)
    if row.components[site.component].heads is None:
        raise ValueError(f"site '{site}': {site.component} has no heads; these have: {_with_heads(row)}")
    width = _size(module, end)
    assert width is not None, "projections of heads tell their width"
    return len(_by_head(model, site, blocks(model, site.stack if row.stacks else None), width))


def _by_head(model: nn.Module, site: Site, layers: nn.ModuleList, width: int) -> Tensor:
    """The columns of each head of the site's component, (heads, size)."""
    row, num_heads = architecture(model), _num_heads(model, site)
    heads = None if row is None else row.components[site.component].heads
    assert row is not None and heads is not None, "the site has heads"
    stack = f"{site.stack}." if row.stacks else ""
    projection = _module(layers, site, row.components[f"{stack}attention_value_output"].path)
    try:
        return heads(torch.arange(width), num_heads, (_size(projection, "input") or width) // num_heads)
    except RuntimeError as error:
        raise ValueError(
            f"site '{site}': the {width} columns do not hold {num_heads} heads as its row says: {error}"
        ) from error


def _with_heads(row: Architecture) -> str:
    return ", ".join(name for name, component in row.components.items() if component.heads) or "none"


def _locate_weights(model: nn.Module, attention: nn.Module, site: Site) -> Location:
    own = _config_at(model, site)
    used = getattr(own, "_attn_implementation", None) or "eager"
    if used != "eager":
        raise ValueError(
            f"site '{site}': {used} attention computes no weights that could be read or edited; load the model with "
            'attn_implementation="eager", or call model.set_attn_implementation("eager")'
        )
    if site.head is not None and not 0 <= site.head < _num_heads(model, site):
        has = f"{_name(model)} has heads 0-{_num_heads(model, site) - 1}"
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
        hint = f"did you mean '{nearest(path, inside)}'?" if inside else "it has none at all"
        raise ValueError(f"site '{site}': {type(model).__name__} has no module '{path}'; {hint}") from missing
    return Location(module, "input" if end == "input" else "output", None, _size(module, end), layout_of(module))


def _name(model: nn.Module) -> str:
    return model_type_of(model) or type(model).__name__


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
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and (end == "logits" or type(module).__name__.endswith("Norm")):
        return len(weight)
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _compact(columns: Tensor, width: int, module: nn.Module) -> slice | Tensor | None:
    """The columns in the form that is cheapest to index with: None for all, a slice for neighbours."""
    if len(columns) == width:
        return None
    first, last = int(columns[0]), int(columns[-1])
    if last - first + 1 == len(columns):
        return slice(first, last + 1)
    device = next(module.parameters()).device
    return columns if device.type == "meta" else columns.to(device)  # or they would have no values
