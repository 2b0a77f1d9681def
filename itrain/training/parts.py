"""Parts: a trained subspace in the row space and in the null space of the linear map that follows, as interventions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.architectures import locate, unwrap
from itrain.interventions.parts import parts_of_subspace
from itrain.networks.base import Network
from itrain.placements import Placement
from itrain.quantized import is_quantized
from itrain.sites import Site
from itrain.training.interchange import Interchange, Interventions

LARGEST = 1024
"""The most dimensions of a subspace that is split unasked: the work grows with their square."""


class Parts(NamedTuple):
    """The parts of all placements."""

    row: Interventions
    null: Interventions
    row_share: float
    """Share of the subspaces' squared norm in the row spaces, the mean over placements."""


def parts_of(interchange: Interchange, interventions: Interventions, next_map: str | None = None) -> Parts | None:
    """The row part and the null part of each placement's subspace; None where a placement has none.

    The map that follows a site is the linear module whose input the site is, as an MLP's down projection is that of
    ``mlp_activation``, or one that is named. After sites in the residual stream and projections' outputs there is no
    one map: a norm, several modules and the stream itself read them.

    Args:
        interchange: whose model and sites they are.
        interventions: what is placed there.
        next_map: the path of a linear module of the model, which reads each site's features.

    Raises:
        ValueError: a map is named that is none, reads other features or has no null space, or an intervention swaps no
            linear subspace.
    """
    if interchange.network.in_step or interchange.join_positions:
        if next_map is None:
            return None
        why = "its weights are divided among processes" if interchange.network.in_step else "positions are joined"
        raise ValueError(f"next_map: a subspace has no parts where {why}; leave it out")
    found = {}
    for placement, intervention in interventions.items():
        weight = (
            named_weight(interchange.network, next_map) if next_map else weight_after(interchange.network, placement)
        )
        if weight is None or (next_map is None and intervention.rank > LARGEST):
            return None
        try:
            found[placement] = parts_of_subspace(intervention, weight)
        except ValueError as error:
            if next_map is None:
                return None
            raise ValueError(f"next_map='{next_map}': site '{placement.write}': {error}") from error
    shares = [each.row_share for each in found.values()]
    like = _like(interchange.network)
    return Parts(
        row={placement: each.row.to(**like) for placement, each in found.items()},
        null={placement: each.null.to(**like) for placement, each in found.items()},
        row_share=sum(shares) / len(shares),
    )


def weight_after(network: Network, placement: Placement | Site) -> Float[Tensor, "outputs features"] | None:
    """The weight of the linear module whose input a site is, in the site's columns; None where it is none."""
    site = placement.write if isinstance(placement, Placement) else placement
    location = locate(unwrap(network.model), site)
    if location.end != "input" or (weight := _weight(location.module)) is None:
        return None
    return weight if location.columns is None else weight[:, location.columns]


def named_weight(network: Network, path: str) -> Float[Tensor, "outputs features"]:
    """The weight of the linear module at a path.

    Raises:
        ValueError: there is none.
    """
    model = unwrap(network.model)
    location = locate(model, Site.parse(f"module:{path}.input"))
    weight = _weight(location.module)
    if weight is None:
        raise ValueError(
            f"next_map='{path}': {type(location.module).__name__} is no linear module with weights of its own here; "
            "name an nn.Linear"
        )
    return weight


def _weight(module: nn.Module) -> Float[Tensor, "outputs features"] | None:
    """The weight of torch's linear map, or of transformers' Conv1D, which keeps it transposed."""
    weight: Any = getattr(module, "weight", None)
    transposed = type(module).__name__ == "Conv1D"
    if not (transposed or type(module) is nn.Linear) or not isinstance(weight, nn.Parameter):
        return None
    if weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta or is_quantized(weight):
        return None
    return weight.detach().T if transposed else weight.detach()


def _like(network: Network) -> dict[str, Any]:
    weight = next(network.parameters())
    return {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
