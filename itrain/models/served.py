"""Base models on NDIF's servers: their modules and tokenizer are here, and none of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from itrain.models.base import BaseModel, ModelError
from itrain.models.loading import TINY_WORLD, load_tokenizer
from itrain.models.skeleton import give_row, row_given
from itrain.networks.nnsight.library import LibraryError, load_nnsight, require_key
from itrain.trust import printable

HERE = ("itrain.models.load_pretrained", "itrain.models.load_embedded")
"""What makes models that have a name."""
TINY = Path(__file__).parents[1] / "assets" / "tiny_world"


def served(node: Mapping[str, Any], remote: bool | str) -> BaseModel:
    """The model that a configuration names, without weights.

    Raises:
        LibraryError: nnsight is not installed, NDIF has no key, or the configuration names no model of the hub.
    """
    if remote is True:
        require_key()
    if node["_target_"] not in HERE:
        raise LibraryError(
            f"network.remote: {node['_target_']} makes a model here, and servers have those of the hub; choose "
            "model=hf model.name=<name>"
        )
    name = node.get("name", TINY_WORLD)
    if remote is True and (name == TINY_WORLD or Path(name).expanduser().is_dir()):
        raise LibraryError(
            f"network.remote=true: NDIF does not have '{name}'; choose a model of the hub with model=hf "
            "model.name=<name>, or network.remote=local for a rehearsal here"
        )
    row = row_given(node.get("components"), name)
    made = load_unloaded(name, revision=node.get("revision"), attn_implementation=node.get("attn_implementation"))
    give_row(made.model, row, name)
    return made


def load_unloaded(name: str, *, revision: str | None = None, attn_implementation: str | None = None) -> BaseModel:
    """A transformers model on NDIF's servers and its tokenizer, for networks that run it there.

    Its configuration alone is read, so that models of any size fit. What identifies it is its name and revision, which
    exports say; whether a server's weights are those of that name cannot be checked here.

    Args:
        name: a model's name on the hub; a folder for rehearsals in this process.
        revision: branch, tag or commit on the hub; None: the one that the server has.
        attn_implementation: how attention is computed, as transformers calls it.

    Raises:
        LibraryError: nnsight is not installed.
        ModelError: the configuration or the tokenizer cannot be read.
    """
    make = load_nnsight().TransformersModel
    source = str(TINY) if name == TINY_WORLD else name
    folder = Path(source).expanduser().is_dir()
    how: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    how |= {"task": "text-generation"} if folder else {}
    try:
        tokenizer = load_tokenizer(source, revision or "main")
        if tokenizer is None:
            raise ModelError("it has no tokenizer")
        # nnsight sets the tokenizer to pad on the left.
        view = make(source, revision=revision, tokenizer=deepcopy(tokenizer), **how)
    except Exception as error:  # what the hub and damaged files raise is of every kind
        reason = printable(next(iter(str(error).strip().splitlines()), ""))
        raise ModelError(f"model '{name}' cannot be described: {reason}") from error
    view._module.__dict__["served"] = view
    return BaseModel(model=view._module, tokenizer=tokenizer, name=name, revision=revision)
