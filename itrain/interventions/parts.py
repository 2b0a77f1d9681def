"""Parts of a learned subspace: that which the next linear map reads, and that which it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.interventions.base import Intervention

TOLERANCE = 1e-5
"""Up to which share of the largest a singular value counts as 0, of a map and of a part of orthonormal directions."""


class GivenSubspace(Intervention):
    """Swaps the coordinates in a given subspace: h + (s - h) R^T R, R of orthonormal rows, (rank, hidden).

    Args:
        hidden_size: features of the activation.
        directions: what spans the subspace, (rank, hidden), or that of each variable; no row swaps nothing. None: the
            first feature.

    Raises:
        ValueError: the directions are of another size, or not linearly independent.
    """

    rows: Float[Tensor, "rank hidden"]

    def __init__(
        self,
        hidden_size: int,
        *,
        directions: Tensor | Sequence[Sequence[float]] | Mapping[str, Tensor | Sequence[Sequence[float]]] | None = None,
    ) -> None:
        super().__init__()
        given = torch.eye(1, hidden_size) if directions is None else directions
        named = given if isinstance(given, Mapping) else {"": given}
        parts = {name: _rows(each, hidden_size) for name, each in named.items()}
        self.blocks = {name: len(rows) for name, rows in parts.items()}
        self.hidden_size, self.rank = hidden_size, sum(self.blocks.values())
        self.register_buffer("rows", torch.cat(list(parts.values())))

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        # Parts of orthogonal subspaces need not be orthogonal, so that all variables at once have a joint basis.
        rows = self.rows if len(self.blocks) == 1 else _basis(self.rows)
        return _swap(base, source, rows)

    def edit_for(self, variable: str) -> Callable[[Tensor, Tensor], Tensor]:
        if list(self.blocks) == [""]:
            return self
        if variable not in self.blocks:
            raise ValueError(f"no subspace for variable '{variable}'; there are {', '.join(self.blocks)}")
        parts = dict(zip(self.blocks, self.rows.split(list(self.blocks.values())), strict=True))
        return partial(_swap, rows=parts[variable])


class SubspaceParts(NamedTuple):
    """A subspace in two parts with respect to a linear map."""

    row: GivenSubspace
    """The projection of its directions on the map's row space: all that the map reads of them."""
    null: GivenSubspace
    """That on its null space: what the map does not read."""
    row_share: float
    """Share of the directions' squared norm in the row space; the rest is in the null space."""


def row_space(weight: Float[Tensor, "outputs hidden"]) -> Float[Tensor, "rank hidden"]:
    """Orthonormal rows, in fp64, that span the row space of a map: its right singular vectors.

    Singular values up to 1e-5 of the largest count as 0.
    """
    weight = _exact(weight)
    # Of the smaller Gram matrix, which takes a fraction of the time of the whole decomposition.
    wide = weight.shape[0] < weight.shape[1]
    squares, vectors = torch.linalg.eigh(weight @ weight.T if wide else weight.T @ weight)
    kept = squares > TOLERANCE**2 * squares.max().clamp(min=torch.finfo(torch.float64).tiny)
    found = vectors[:, kept].T
    return found @ weight / squares[kept, None].sqrt() if wide else found


def parts_of_subspace(intervention: Intervention, weight: Float[Tensor, "outputs hidden"]) -> SubspaceParts:
    """The parts of a fitted subspace in the row space and in the null space of the next linear map, y = W h + b.

    Each direction r of the subspace is P r + (1 - P) r, P the projection on the row space of W. The parts are
    interventions of their own, on the span of all P r and of all (1 - P) r, which have up to the subspace's rank each.
    A patch of the null part alone cannot change y; a patch of the row part alone lacks what the null part does to the
    base's and the source's coordinates. Makelov et al. 2024, "Is This the Subspace You Are Looking for?".

    Args:
        intervention: one that swaps the coordinates in a linear subspace.
        weight: W, of torch's form, (outputs, features).

    Raises:
        ValueError: the intervention swaps no linear subspace, the map reads another number of features, or it has no
            null space.
    """
    size = intervention.hidden_size
    space = require_null_space(weight, size)
    subspaces = {name: swapped_rows(intervention, name).to(space.device) for name in _variables(intervention)}
    row = {name: rows @ space.T @ space for name, rows in subspaces.items()}
    null = {name: rows - row[name] for name, rows in subspaces.items()}
    whole = sum(float(rows.square().sum()) for rows in subspaces.values())
    share = sum(float(rows.square().sum()) for rows in row.values()) / whole
    made = [
        GivenSubspace(size, directions={name: _basis(rows, least=1) for name, rows in part.items()})
        for part in (row, null)
    ]
    return SubspaceParts(*made, row_share=share)


