"""pyvene's and pyreft's interventions as itrain's: by the name of the class, from the weights that it saves.

Their rotation layers hold columns, R^T of shape (hidden, rank), and itrain's interventions rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.interventions.ablation import Zero
from itrain.interventions.base import Intervention
from itrain.interventions.boundless_das import RANGE
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.interventions.featurizers import Rotation
from itrain.interventions.masking import FixedMask
from itrain.interventions.reft import DiReFT, LoReFT, NoReFT
from itrain.interventions.steering import SteeringVector
from itrain.sharing.foreign.parts import ForeignError, orthogonal_rows, orthonormal, weight
from itrain.trust import shown

Dimensions = Sequence[int] | Mapping[str, Sequence[int]]
"""Coordinates of a rotation, of one variable or of several by name."""


class Saved(NamedTuple):
    """What a file and its reader know of an intervention."""

    state: Mapping[str, Any]
    place: str
    size_of_site: int | None
    """Features at the site, of one token; None where the module there does not tell."""
    swapped: int | None
    """How many coordinates are swapped, the first ones, where no others are named; pyvene's interchange_dim."""
    constant: bool
    """Whether the source is a vector in the file."""
    dimensions: Dimensions | None
    act_fn: str | None
    partition: Any
    """How pyvene divides the coordinates into blocks, which messages show."""

    @property
    def hidden_size(self) -> int:
        """The features at the site, for weights that do not tell them."""
        if self.size_of_site is None:
            raise ForeignError(f"{self.place} does not tell its number of features, and neither does the module there")
        return self.size_of_site


class Made(NamedTuple):
    """An intervention of itrain: what builds it, its features, and its weights."""

    intervention: Callable[[int], Intervention]
    hidden_size: int
    weights: Mapping[str, Tensor] = {}
    joins: bool = False
    """Whether it sees the tokens of a site as one vector, where it has several."""


def _low_rank(saved: Saved) -> Made:
    rows = orthogonal_rows(saved.state, "rotate_layer", saved.place)
    if saved.dimensions is not None:
        (chosen,) = _blocks(saved, len(rows), several=False).values()
        rows = rows[chosen]
    return Made(partial(DAS, rank=len(rows)), rows.shape[1], {"subspace.rows": rows}, joins=True)


def _full_rotation(saved: Saved) -> Made:
    rows = orthogonal_rows(saved.state, "rotate_layer", saved.place)
    blocks = _blocks(saved, len(rows), several=True)
    chosen = [index for block in blocks.values() for index in block]
    others = [index for index in range(len(rows)) if index not in set(chosen)]
    sizes: Any = {name: len(block) for name, block in blocks.items()}
    # itrain's blocks are the first coordinates, in order; their order does not change what is swapped.
    weights = {"rotation.rows": rows[chosen + others]}
    return Made(partial(FullRotationDAS, blocks=sizes.get("", sizes)), rows.shape[1], weights, joins=True)


def _boundless(saved: Saved) -> Made:
    rows = orthogonal_rows(saved.state, "rotate_layer", saved.place)
    share = weight(saved.state, "intervention_boundaries", (1,), saved.place)[0].clamp(*RANGE)
    temperature = weight(saved.state, "temperature", (), saved.place)
    place = torch.arange(len(rows), dtype=rows.dtype)
    gate = torch.sigmoid(place / temperature) * torch.sigmoid((share * len(rows) - place) / temperature)
    return _gated(rows, gate, saved)


def _rotated_mask(saved: Saved) -> Made:
    rows = orthogonal_rows(saved.state, "rotate_layer", saved.place)
    return _gated(rows, _sigmoid(saved, "masks", len(rows)), saved)


def _mask(saved: Saved) -> Made:
    gate = _sigmoid(saved, "mask", saved.hidden_size)
    return Made(partial(FixedMask, gate=_gates(gate, saved)), len(gate))


