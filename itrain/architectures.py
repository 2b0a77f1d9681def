"""Where the components of transformers' models are: one table, model_type -> component -> module path.

Only paths are tabulated; sizes are read from the modules, because tables of sizes go stale.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from itrain.layouts import AttentionWeights, Layout, channels_of, layout_of
from itrain.sites import ATTENTION_WEIGHTS, Site

End = Literal["input", "output", "weights"]
"""A module's input, its output, or the attention weights that it computes on the way."""

Heads = Callable[[Tensor, int, int], Tensor]
"""Maps a tensor's columns, the number of query heads and a head's size to the component's columns, (heads, size)."""


class Component(NamedTuple):
    """The input or output of a module of the block and, where it holds attention heads, their layout."""

    path: str
    end: End
    heads: Heads | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A row of the table.

    Args:
        blocks: path of the list of blocks, from the model without its head.
        causal: whether a token sees only itself and those before it.
        components: by name, with the same meaning in every row:

            * ``block_input``, ``block_output``: the residual stream;
            * ``attention_input``, ``mlp_input``: the sublayer's input;
            * ``query_output``, ``key_output``, ``value_output``: the projections, before any norm and rotation;
            * ``attention_value_output``: the heads' outputs side by side, the input of the output projection;
            * ``mlp_activation``: the neurons, the input of the down projection. In a gated MLP that is act(gate) * up;
              pyvene's component of this name is act(gate) there;
            * ``attention_output``, ``mlp_output``: the outputs of these two projections, before dropout, before the
              norm that follows in some models (Gemma 2, OLMo 2, BERT) and before they join the residual stream.

            Each row also has ``attention_weights``, whose position is the attending token and whose features are the
            weights of all tokens, head by head. Eager attention alone computes them.
    """

    blocks: str
    causal: bool = True
    components: Mapping[str, Component]


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


def _whole(columns: Tensor, num_heads: int, head_size: int) -> Tensor:
    # Grouped keys and values have fewer heads than queries: their number follows from the width.
    return columns.view(-1, head_size)


def _side_by_side(columns: Tensor, num_heads: int, head_size: int, *, part: int) -> Tensor:
    """Part of a fused projection (queries | keys | values), keys and values equally wide."""
    queries = num_heads * head_size
    keys = (len(columns) - queries) // 2
    return columns.split([queries, keys, keys])[part].view(-1, head_size)


def _interleaved(columns: Tensor, num_heads: int, head_size: int, *, part: int) -> Tensor:
    """Part of a fused projection (query | key | value) of the first head, then of the next."""
    return columns.view(-1, 3, head_size)[:, part]


def _separate(query: str, key: str, value: str) -> list[Component]:
    return [Component(path, "output", _whole) for path in (query, key, value)]


def _fused(path: str, layout: Callable[..., Tensor]) -> list[Component]:
    return [Component(path, "output", partial(layout, part=part)) for part in range(3)]


def _block(attention: str, query_key_value: list[Component], projection: str) -> dict[str, Component]:
    query, key, value = query_key_value
    return {
        "block_input": Component("", "input"),
        "block_output": Component("", "output"),
        "attention_input": Component(attention, "input"),
        "query_output": query,
        "key_output": key,
        "value_output": value,
        "attention_value_output": Component(projection, "input", _whole),
        "attention_output": Component(projection, "output"),
    }


def _mlp(path: str, down: str) -> dict[str, Component]:
    return {
        "mlp_input": Component(path, "input"),
        "mlp_activation": Component(down, "input"),
        "mlp_output": Component(down, "output"),
    }


_QKV = _separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA_BLOCK = _block("self_attn", _QKV, "self_attn.o_proj")
_LLAMA = _LLAMA_BLOCK | _mlp("mlp", "mlp.down_proj")
# No mlp_activation: the experts are one fused module, which sees the tokens regrouped by expert.
_MIXTRAL = _LLAMA_BLOCK | {"mlp_input": Component("mlp", "input"), "mlp_output": Component("mlp", "output")}
_PHI = _block("self_attn", _QKV, "self_attn.dense") | _mlp("mlp", "mlp.fc2")
_PHI3_QKV = _fused("self_attn.qkv_proj", _side_by_side)
_PHI3 = _block("self_attn", _PHI3_QKV, "self_attn.o_proj") | _mlp("mlp", "mlp.down_proj")
# No mlp_*: OPT's MLP sees the tokens of all examples in one row, where no position can be told.
_OPT = _block("self_attn", _QKV, "self_attn.out_proj")
_GPT2 = _block("attn", _fused("attn.c_attn", _side_by_side), "attn.c_proj") | _mlp("mlp", "mlp.c_proj")
_GPT_NEO_QKV = _separate("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")
_GPT_NEO = _block("attn", _GPT_NEO_QKV, "attn.attention.out_proj") | _mlp("mlp", "mlp.c_proj")
_GPTJ_QKV = _separate("attn.q_proj", "attn.k_proj", "attn.v_proj")
_GPTJ = _block("attn", _GPTJ_QKV, "attn.out_proj") | _mlp("mlp", "mlp.fc_out")
_NEOX_QKV = _fused("attention.query_key_value", _interleaved)
_NEOX = _block("attention", _NEOX_QKV, "attention.dense") | _mlp("mlp", "mlp.dense_4h_to_h")
_BLOOM_QKV = _fused("self_attention.query_key_value", _interleaved)
_BLOOM = _block("self_attention", _BLOOM_QKV, "self_attention.dense") | _mlp("mlp", "mlp.dense_4h_to_h")
_BERT_QKV = _separate("attention.self.query", "attention.self.key", "attention.self.value")
_BERT = _block("attention.self", _BERT_QKV, "attention.output.dense") | _mlp("intermediate", "output.dense")

ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": Architecture(blocks="encoder.layer", causal=False, components=_BERT),
    "bloom": Architecture(blocks="h", components=_BLOOM),
    "gemma": Architecture(blocks="layers", components=_LLAMA),
    "gemma2": Architecture(blocks="layers", components=_LLAMA),
    "gemma3": Architecture(blocks="language_model.layers", components=_LLAMA),
    "gemma3_text": Architecture(blocks="layers", components=_LLAMA),
    "gpt2": Architecture(blocks="h", components=_GPT2),
    "gpt_neo": Architecture(blocks="h", components=_GPT_NEO),
    "gpt_neox": Architecture(blocks="layers", components=_NEOX),
    "gptj": Architecture(blocks="h", components=_GPTJ),
    "llama": Architecture(blocks="layers", components=_LLAMA),
    "mistral": Architecture(blocks="layers", components=_LLAMA),
    "mixtral": Architecture(blocks="layers", components=_MIXTRAL),
    "olmo2": Architecture(blocks="layers", components=_LLAMA),
    "opt": Architecture(blocks="decoder.layers", components=_OPT),
    "phi": Architecture(blocks="layers", components=_PHI),
    "phi3": Architecture(blocks="layers", components=_PHI3),
    "qwen2": Architecture(blocks="layers", components=_LLAMA),
    "qwen3": Architecture(blocks="layers", components=_LLAMA),
    "roberta": Architecture(blocks="encoder.layer", causal=False, components=_BERT),
}


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
    return columns.to(next(module.parameters()).device)
