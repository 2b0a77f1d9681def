"""What files of other tools have in common: interventions at sites, read into a training or taken from one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.architectures import locate
from itrain.checkpoints import read_tensors
from itrain.factories import describe
from itrain.interventions.base import Intervention
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.placements import Placement
from itrain.sharing.reading import ExportError
from itrain.sharing.values import FLOATS, fill
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from itrain.training.base import Training
from itrain.training.finetuning import RepresentationFinetuning
from itrain.trust import DEPTH, VALUES, TrustError

UNEVEN = 1e-5
"""How far R R^T may be from 1: itrain's R is orthonormal, so more would change what the intervention computes."""


class ForeignError(ExportError):
    """A file of another tool cannot be read as an intervention, or cannot hold one."""


class Part(NamedTuple):
    """An intervention of a file: where it acts, what builds it, and the weights that it then gets."""

    site: Site
    intervention: Callable[[int], Intervention]
    hidden_size: int
    weights: Mapping[str, Tensor] = {}
    variables: tuple[str, ...] | None = None
    """Those whose source it takes; None: all."""


def module_of(model: nn.Module | BaseModel) -> nn.Module:
    """The module of a base model."""
    return model.model if isinstance(model, BaseModel) else model


def assemble(
    parts: Sequence[Part],
    network: HookedNetwork,
    place: str,
    *,
    shared: bool = False,
    join_positions: bool = False,
    acts: Literal["prompt", "all"] = "prompt",
) -> Training:
    """The training that has these interventions, ready to be tested or run.

    Those that take a source make an :class:`~itrain.training.alignment.AlignmentSearch`, the others a
    :class:`~itrain.training.finetuning.RepresentationFinetuning`.

    Raises:
        ForeignError: they do not fit the model, or cannot be in one training.
    """
    for part in parts:
        _require_size(network, part, place, joined=join_positions)
    first, *others = parts
    kinds = {_class(part).takes_source for part in parts}
    if len(kinds) > 1:
        raise ForeignError(f"{place}: some interventions take a source and others do not; read them from two folders")
    same = all(describe("", part.intervention) == describe("", first.intervention) for part in others)
    placements = [
        Placement(write=part.site, variables=part.variables, intervention=None if same else part.intervention)
        for part in parts
    ]
    intervention, sizes = first.intervention if same else None, [part.hidden_size for part in parts]
    try:
        if True in kinds:
            training: Training = AlignmentSearch(
                network=network,
                sites=placements,
                intervention=intervention,
                shared=shared,
                join_positions=join_positions,
                hidden_sizes=sizes,
            )
        else:
            training = RepresentationFinetuning(
                network=network,
                sites=placements,
                intervention=intervention,
                shared=shared,
                hidden_sizes=sizes,
                acts=acts,
            )
    except ValueError as error:
        raise ForeignError(f"{place}: {error}") from error
    for part, each in zip(parts, interventions_of(training).values(), strict=True):
        _fill(each, part, place)
    training.fitted.fill_(True)
    return training.eval()


def interventions_of(training: Training) -> Mapping[Placement, Intervention]:
    """The interventions of a training by their placements.

    Raises:
        ForeignError: it is of a kind that has others, or none.
    """
    if not isinstance(training, AlignmentSearch | RepresentationFinetuning):
        raise ForeignError(
            f"{type(training).__name__} is more than interventions at sites of a frozen model, which is all that files "
            "of other tools hold"
        )
    return training.trained


def taken(training: Training, tool: str) -> Iterator[tuple[Site, Intervention]]:
    """The interventions of a training as they are evaluated, for a file of another tool.

    Raises:
        ForeignError: a source is read elsewhere, sites serve different variables, positions are joined, a module's call
            is chosen, or a weight is not finite.
    """
    found = interventions_of(training)
    if len({placement.variables for placement in found}) > 1:
        raise ForeignError(f"site '{next(iter(found))}': {tool} cannot hold sites of different variables")
    try:
        acting = training.interchange.acting()  # type: ignore[union-attr]  # of both kinds
    except ValueError as error:
        raise ForeignError(str(error)) from error
    for placement, intervention in found.items():
        site = placement.write
        if placement.read != site:
            raise ForeignError(f"site '{placement}': {tool} cannot hold a source that is read at another site")
        if training.arguments.get("join_positions") and site.count != 1:
            raise ForeignError(f"site '{site}': {tool} cannot hold an intervention on joined positions")
        if site.step is not None:
            raise ForeignError(f"site '{site}': {tool} cannot name one call of a module")
        for name, weight in intervention.state_dict().items():
            if not weight.isfinite().all():
                raise ForeignError(f"site '{site}': the weight '{name}' is not finite; the training went wrong")
        yield site, acting[placement]


