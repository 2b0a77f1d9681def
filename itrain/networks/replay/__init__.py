"""Replay: a frozen model's edited runs without what no edit can change, compared with plain hooks.

The wing's public face. Only :mod:`itrain.networks.choose` imports it.
"""

from __future__ import annotations

from typing import Any

from itrain.networks.replay.compiled import CompileError as CompileError
from itrain.networks.replay.eligible import obstacle as obstacle
from itrain.networks.replay.network import Replay as Replay
from itrain.networks.replay.network import ReplayNetwork as ReplayNetwork


def __getattr__(name: str) -> Any:
    """``make_network`` under the path that configurations of before name."""
    if name == "make_network":
        from itrain.networks import choose

        return choose.make_network
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