def require_null_space(weight: Float[Tensor, "outputs hidden"], hidden_size: int) -> Float[Tensor, "rank hidden"]:
    """The row space of a map that leaves some direction of an activation unread.

    Raises:
        ValueError: it reads another number of features, or all directions.
    """
    if weight.ndim != 2 or weight.shape[1] != hidden_size:
        raise ValueError(
            f"the next map's weight has the shape {tuple(weight.shape)} and the activation {hidden_size} features; "
            "give it as (outputs, features)"
        )
    space = row_space(weight)
    if len(space) == hidden_size:
        raise ValueError(f"the next map reads all features ({hidden_size}), so that it has no null space")
    return space


@torch.no_grad()
def swapped_rows(intervention: Intervention, variable: str = "") -> Float[Tensor, "rank hidden"]:
    """Orthonormal rows R, in fp64, with edit(h, s) = h + (s - h) R^T R, found from what the edit does.

    Raises:
        ValueError: it does something else.
    """
    name, edit = type(intervention).__name__, intervention.edit_for(variable)
    if not intervention.takes_source:
        raise ValueError(f"{name} takes no source, so that it swaps no subspace")
    like = next(
        (each for each in (*intervention.parameters(), *intervention.buffers()) if each.is_floating_point()), None
    )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(
        min(intervention.rank, intervention.hidden_size) + 8, intervention.hidden_size, generator=generator
    )
    source = drawn if like is None else drawn.to(like.device, torch.promote_types(like.dtype, torch.float32))
    zeros = torch.zeros_like(source)
    rows = _basis(_exact(edit(zeros, source) - edit(zeros, zeros)))
    base = source.flip(0).roll(1, 1)
    found, expected = _exact(edit(base, source)), _swap(_exact(base), _exact(source), rows)
    if not torch.allclose(found, expected, atol=1e-3, rtol=1e-3):
        raise ValueError(f"{name} swaps no linear subspace, so that it has no parts in a row space and a null space")
    return rows


def _variables(intervention: Intervention) -> list[str]:
    """The variables with subspaces of their own, or that which stands for all."""
    return list(getattr(intervention, "blocks", [""]))


def _rows(given: Tensor | Sequence[Sequence[float]], hidden_size: int) -> Float[Tensor, "rank hidden"]:
    """Orthonormal rows that span what is given."""
    rows = torch.as_tensor(given).detach().double()
    rows = rows if rows.numel() else rows.reshape(0, hidden_size)
    if rows.ndim != 2 or rows.shape[1] != hidden_size:
        raise ValueError(
            f"directions: they have the shape {tuple(rows.shape)} for an activation of {hidden_size} features"
        )
    basis = _basis(rows)
    if len(basis) < len(rows):
        raise ValueError(f"directions: {len(rows)} are given and span {len(basis)} dimensions; leave the others out")
    return basis.float()


def _basis(rows: Float[Tensor, "rows hidden"], *, least: float = 0.0) -> Float[Tensor, "rank hidden"]:
    """Orthonormal rows of equal span, without what is shorter than 1e-5 of the longest or of ``least``."""
    if not len(rows):
        return rows
    _, lengths, directions = torch.linalg.svd(rows, full_matrices=False)
    return directions[lengths > TOLERANCE * lengths.max().clamp(min=least)]


def _exact(tensor: Tensor) -> Tensor:
    """In fp64, which MPS does not have."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).detach().double()


def _swap(base: Tensor, source: Tensor, rows: Float[Tensor, "rank hidden"]) -> Tensor:
    rows = rows.to(base.dtype)
    return base + (source - base) @ rows.T @ rows
