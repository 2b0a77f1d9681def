"""Featurizer triples of MIB's causal-variable track: what it submits, for each site, as three files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.files import replacing_folder
from itrain.interventions.base import Intervention
from itrain.interventions.blocks import FixedBlocks
from itrain.interventions.controls import FullVector, RandomSubspace
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.interventions.directions import Directions
from itrain.interventions.featurizers import Featurizer, Identity, Rotation, Subspace
from itrain.interventions.masking import FixedMask
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.sharing.foreign.parts import (
    UNEVEN,
    ForeignError,
    Part,
    assemble,
    module_of,
    orthogonal_rows,
    size_at,
    taken,
    tensors,
    unevenness,
    weight,
)
from itrain.sites import Site
from itrain.training.base import Training
from itrain.trust import TrustError, read_json, shown

KINDS = ("_inverse_featurizer", "_featurizer", "_indices")
SUBSPACE = ("SubspaceFeaturizerModule", "SubspaceInverseFeaturizerModule")
IDENTITY = ("IdentityFeaturizerModule", "IdentityInverseFeaturizerModule")

_UNIT = re.compile(
    r"(?P<unit>ResidualStream|AttentionHead)\(Layer[-_:](?P<layer>-?\d+)(?:,(?P<component>block_input|block_output))?"
    r"(?:,Head[-_:](?P<head>\d+))?,Token[-_:](?P<token>.+)\)"
)
_EXACT = 1e-6
"""How far a free parameter may be from the rows that it stands for, to be written in their place."""


class Features(NamedTuple):
    """A featurizer: rows R of features R h, or None for the neurons; and the features that are swapped, or None."""

    rows: Float[Tensor, "rank hidden"] | None
    indices: list[int] | None


def save_mib(training: Training, folder: str | Path) -> Path:
    """Write the interventions of a training as MIB's featurizer triples, one for each site.

    A folder of a submission is named after task, model and variable, as in
    ``4_answer_MCQA_Qwen2ForCausalLM_answer_pointer``; the positions' names must be those of its token positions.

    Raises:
        ForeignError: an intervention is no swap of features in an orthonormal basis, its gates are neither 0 nor 1, or
            its site is neither a block's output nor an attention head's value.
    """
    folder = Path(folder)
    found = {
        _unit(site): (site, _features(site, each), each.hidden_size) for site, each in taken(training, "MIB's track")
    }
    with replacing_folder(folder) as beside:
        for name, written in found.items():
            _write(beside / name, *written)
    return folder


def load_mib(
    folder: str | Path,
    model: nn.Module | BaseModel,
    *,
    component: str | None = None,
    position: str | Mapping[str, str] | None = None,
) -> Training:
    """Read the featurizer triples of a folder, of one model and variable.

    The files name layers, heads and tokens, the latter by names of the tool's own. Those that :func:`save_mib` has
    written also know their sites.

    Args:
        folder: the folder with ``..._featurizer``, ``..._inverse_featurizer`` and ``..._indices``.
        model: the base model.
        component: what ``ResidualStream`` means, which the files do not say: ``block_output`` in the track itself.
        position: the position of each token name, for example ``{"last_token": "last"}``; or one for all.

    Raises:
        ForeignError: a setting is needed, the files are damaged or hold more than tensors, or a featurizer is of a
            class that itrain does not have.
    """
    folder = Path(folder)
    names = sorted(path.name.removesuffix(KINDS[0]) for path in folder.glob(f"*{KINDS[0]}"))
    if not names:
        raise ForeignError(f"'{folder}' holds no files of MIB's track: there is no ...{KINDS[0]} in it")
    network = HookedNetwork(module_of(model))
    parts = [_part(folder / name, network, component, position) for name in names]
    return assemble(parts, network, f"'{folder}'")


def _unit(site: Site) -> str:
    """The name of a site's files."""
    position = site.position or "all"
    if not re.fullmatch(r"[\w.+-]+", position):
        raise ForeignError(f"site '{site}': its position is no name of a file; name the tokens in the task")
    if site.count is not None and site.count > 1:
        raise ForeignError(f"site '{site}': MIB's track joins tokens of one site; list them as sites of one token each")
    if site.layer is not None and site.component == "block_output":
        return f"ResidualStream(Layer-{site.layer},Token-{position})"
    if site.component == "attention_value_output" and site.head is not None:
        return f"AttentionHead(Layer-{site.layer},Head-{site.head},Token-{position})"
    raise ForeignError(
        f"site '{site}': MIB's track knows a block's output (a block's input is the output of the one before) and "
        "the value of an attention head, attention_value_output.head<H>"
    )


