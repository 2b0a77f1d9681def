"""Chooses how a base model is run: replayed where that is exact, else under plain hooks."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from itrain.bounds import require_at_least
from itrain.networks.base import Network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import Replay, ReplayNetwork, obstacle


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

    Raises:
        ValueError: replay is ``on`` and would not be exact, ``compile`` is set and nothing is replayed or
            ``gradient_checkpointing`` is set too, or the model's blocks are not known.
    """
    require_at_least(0, budget_gib=budget_gib)
    require_at_least(1, uses=uses)
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