def _sigmoid(saved: Saved, name: str, features: int) -> Float[Tensor, " features"]:
    logits = weight(saved.state, name, (features,), saved.place)
    return torch.sigmoid(logits / weight(saved.state, "temperature", (), saved.place))


def _gated(rows: Float[Tensor, "hidden hidden"], gate: Float[Tensor, " hidden"], saved: Saved) -> Made:
    made = partial(FixedMask, featurizer=Rotation, gate=_gates(gate, saved))
    return Made(made, len(rows), {"featurizer.rows": rows}, joins=True)


def _gates(gate: Float[Tensor, " features"], saved: Saved) -> list[float]:
    if not gate.isfinite().all():
        raise ForeignError(f"{saved.place} has gates that are not finite, from its mask and temperature")
    return gate.tolist()


def _vanilla(saved: Saved) -> Made:
    if saved.constant:
        raise ForeignError(f"{saved.place} replaces the activation by a constant, which itrain has no intervention for")
    return _whole(saved, FullVector)


def _zero(saved: Saved) -> Made:
    return _whole(saved, Zero)


def _whole(saved: Saved, intervention: Callable[[int], Intervention]) -> Made:
    if saved.swapped is not None and saved.swapped < saved.hidden_size:
        raise ForeignError(
            f"{saved.place} acts on the first {saved.swapped} of {saved.hidden_size} features; itrain's acts on all"
        )
    return Made(intervention, saved.hidden_size)


def _addition(saved: Saved, sign: float = 1.0) -> Made:
    if not saved.constant:
        raise ForeignError(f"{saved.place} adds the source's activation, which itrain has no intervention for")
    found = saved.state.get("source_representation")
    vector = found.flatten() if isinstance(found, Tensor) else torch.empty(0)
    if len(vector) != saved.hidden_size or not vector.is_floating_point():
        raise ForeignError(f"{saved.place} has no vector of {saved.hidden_size} features as its source_representation")
    vector = vector.float() * sign
    if saved.swapped is not None and saved.swapped < saved.hidden_size:
        vector = vector * (torch.arange(len(vector)) < saved.swapped)
    return Made(SteeringVector, len(vector), {"vector": vector})


def _subtraction(saved: Saved) -> Made:
    return _addition(saved, -1.0)


def _bias(saved: Saved) -> Made:
    vector = weight(saved.state, "bias", (None,), saved.place)
    return Made(SteeringVector, len(vector), {"vector": vector})


def _loreft(saved: Saved) -> Made:
    _require_linear(saved)
    columns = weight(saved.state, "rotate_layer", (None, None), saved.place)
    rows = orthonormal(columns.T, f"{saved.place}: 'rotate_layer'")
    return _low_rank_map(saved, LoReFT, {"subspace.rows": rows}, "")


def _consreft(saved: Saved) -> Made:
    rows = orthogonal_rows(saved.state, "rotate_layer", saved.place)
    bias = weight(saved.state, "learned_source", (len(rows),), saved.place)
    weights = {"subspace.rows": rows, "weight": torch.zeros_like(rows), "bias": bias}
    return Made(partial(LoReFT, rank=len(rows)), rows.shape[1], weights)


def _lobireft(saved: Saved) -> Made:
    rows = orthogonal_rows(saved.state, "rotate_layer", saved.place)
    vector = weight(saved.state, "learned_source", (len(rows),), saved.place) @ rows
    return Made(SteeringVector, len(vector), {"vector": vector})


def _direft(saved: Saved) -> Made:
    _require_linear(saved)
    rows = orthogonal_rows(saved.state, "rotate_layer", saved.place)
    return _low_rank_map(saved, DiReFT, {"projection": rows}, "learned_source.")


def _nodireft(saved: Saved) -> Made:
    _require_linear(saved)
    rows = weight(saved.state, "proj_layer.weight", (None, None), saved.place)
    return _low_rank_map(saved, DiReFT, {"projection": rows}, "learned_source.")


