"""What a row of the table of architectures is made of: components, their layouts, and blocks of them.

Only paths are tabulated; sizes are read from the modules, because tables of sizes go stale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor, nn

from itrain.layouts import Layout, OneRow

End = Literal["input", "output", "weights", "logits"]
"""A module's input, its output, or what it computes on the way: attention weights, or a router's logits."""

Heads = Callable[[Tensor, int, int], Tensor]
"""Maps a tensor's columns, the number of query heads and a head's size to the component's columns, (heads, size)."""


Part = Callable[[Tensor, nn.Module], Tensor]
"""Maps a tensor's columns and the block to the component's columns."""


class Component(NamedTuple):
    """The input or output of a module of the block.

    ``path`` may name alternatives, as in ``a|b``, of which a block has one; a block may lack the component. ``heads``
    is the layout of attention heads where it holds some, ``part`` says which other columns it is, and ``layout`` how
    the activation lies if not as (batch, tokens, features).
    """

    path: str
    end: End
    heads: Heads | None = None
    part: Part | None = None
    layout: Layout | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A row of the table.

    Args:
        blocks: path of the list of blocks, from the model without its head, or alternatives, as in ``a|b``.
        causal: whether a token sees only itself and those before it.
        stacks: of a model with several stacks of blocks, as an encoder and a decoder, the path of each by name. Sites
            then name the stack, ``encoder.layer0.block_output``, and components are ``encoder.block_output``.
        media: the argument of the model's forward that holds images or sound; None: it reads text alone.
        recurrent: whether some blocks hand a state from token to token, instead of keys and values.
        weights: whether the attention's softmax is over the tokens alone, so that its weights can be had.
        components: by name, with the same meaning in every row:

            * ``block_input``, ``block_output``: the residual stream;
            * ``attention_input``, ``mlp_input``: the sublayer's input;
            * ``query_output``, ``key_output``, ``value_output``: the projections, before any norm and rotation;
            * ``attention_value_output``: the heads' outputs side by side, the input of the output projection;
            * ``mlp_activation``: the neurons, the input of the down projection. In a gated MLP that is act(gate) * up;
              pyvene's component of this name is act(gate) there;
            * ``attention_output``, ``mlp_output``: the outputs of these two projections, before dropout, before the
              norm that follows in some models (Gemma 2, OLMo 2, BERT) and before they join the residual stream. With a
              mixture of experts ``mlp_output`` is that of the whole mixture;
            * ``router_output``: a mixture's logits over experts, before the choice; ``expert_output``: what the chosen
              experts give a token, weighted and summed; ``shared_expert_output``: what the expert of all tokens gives;
            * ``attention_gate``: what gates the heads' outputs, before the sigmoid;
            * ``query_latent``, ``key_value_latent``: compressed queries, and keys and values, before their norm;
            * ``mixer_input``, ``mixer_output``: a state-space or linear-attention mixer's input, and its output as it
              joins the residual stream; ``conv_input``: what its convolution over tokens is given; ``mixer_gate``: the
              gate, before its activation; ``mixer_activation``: the scan's output after the gate, the input of the
              output projection; ``scan_parameters``: Mamba's step, B and C of each token, side by side;
            * ``cross_attention_...``: the same as ``attention_...`` where a decoder attends to the encoder's tokens;
              positions in ``cross_key_output`` and ``cross_value_output`` are the encoder's.

            Rows with ``attention_input`` also have ``attention_weights``, whose position is the attending token and
            whose features are the weights of all tokens, head by head. Eager attention alone computes them.
    """

    blocks: str = ""
    causal: bool = True
    stacks: Mapping[str, str] = field(default_factory=dict)
    media: str | None = None
    recurrent: bool = False
    weights: bool = True
    components: Mapping[str, Component]


def whole(columns: Tensor, num_heads: int, head_size: int) -> Tensor:
    # Grouped keys and values have fewer heads than queries: their number follows from the width.
    return columns.view(-1, head_size)


def side_by_side(columns: Tensor, num_heads: int, head_size: int, *, part: int) -> Tensor:
    """Part of a fused projection (queries | keys | values), keys and values equally wide."""
    queries = num_heads * head_size
    keys = (len(columns) - queries) // 2
    return columns.split([queries, keys, keys])[part].view(-1, head_size)


def grouped(columns: Tensor, num_heads: int, head_size: int, *, part: int) -> Tensor:
    """Part of a fused projection (the group's queries | key | value) of the first group, then of the next."""
    groups = (len(columns) // head_size - num_heads) // 2
    cells = columns.view(groups, -1, head_size)
    return cells[:, :-2].flatten(0, 1) if part == 0 else cells[:, part - 3]


def latent(columns: Tensor, num_heads: int, head_size: int) -> Tensor:
    """Queries that were expanded from a latent, whose heads have another size than the values'."""
    return columns.view(num_heads, -1)


def gated(columns: Tensor, num_heads: int, head_size: int, *, part: int) -> Tensor:
    """Part of a projection (query | gate) of the first head, then of the next."""
    return columns.view(num_heads, 2, head_size)[:, part]


def interleaved(columns: Tensor, num_heads: int, head_size: int, *, part: int) -> Tensor:
    """Part of a fused projection (query | key | value) of the first head, then of the next."""
    return columns.view(-1, 3, head_size)[:, part]


def separate(query: str, key: str, value: str) -> list[Component]:
    """Queries, keys and values of projections of their own."""
    return [Component(path, "output", whole) for path in (query, key, value)]


def fused(path: str, layout: Callable[..., Tensor]) -> list[Component]:
    """Queries, keys and values of one projection."""
    return [Component(path, "output", partial(layout, part=part)) for part in range(3)]


STREAM = {"block_input": Component("", "input"), "block_output": Component("", "output")}


def block(attention: str, query_key_value: list[Component], projection: str) -> dict[str, Component]:
    """A block's stream and its attention."""
    query, key, value = query_key_value
    return STREAM | {
        "attention_input": Component(attention, "input"),
        "query_output": query,
        "key_output": key,
        "value_output": value,
        "attention_value_output": Component(projection, "input", whole),
        "attention_output": Component(projection, "output"),
    }


def mixture(
    path: str, *, router: str, experts: str | None = None, shared: str | None = None, flat: bool = False
) -> dict[str, Component]:
    """A mixture of experts in the place of the MLP; the router and the experts see all tokens in a row.

    No single expert's output: the experts are one fused module, which sees the tokens regrouped by expert.

    Args:
        path: the mixture.
        router: the router within it.
        experts: the experts within it, where their output is of tokens.
        shared: the expert of all tokens.
        flat: whether the mixture's own output and its shared expert's lie in a row.
    """
    row = OneRow()
    routers = "|".join(f"{path}.{each}" for each in router.split("|"))
    found = {
        "mlp_input": Component(path, "input"),
        "mlp_output": Component(path, "output", layout=row if flat else None),
        "router_output": Component(routers, "logits", layout=row),
    }
    if experts is not None:
        found["expert_output"] = Component(f"{path}.{experts}", "output", layout=row)
    if shared is not None:
        found["shared_expert_output"] = Component(f"{path}.{shared}", "output", layout=row)
    return found


def mlp(path: str, down: str) -> dict[str, Component]:
    """An MLP and its down projection."""
    return {
        "mlp_input": Component(path, "input"),
        "mlp_activation": Component(down, "input"),
        "mlp_output": Component(down, "output"),
    }