def tensors(file: Path) -> Any:
    """What a file of ``torch.save`` holds: tensors and plain data, and no code.

    Raises:
        ForeignError: it is damaged, holds more than that, or says that tensors are larger than the file.
    """
    try:
        found = read_tensors(file, "file of weights")
    except TrustError as error:
        raise ForeignError(str(error)) from error
    for tensor in _tensors_in(found, f"'{file}'"):
        sizes = tensor.numel() * tensor.element_size()
        is_here = tensor.layout == torch.strided and tensor.device.type != "meta"
        if not is_here or sizes > tensor.untyped_storage().nbytes():
            raise ForeignError(f"'{file}' is damaged: a tensor of shape {tuple(tensor.shape)} is not whole in it")
    return found


def weight(state: Any, name: str, shape: Sequence[int | None], place: str) -> Tensor:
    """A weight of a state dict, in fp32 or fp64, of a shape in which None stands for any size.

    Raises:
        ForeignError: it is missing, or of another kind or shape.
    """
    found = state.get(name) if isinstance(state, Mapping) else None
    if not isinstance(found, Tensor) or found.dtype not in FLOATS:
        raise ForeignError(f"{place} has no weight '{name}' in {', '.join(map(str, FLOATS))}")
    fits = found.ndim == len(shape) and all(
        size > 0 and given in (None, size) for given, size in zip(shape, found.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ForeignError(f"{place}: '{name}' has the shape {tuple(found.shape)}; ({wanted}) is needed")
    return found.to(torch.promote_types(found.dtype, torch.float32))


def size_at(network: HookedNetwork, site: Site, place: str) -> int | None:
    """The features at a site, where its module tells them.

    Raises:
        ForeignError: the model has no such site.
    """
    try:
        return locate(network.model, site).hidden_size
    except ValueError as error:
        raise ForeignError(f"{place}: {error}") from error


def orthogonal_rows(state: Any, name: str, place: str) -> Float[Tensor, "rank hidden"]:
    """R from torch's orthogonal parametrisation of the columns R^T, as pyvene's rotation layers save it.

    Raises:
        ForeignError: it is damaged, or not orthonormal.
    """
    prefix = f"{name}.parametrizations.weight"
    original = weight(state, f"{prefix}.original", (None, None), place)
    hidden, rank = original.shape
    if not 1 <= rank <= hidden:
        raise ForeignError(f"{place}: '{name}' has {rank} columns for {hidden} features")
    base = weight(state, f"{prefix}.0.base", (hidden, hidden), place)
    layer = nn.Module()
    # In fp32 the exponential of a large matrix is orthogonal to 1e-5 alone.
    layer.weight = nn.Parameter(torch.eye(hidden, rank, dtype=torch.float64))
    nn.utils.parametrizations.orthogonal(layer, "weight")
    layer.load_state_dict({"parametrizations.weight.original": original, "parametrizations.weight.0.base": base})
    return orthonormal(layer.weight.detach().T, f"{place}: '{name}'").to(original.dtype)


def orthonormal(rows: Float[Tensor, "rank hidden"], place: str) -> Float[Tensor, "rank hidden"]:
    """The rows, if they are orthonormal.

    Raises:
        ForeignError: they are not.
    """
    apart = unevenness(rows)
    if not apart <= UNEVEN:
        raise ForeignError(f"{place} is not orthonormal (R R^T is {apart:.2g} from 1), as itrain's rotations are")
    return rows.contiguous()


def unevenness(rows: Float[Tensor, "rank hidden"]) -> float:
    """How far R R^T is from 1."""
    exact = rows.double()
    return float((exact @ exact.T - torch.eye(len(exact), dtype=exact.dtype)).abs().max())


def _require_size(network: HookedNetwork, part: Part, place: str, *, joined: bool) -> None:
    """Refuse a site that has another size in the model."""
    one = size_at(network, part.site, place)
    size = None if one is None else one * ((part.site.count or 1) if joined else 1)
    if size not in (None, part.hidden_size):
        raise ForeignError(
            f"{place} is for {part.hidden_size} features at '{part.site}'; this model has {size} there, so the file "
            "belongs to another model or site"
        )


def _class(part: Part) -> type[Intervention]:
    made: Any = getattr(part.intervention, "func", part.intervention)
    return made


def _fill(intervention: Intervention, part: Part, place: str) -> None:
    for name, value in part.weights.items():
        path, _, leaf = name.rpartition(".")
        there = getattr(intervention.get_submodule(path), leaf)
        if there.shape != value.shape:
            raise ForeignError(f"{place}: '{name}' has the shape {tuple(value.shape)}; {tuple(there.shape)} is needed")
    try:
        fill(intervention, part.weights, place)
    except ForeignError:
        raise
    except ExportError as error:
        raise ForeignError(str(error)) from error


def _tensors_in(value: Any, place: str) -> Iterator[Tensor]:
    """The tensors among plain data, whose lists may hold each other, or themselves.

    Raises:
        ForeignError: there are more values, or levels of them, than a file of weights has.
    """
    left, count = [(value, 0)], 0
    while left:
        each, depth = left.pop()
        count += 1
        if depth > DEPTH or count > VALUES:
            raise ForeignError(f"{place} is deeper or longer than a file of weights")
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, Mapping | list | tuple):
            parts = each.values() if isinstance(each, Mapping) else each
            left += [(part, depth + 1) for part in parts]
