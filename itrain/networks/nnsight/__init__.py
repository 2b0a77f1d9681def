"""Networks that run a base model through nnsight's traces, here or on NDIF's servers.

What is in here beyond the names below is of this wing alone.
"""

from __future__ import annotations

from torch import nn

from itrain.networks.base import Network
from itrain.networks.nnsight.library import LibraryError as LibraryError
from itrain.networks.nnsight.network import NNsightNetwork as NNsightNetwork
from itrain.networks.nnsight.remote import RemoteNetwork as RemoteNetwork

__all__ = ["LibraryError", "NNsightNetwork", "RemoteNetwork", "make_nnsight_network"]


def make_nnsight_network(model: nn.Module, *, trainable: bool = False, remote: bool | str = False) -> Network:
    """The model's network under nnsight's traces: here, or, with ``remote``, where its weights are.

    The arguments are those of NNsightNetwork and RemoteNetwork.

    Raises:
        LibraryError: nnsight is not installed, or NDIF has no key.
    """
    if remote:
        return RemoteNetwork(model, trainable=trainable, remote=remote)
    return NNsightNetwork(model, trainable=trainable)
