"""Folds: how an affine map before or behind a linear module becomes a part of its weights, and how it is taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.interventions.base import Affine

Columns = slice | Tensor | None
Undo = list[Callable[[], Any]]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """A change of some weights of a model, in place.

    Args:
        where: the weights, in words.
        change: does it, and notes how each of its parts is taken back.
        refused: why it cannot be done; None: it can.
    """

    where: str
    change: Callable[[Undo], None]
    refused: str | None = None
    _undo: Undo = field(default_factory=list)

    def do(self) -> None:
        self.change(self._undo)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map with weights of its own: torch's, or transformers' Conv1D."""
    weight: Any = getattr(module, "weight", None)
    known = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    return known and type(weight) is nn.Parameter and weight.ndim == 2 and weight.is_floating_point()


def fold_output(model: nn.Module, module: nn.Module, columns: Columns, affine: Affine) -> Fold:
    """The map behind a linear module: W := A W and b := A b + c, in the rows that give the columns."""
    path, places = path_of(model, module), slice(None) if columns is None else columns
    adds = affine.constant is not None and bool(affine.constant.any())
    lacks = adds and getattr(module, "bias", None) is None
    found = _setting_for_bias(model, path) if lacks else None

    def change(undo: Undo) -> None:
        if found is not None:
            _give_biases(model, *found, undo)
        weight, bias, (matrix, constant) = _matrix(module), _bias(module), _on(affine, module)
        if matrix is not None:
            _put(weight, places, matrix @ weight[places].double(), undo)
            if bias is not None:
                _put(bias, places, matrix @ bias[places].double(), undo)
        if constant is not None and bias is not None:
            _put(bias, places, bias[places].double() + constant, undo)

    return Fold(where=path, change=change, refused=_refusal(model, module, path, lacks=lacks and found is None))


def fold_input(model: nn.Module, modules: Sequence[nn.Module], columns: Columns, affine: Affine) -> Fold:
    """The map before the linear modules that read it: b := b + W c and W := W A, in the columns of W that do."""
    places = (slice(None), slice(None) if columns is None else columns)
    adds = affine.constant is not None and bool(affine.constant.any())
    paths = [path_of(model, module) for module in modules]
    lacking = [adds and getattr(module, "bias", None) is None for module in modules]
    found = [_setting_for_bias(model, path) if lacks else None for path, lacks in zip(paths, lacking, strict=True)]

    def change(undo: Undo) -> None:
        for module, setting in zip(modules, found, strict=True):
            if setting is not None and _bias(module) is None:
                _give_biases(model, *setting, undo)
            weight, bias, (matrix, constant) = _matrix(module), _bias(module), _on(affine, module)
            former = weight[places].double()
            if constant is not None and bias is not None:
                _put(bias, slice(None), bias.double() + former @ constant, undo)
            if matrix is not None:
                _put(weight, places, former @ matrix, undo)

    refusals = [
        _refusal(model, module, path, lacks=lacks and setting is None)
        for module, path, lacks, setting in zip(modules, paths, lacking, found, strict=True)
    ]
    refused = next(filter(None, refusals), None if modules else "no linear module reads it")
    return Fold(where=", ".join(paths), change=change, refused=refused)


def add_to_embeddings(model: nn.Module, constant: Float[Tensor, " hidden"]) -> Iterator[Fold]:
    """The constant, added to all rows of an embedding."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == len(constant):
            weight = module.weight

            def change(undo: Undo, weight: Tensor = weight) -> None:
                _put(weight, slice(None), weight.double() + constant.to(weight.device), undo)

            yield Fold(where=path, change=change, refused=_shared(model, weight, path))


def path_of(model: nn.Module, module: nn.Module) -> str:
    return next(path for path, each in model.named_modules() if each is module)


def _refusal(model: nn.Module, module: nn.Module, path: str, *, lacks: bool) -> str | None:
    if lacks:
        return f"{path} has no bias to take up a constant, and no setting of {type(model).__name__} gives it one"
    weight: Any = module.weight
    return _shared(model, weight, path)


def _shared(model: nn.Module, weight: Tensor, path: str) -> str | None:
    holders = [name for name, each in model.named_parameters(remove_duplicate=False) if each is weight]
    others = ", ".join(name for name in holders if not name.startswith(f"{path}."))
    return f"{path} shares its weights with {others}" if others else None


def _on(affine: Affine, module: nn.Module) -> Affine:
    weight: Any = module.weight
    return Affine(*(None if part is None else part.to(weight.device) for part in affine))


def _matrix(module: nn.Module) -> Float[Tensor, "out in"]:
    """The matrix itself, to be written to; Conv1D holds its transpose."""
    weight: Any = module.weight
    return weight.data if type(module) is nn.Linear else weight.data.T


def _bias(module: nn.Module) -> Float[Tensor, " out"] | None:
    bias: Any = getattr(module, "bias", None)
    return None if bias is None else bias.data


def _put(weight: Tensor, places: Any, value: Tensor, undo: Undo) -> None:
    """Write to some places of a weight, in the weight's precision."""
    former = weight[places].clone()
    undo.append(lambda: weight.__setitem__(places, former))
    weight[places] = value.to(weight.dtype)


def _setting_for_bias(model: nn.Module, path: str) -> tuple[str, list[str]] | None:
    """The setting of a model's configuration that gives a module a bias, and all biases that it gives."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    config: Any = model.config
    for setting, value in config.get_text_config().to_dict().items():
        if value is not False or "bias" not in setting:
            continue
        asked = deepcopy(config)
        setattr(asked.get_text_config(), setting, True)
        with torch.device("meta"):
            other = type(model)(asked)
        new = sorted({name for name, _ in other.named_parameters(remove_duplicate=False)} - known)
        if f"{path}.bias" in new and all(name.endswith(".bias") for name in new):
            return setting, new
    return None


def _give_biases(model: nn.Module, setting: str, names: Sequence[str], undo: Undo) -> None:
    """Give modules biases of 0, and the model's configuration the setting by which it is loaded with them."""
    config: Any = model.config
    undo.append(lambda: setattr(config.get_text_config(), setting, False))
    setattr(config.get_text_config(), setting, True)
    for name in names:
        module = model.get_submodule(name.removesuffix(".bias"))
        weight: Any = module.weight
        undo.append(lambda module=module: module.register_parameter("bias", None))
        module.bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False)