def _features(site: Site, intervention: Intervention) -> Features:
    name = f"site '{site}': {type(intervention).__name__}"
    if isinstance(intervention, DAS):
        return Features(_rows(intervention.subspace), None)
    if isinstance(intervention, FullRotationDAS | FixedBlocks):
        if len(intervention.blocks) > 1:
            raise ForeignError(f"{name} has blocks of several variables, {', '.join(intervention.blocks)}; MIB has one")
        is_rotated = isinstance(intervention, FullRotationDAS)
        return Features(_rows(intervention.featurizer) if is_rotated else None, list(range(intervention.rank)))
    if isinstance(intervention, Directions | RandomSubspace):
        return Features(intervention.rows[intervention.rows.abs().sum(1) > 0], None)
    if isinstance(intervention, FullVector):
        return Features(None, None)
    if not isinstance(intervention, FixedMask):
        raise ForeignError(f"{name} is no swap of features in an orthonormal basis, which is all that MIB's files hold")
    gate = intervention.gate
    if not ((gate == 0) | (gate == 1)).all():
        raise ForeignError(f"{name} has gates between 0 and 1; MIB's indices are of features that are swapped whole")
    if not isinstance(intervention.featurizer, Identity | Subspace | Rotation):
        kind = type(intervention.featurizer).__name__
        raise ForeignError(f"{name} has features of {kind}, which is no rotation; MIB's files hold rotations alone")
    rows = None if isinstance(intervention.featurizer, Identity) else _rows(intervention.featurizer)
    return Features(rows, gate.nonzero().flatten().tolist())


def _rows(featurizer: Featurizer) -> Float[Tensor, "rank hidden"]:
    """The rows R, or the free parameter that they come from where it is orthonormal itself.

    R is then the same to the last bit when the file is read again.
    """
    rows: Tensor = featurizer.rows.detach()  # type: ignore[assignment]
    free: Tensor = featurizer.parametrizations.rows.original.detach()  # type: ignore[union-attr,assignment]
    return free if (free - rows).abs().max() <= _EXACT else rows


def _write(path: Path, site: Site, features: Features, hidden_size: int) -> None:
    rows, indices = features
    classes, extra, state = IDENTITY, {}, {}
    if rows is not None:
        columns = rows.float().cpu().T.contiguous()
        classes, state = SUBSPACE, _orthogonal_state(columns)
        extra = {"rotation_matrix": columns, "requires_grad": True}
    info = {
        "featurizer_class": classes[0],
        "inverse_featurizer_class": classes[1],
        "n_features": hidden_size if rows is None else len(rows),
        "additional_config": extra,
        "site": str(site),
    }
    for kind in KINDS[:2]:
        torch.save({"model_info": info, "state_dict": state}, f"{path}{kind}")
    Path(f"{path}{KINDS[2]}").write_text(json.dumps(indices))


def _orthogonal_state(columns: Float[Tensor, "hidden rank"]) -> dict[str, Tensor]:
    """The state of a rotation layer with these columns, which the track's loader demands."""
    layer = nn.Module()
    layer.rotate = nn.Module()
    layer.rotate.weight = nn.Parameter(columns.clone())
    with torch.random.fork_rng(devices=[]):  # the other columns of the basis are drawn
        torch.manual_seed(0)
        nn.utils.parametrizations.orthogonal(layer.rotate, "weight")
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def _part(path: Path, network: HookedNetwork, component: str | None, position: str | Mapping[str, str] | None) -> Part:
    place = f"'{path}{KINDS[1]}'"
    info, state = _read(path, KINDS[1])
    inverse, inverse_state = _read(path, KINDS[0])
    if (info.get("featurizer_class"), inverse.get("inverse_featurizer_class")) not in (SUBSPACE, IDENTITY):
        raise ForeignError(
            f"{place} is of the class {shown(info.get('featurizer_class'))}, and its inverse of "
            f"{shown(inverse.get('inverse_featurizer_class'))}; itrain has {SUBSPACE[0]} and {IDENTITY[0]}"
        )
    site = _site(path.name, info.get("site"), component, position, place)
    indices = _indices(Path(f"{path}{KINDS[2]}"))
    if info["featurizer_class"] == SUBSPACE[0]:
        rows = _matrix(info, state, place)
        if not _alike(orthogonal_rows(inverse_state, "rotate", f"'{path}{KINDS[0]}'"), rows):
            raise ForeignError(f"{place} is damaged: its inverse in '{path.name}{KINDS[0]}' is of another rotation")
        return _part_of(site, Features(rows, indices), rows.shape[1], place)
    size = size_at(network, site, place)
    assert size is not None, "a named component tells its size"
    return _part_of(site, Features(None, indices), size, place)


