"""Chooses how a base model is run: replayed where that is exact, else under plain hooks."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from itrain.bounds import require_at_least
from itrain.networks.base import Network
from itrain.networks.hooks import HookedNetwork, require_module
from itrain.networks.nnsight import RemoteNetwork
from itrain.networks.replay import Replay, ReplayNetwork, obstacle
from itrain.weights import served_by


def plain_network(model: nn.Module, *, trainable: bool = False) -> HookedNetwork:
    """The model's network without replay: under plain hooks, or on the server where its weights are.

    Raises:
        LibraryError: the model is on a server, and is to be trained itself.
    """
    served = served_by(model)
    if served is None:
        return HookedNetwork(model, trainable=trainable)
    return RemoteNetwork(model, trainable=trainable, remote="local" if Path(served.repo_id).is_dir() else True)


def make_network(
    model: nn.Module,
    *,
    replay: Replay = "auto",
    trainable: bool = False,
    uses: int | None = None,
    budget_gib: float = 4.0,
    folder: Path | str | None = None,
    compile: bool = False,
    gradient_checkpointing: bool = False,
) -> Network:
    """The model's network, replayed where that is exact (auto), always (on) or never (off).

    The other arguments are those of HookedNetwork and ReplayNetwork.

    Args:
        replay: ``auto``, ``on`` or ``off``.

    Raises:
        TypeError: the model is no module.
        ValueError: replay is ``on`` and would not be exact, ``compile`` is set and nothing is replayed or
            ``gradient_checkpointing`` is set too, or the model's blocks are not known.
    """
    require_module(model)
    require_at_least(0, budget_gib=budget_gib)
    require_at_least(1, uses=uses)
    if served_by(model) is not None:
        raise ValueError("the model is on a server, where nothing is replayed; choose network=nnsight")
    if compile and gradient_checkpointing:
        raise ValueError("compile=true and gradient_checkpointing=true exclude each other; leave one of them out")
    hooked = HookedNetwork(model, trainable=trainable, gradient_checkpointing=gradient_checkpointing)
    reason = "replay is off" if replay == "off" else obstacle(model) if replay == "auto" else None
    if reason is None:
        strict = replay == "on"
        return ReplayNetwork(hooked, uses=uses, budget_gib=budget_gib, folder=folder, strict=strict, compile=compile)
    if compile:
        raise ValueError(f"compile=true has no effect, since nothing is replayed: {reason}; leave compile out")
    hooked.why = reason
    return hooked
