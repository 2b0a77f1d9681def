"""Models that stand in for those of a run: shapes without values, in ordinary modules that run as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from itrain.models import BaseModel
from itrain.models.skeleton import folder_of, skeleton
from itrain.models.stand_in import stand_in_tokenizer, tokenizer_of
from itrain.opening import base_model_of
from itrain.signatures import ConfigError
from itrain.tiny_world import words

EMBEDDED, PRETRAINED = "itrain.models.load_embedded", "itrain.models.load_pretrained"
NETWORK = "itrain.networks.choose.make_network"
ASSETS = Path(__file__).parents[1] / "assets" / "tiny_world"


class Faked(NamedTuple):
    """A base model without values, and what is said of its tokenizer."""

    base_model: BaseModel
    note: str = ""


def faked(cfg: DictConfig) -> Faked:
    """The configured base model without values.

    A model that does not come from a config.json is made as a run makes it, and its values are dropped.
    """
    _require_planned(cfg)
    given: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore[assignment]
    target, asked = (
        given["_target_"],
        {key: given[key] for key in ("dtype", "attn_implementation", "components") if key in given},
    )
    if target not in (EMBEDDED, PRETRAINED):
        made = base_model_of(cfg)
        without_storage(made.model)
        return Faked(made)
    if target == EMBEDDED:
        name, source, asked = "itrain/tiny-world", str(ASSETS), {"dtype": "float32", **asked}
    else:
        name = source = str(given["name"])
        if name == "itrain/tiny-world":
            source = str(ASSETS)
    folder, model = folder_of(source, given.get("revision")), skeleton(source, revision=given.get("revision"), **asked)
    without_storage(model)
    tokenizer, note = tokenizer_of(folder), ""
    if tokenizer is None:
        tokenizer = stand_in_tokenizer([*_texts(given_task(cfg)), *_texts(vars(words))])
        note = (
            "the tokenizer is a stand-in with one token a word, as the model's own is not on this machine: "
            "lengths are approximate"
        )
    return Faked(BaseModel(model=model, tokenizer=tokenizer, name=name, revision=given.get("revision")), note)


def _require_planned(cfg: DictConfig) -> None:
    """Refuse what changes a run's memory in ways that are not counted."""
    for key, what in (
        ("quantization", "it does not count packed weights; without it, the plan's weights are those before packing"),
        ("device_map", "it counts one device that holds the whole model, or trainer=fsdp"),
    ):
        if cfg.model.get(key) is not None:
            raise ConfigError(f"plan does not know model.{key}: {what}; leave it out")
    if cfg.network._target_ != NETWORK:
        raise ConfigError(f"plan does not know {cfg.network._target_}: it counts network=replay alone")


def given_task(cfg: DictConfig) -> Any:
    """The task's configuration as plain data."""
    return OmegaConf.to_container(cfg.task, resolve=True)


def without_storage(module: nn.Module) -> None:
    """Give all parameters, and buffers of floating point, values that take no memory and cannot be looked at."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            with mode:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            needs = tensor.requires_grad
            made[id(tensor)] = nn.Parameter(empty, requires_grad=needs) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    for part in module.modules():
        for name, each in part._parameters.items():
            if each is not None:
                part._parameters[name] = fake(each)
        for name, each in part._buffers.items():
            if each is not None and (each.is_meta or each.is_floating_point()):
                part._buffers[name] = fake(each)


def _texts(value: Any) -> Iterator[str]:
    """The texts in nested data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from (*_texts(key), *_texts(each))
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _texts(each)