def _part_of(site: Site, features: Features, hidden_size: int, place: str) -> Part:
    rows, indices = features
    weights: dict[str, Tensor] = {}
    featurizer: Callable[[int], Featurizer] = Identity
    if rows is not None:
        if indices is None:
            return Part(site, partial(DAS, rank=len(rows)), hidden_size, {"subspace.rows": rows})
        weights = {"featurizer.rows": rows}
        featurizer = Rotation if len(rows) == hidden_size else partial(Subspace, rank=len(rows))
    elif indices is None:
        return Part(site, FullVector, hidden_size)
    count = hidden_size if rows is None else len(rows)
    if beyond := [index for index in indices if index >= count]:
        raise ForeignError(f"{place} has {count} features, and its indices name feature {beyond[0]}")
    swapped = set(indices)
    gate = [int(index in swapped) for index in range(count)]
    return Part(site, partial(FixedMask, featurizer=featurizer, gate=gate), hidden_size, weights)


def _read(path: Path, kind: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What a file says of its featurizer, and its weights."""
    file = Path(f"{path}{kind}")
    found = tensors(file)
    info, state = (found.get(key) if isinstance(found, dict) else None for key in ("model_info", "state_dict"))
    if not isinstance(info, dict) or not isinstance(state, dict):
        raise ForeignError(f"'{file}' is no featurizer of MIB's track: it has no model_info and state_dict")
    return info, state


def _matrix(info: Mapping[str, Any], state: Mapping[str, Any], place: str) -> Float[Tensor, "rank hidden"]:
    """R as the matrix in the file, which is the one that the tool makes of the weights beside it."""
    rows = weight(info.get("additional_config"), "rotation_matrix", (None, None), place).T
    found = orthogonal_rows(state, "rotate", place)
    if not _alike(rows, found):
        raise ForeignError(f"{place} is damaged: its rotation_matrix is not that of its weights")
    return rows.contiguous() if unevenness(rows) <= UNEVEN else found


def _alike(one: Float[Tensor, "_ _"], other: Float[Tensor, "_ _"]) -> bool:
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=0, atol=UNEVEN)


def _indices(file: Path) -> list[int] | None:
    try:
        found = read_json(file)
    except TrustError as error:
        raise ForeignError(str(error)) from error
    whole = isinstance(found, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in found)
    if found is not None and not (whole and all(each >= 0 for each in found)):
        raise ForeignError(f"'{file}' is no list of features, nor null for all of them")
    return found


def _site(name: str, known: Any, component: str | None, position: str | Mapping[str, str] | None, place: str) -> Site:
    """The site that a file's name and the settings tell, or the one that itrain wrote into the file."""
    try:
        if isinstance(known, str) and component is None and position is None:
            return Site.parse(known)
        unit = _UNIT.fullmatch(name)
        if unit is None or int(unit["layer"]) < 0:
            raise ForeignError(
                f"{place}: {shown(name)} is neither ResidualStream(Layer-..., Token-...) nor AttentionHead"
            )
        token = unit["token"]
        at = position.get(token) if isinstance(position, Mapping) else position
        if at is None:
            raise ForeignError(
                f"{place} does not say where the token {shown(token)} is; add position={{{token!r}: 'last'}}, or "
                "where it is"
            )
        if unit["unit"] == "AttentionHead":
            if unit["head"] is None:
                raise ForeignError(f"{place}: {shown(name)} does not say which head")
            return Site(
                layer=int(unit["layer"]), component="attention_value_output", head=int(unit["head"]), position=at
            )
        component = component or unit["component"]
        if component is None:
            raise ForeignError(
                f"{place} does not say which end of the block its stream is; add component='block_output', as in the "
                "track itself"
            )
        return Site(layer=int(unit["layer"]), component=component, position=at)
    except ForeignError:
        raise
    except ValueError as error:
        raise ForeignError(f"{place}: {error}") from error
