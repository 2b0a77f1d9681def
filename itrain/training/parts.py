"""Parts: a trained subspace in the row space and in the null space of the linear map that follows, as interventions."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.architectures import locate, unwrap
from itrain.interventions.parts import parts_of_subspace, require_null_space
from itrain.networks.base import Network
from itrain.placements import Placement
from itrain.quantized import is_quantized
from itrain.signatures import nearest
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
        next_map: a linear module that :func:`require_next_map` has found fit.
    """
    if interchange.network.in_step or interchange.join_positions:
        return None
    found = {}
    for placement, intervention in interventions.items():
        weight = weight_at(interchange.network, next_map) if next_map else weight_after(interchange.network, placement)
        if weight is None or (next_map is None and intervention.rank > LARGEST):
            return None
        try:
            found[placement] = parts_of_subspace(intervention, weight)
        except ValueError as error:
            if next_map is not None:
                # After a fit, whose other figures are worth having.
                warnings.warn(f"next_map='{next_map}': the subspace's parts are left out: {error}", stacklevel=2)
            return None
    shares = [each.row_share for each in found.values()]
    like = _like(interchange.network)
    return Parts(
        row={placement: each.row.to(**like) for placement, each in found.items()},
        null={placement: each.null.to(**like) for placement, each in found.items()},
        row_share=sum(shares) / len(shares),
    )


def require_next_map(interchange: Interchange, next_map: str) -> None:
    """Refuse a map by which the subspaces at the sites cannot be split.

    Raises:
        ValueError: there is no linear module of this name, it reads other features or has no null space, or positions
            are joined, the model's weights are divided among processes, or an intervention takes no source.
    """
    place = f"next_map='{next_map}'"
    if interchange.join_positions or interchange.network.in_step:
        why = "positions are joined" if interchange.join_positions else "weights are divided among processes"
        raise ValueError(f"{place}: a subspace is not split where {why}; leave it out")
    weight = weight_at(interchange.network, next_map)
    for placement, intervention in interchange.trained.items():
        name, size = type(intervention).__name__, intervention.hidden_size
        if not intervention.takes_source:
            raise ValueError(f"{place}: site '{placement}': {name} takes no source, so that it swaps no subspace")
        try:
            require_null_space(weight, size)
        except ValueError as error:
            raise ValueError(f"{place}: site '{placement}': {error}") from error


def weight_after(network: Network, placement: Placement | Site) -> Float[Tensor, "outputs features"] | None:
    """The weight of the linear module whose input a site is, in the site's columns; None where it is none."""
    site = placement.write if isinstance(placement, Placement) else placement
    location = locate(unwrap(network.model), site)
    if location.end != "input" or (weight := _weight(location.module)) is None:
        return None
    return weight if location.columns is None else weight[:, location.columns]


def weight_at(network: Network, path: str) -> Float[Tensor, "outputs features"]:
    """The weight of the linear module at a path.

    Raises:
        ValueError: there is none.
    """
    model = unwrap(network.model)
    try:
        module = model.get_submodule(path)
    except AttributeError as missing:
        hint = nearest(path, [name for name, each in model.named_modules() if _weight(each) is not None])
        raise ValueError(f"next_map='{path}': {type(model).__name__} has no such module{hint}") from missing
    if (weight := _weight(module)) is None:
        name = type(module).__name__
        raise ValueError(f"next_map='{path}': {name} is no linear map with weights in full; name an nn.Linear")
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