def _noreft(saved: Saved) -> Made:
    _require_linear(saved)
    rows = weight(saved.state, "proj_layer.weight", (None, None), saved.place)
    made = _low_rank_map(saved, NoReFT, {"projection": rows}, "learned_source.")
    if "proj_layer.bias" not in saved.state:
        return made
    # W1 h + b - (W2 h + c) has the one bias b - c.
    bias = made.weights["bias"] - weight(saved.state, "proj_layer.bias", (len(rows),), saved.place)
    return made._replace(weights={**made.weights, "bias": bias})


def _low_rank_map(
    saved: Saved, intervention: Callable[..., Intervention], weights: Mapping[str, Tensor], prefix: str
) -> Made:
    """An edit with the map W h + b of the learned source besides."""
    (rows,) = weights.values()
    rank, hidden_size = rows.shape
    learned = {
        "weight": weight(saved.state, f"{prefix}weight", (rank, hidden_size), saved.place),
        "bias": weight(saved.state, f"{prefix}bias", (rank,), saved.place),
    }
    return Made(partial(intervention, rank=rank), hidden_size, {**weights, **learned})


def _require_linear(saved: Saved) -> None:
    if saved.act_fn is None:
        raise ForeignError(
            f"{saved.place} does not say its act_fn; add act_fn='linear', unless you have trained with another"
        )
    if saved.act_fn != "linear":
        raise ForeignError(f"{saved.place}: itrain's interventions have no activation function, such as {saved.act_fn}")


def _blocks(saved: Saved, count: int, *, several: bool) -> dict[str, list[int]]:
    """The coordinates that are swapped, by variable; of one variable under the name ""."""
    named = saved.dimensions
    if named is None and saved.swapped is not None and saved.swapped < count:
        named = range(saved.swapped)
    if named is None:
        hint = "" if saved.partition is None else f", of its subspace_partition {shown(saved.partition)}"
        raise ForeignError(
            f"{saved.place} does not say which of its {count} coordinates are swapped{hint}; add "
            "dimensions=range(...), or dimensions={variable: ...}"
        )
    blocks = {name: list(each) for name, each in named.items()} if isinstance(named, Mapping) else {"": list(named)}
    if not several and len(blocks) > 1:
        raise ForeignError(f"{saved.place}: a subspace is one variable's; dimensions take a list")
    listed = [index for block in blocks.values() for index in block]
    wrong = [index for index in listed if not (isinstance(index, int) and 0 <= index < count)]
    if wrong or len(set(listed)) < len(listed) or not all(blocks.values()):
        raise ForeignError(f"{saved.place}: dimensions are different whole numbers from 0 to {count - 1}, one at least")
    return blocks


KINDS: Mapping[str, Callable[[Saved], Made]] = {
    "pyvene.LowRankRotatedSpaceIntervention": _low_rank,
    "pyvene.RotatedSpaceIntervention": _full_rotation,
    "pyvene.BoundlessRotatedSpaceIntervention": _boundless,
    "pyvene.SigmoidMaskRotatedSpaceIntervention": _rotated_mask,
    "pyvene.SigmoidMaskIntervention": _mask,
    "pyvene.VanillaIntervention": _vanilla,
    "pyvene.ZeroIntervention": _zero,
    "pyvene.AdditionIntervention": _addition,
    "pyvene.SubtractionIntervention": _subtraction,
    "pyreft.LoreftIntervention": _loreft,
    "pyreft.NoreftIntervention": _noreft,
    "pyreft.ConsreftIntervention": _consreft,
    "pyreft.LobireftIntervention": _lobireft,
    "pyreft.DireftIntervention": _direft,
    "pyreft.NodireftIntervention": _nodireft,
    "pyreft.BiasIntervention": _bias,
}
"""By package and class; the last one is in EasySteer's pyreft."""
