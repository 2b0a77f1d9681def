"""Control vectors in GGUF, as llama.cpp, repeng and EasySteer read them: a vector for each layer, added everywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from itrain.architectures import unwrap
from itrain.interventions.steering import SteeringVector
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.sharing.foreign.gguf import read, write
from itrain.sharing.foreign.parts import ForeignError, Part, assemble, module_of, taken
from itrain.sites import Site
from itrain.training.base import Training
from itrain.trust import shown

ARCHITECTURE = "controlvector"


def save_gguf(training: Training, file: str | Path, *, everywhere: bool = False) -> Path:
    """Write steering vectors as a control vector, strength included.

    Args:
        training: its interventions are steering vectors at blocks' outputs, above layer 0, which llama.cpp refuses.
        file: the file, usually ``....gguf``.
        everywhere: accept that a control vector acts at every token of prompt and response, where the training's do
            not: with another ``acts`` than ``all``, or another position.

    Raises:
        ForeignError: an intervention is something else, is at another site, or acts at some tokens only.
    """
    directions = directions_of(training, "a control vector", everywhere=everywhere)
    if 0 in directions:
        raise ForeignError(
            "site 'layer0.block_output': llama.cpp refuses a control vector with layer 0; EasySteer takes one: "
            "save_easysteer, or itrain export to=easysteer"
        )
    return write_directions(Path(file), directions, training)


def load_gguf(
    file: str | Path,
    model: nn.Module | BaseModel,
    *,
    layers: Sequence[int] | None = None,
    strength: float = 1.0,
    model_hint: str | None = None,
) -> Training:
    """Read a control vector: steering vectors at the outputs of blocks, which act at all tokens of prompt and response.

    Args:
        file: a GGUF file of the architecture ``controlvector``.
        model: the base model.
        layers: those of the file's layers that are steered, which the tools choose as they run; None: all.
        strength: by what the vectors are multiplied, which the tools choose as they run.
        model_hint: the type of model that the file was made for, where that is called otherwise than this model's.

    Raises:
        ForeignError: the file is damaged, quantised or for another type of model, or lacks a layer.
    """
    file, model = Path(file), module_of(model)
    directions, hint = _read(file)
    expected = model_hint or _model_type(model)
    if hint not in (expected, "unknown"):
        raise ForeignError(
            f"'{file}' is for models of type {shown(hint)}, and this one is of type '{expected}'; if they are the "
            f"same, add model_hint={shown(hint)}"
        )
    chosen = sorted(directions) if layers is None else list(layers)
    if lacking := [layer for layer in chosen if layer not in directions]:
        has = ", ".join(map(str, sorted(directions)))
        raise ForeignError(f"'{file}' has no direction for layer {lacking[0]}; it has {has}")
    parts = [
        Part(
            Site(layer=layer, component="block_output", position="all"),
            partial(SteeringVector, alpha=float(strength)),
            len(directions[layer]),
            {"vector": directions[layer]},
        )
        for layer in chosen
    ]
    if not parts:
        raise ForeignError(f"'{file}' has no directions" if not directions else "layers: name one at least")
    return assemble(parts, HookedNetwork(model), f"'{file}'", acts="all")


def directions_of(training: Training, kind: str, *, everywhere: bool) -> dict[int, Float[Tensor, " hidden"]]:
    """The vector that a training adds at each layer.

    Raises:
        ForeignError: it does something else besides.
    """
    found: dict[int, Tensor] = {}
    for site, intervention in taken(training, kind):
        affine = intervention.affine()
        if affine is None or affine.matrix is not None or affine.constant is None:
            name = type(intervention).__name__
            raise ForeignError(f"site '{site}': {name} is no vector that is added, which is all that {kind} holds")
        layer = block_of(site, training, kind, everywhere=everywhere)
        if layer in found:
            raise ForeignError(f"site '{site}': {kind} has one vector for a layer, and this training has two")
        found[layer] = affine.constant.float().cpu()
    return found


def block_of(site: Site, training: Training, kind: str, *, everywhere: bool) -> int:
    """The layer of a site at a block's output, where the training acts as the file will."""
    if site.layer is None or site.component != "block_output":
        raise ForeignError(f"site '{site}': {kind} acts at block_output alone")
    acts = training.arguments.get("acts", "prompt")
    if not (everywhere or (acts == "all" and site.position in (None, "all"))):
        raise ForeignError(
            f"site '{site}': {kind} does not say at which tokens it acts, and by itself acts at all of prompt and "
            f"response; the training's acts={acts!r} at '{site.position}'. Add everywhere=True to write it all the same"
        )
    return site.layer


def write_directions(file: Path, directions: Mapping[int, Float[Tensor, " hidden"]], training: Training) -> Path:
    """Write vectors by layer."""
    keys: dict[str, str | int] = {
        "general.architecture": ARCHITECTURE,
        f"{ARCHITECTURE}.model_hint": _model_type(training.network.model),
        f"{ARCHITECTURE}.layer_count": len(directions),
    }
    write(file, keys, {f"direction.{layer}": each for layer, each in sorted(directions.items())})
    return file


def _read(file: Path) -> tuple[dict[int, Float[Tensor, " hidden"]], str]:
    """The directions of a file by layer, and the type of model that they are for."""
    keys, vectors = read(file)
    if (architecture := keys.get("general.architecture", ARCHITECTURE)) != ARCHITECTURE:
        raise ForeignError(f"'{file}' is not a control vector: its architecture is {shown(architecture)}")
    found: dict[int, Tensor] = {}
    for name, vector in vectors.items():
        layer = re.fullmatch(r"direction\.(\d{1,6})", name)
        if layer is None or int(layer[1]) in found:
            raise ForeignError(f"'{file}' has the tensor {shown(name)}, which is no direction.<layer> of its own")
        found[int(layer[1])] = vector
    hint = keys.get(f"{ARCHITECTURE}.model_hint")
    return found, hint if isinstance(hint, str) else "unknown"


def _model_type(model: nn.Module) -> str:
    found = getattr(getattr(unwrap(model), "config", None), "model_type", "")
    if not found:
        raise ForeignError(
            f"a control vector names its model's type, and {type(model).__name__} has no config with a model_type"
        )
    return found
