"""nnsight itself: loaded when a network asks for it, since importing it changes the process."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from itrain.signatures import ConfigError

EXTRA = "pip install 'itrain[nnsight]'"


class LibraryError(ConfigError):
    """nnsight is not here, or has no key for NDIF."""


def load_nnsight() -> Any:
    """The module ``nnsight``, of which no stub describes what is used here.

    Its import gives every object of the process a method ``save`` and wraps ``torch.Tensor.backward``, so that nothing
    but a network that is asked for by name imports it.

    Raises:
        LibraryError: it is not installed.
    """
    if find_spec("nnsight") is None:
        raise LibraryError(f"network=nnsight: nnsight is not installed; {EXTRA}")
    return import_module("nnsight")


def transport_errors() -> tuple[type[Exception], ...]:
    """What nnsight raises where a server refuses a run or fails in it, or where none answers."""
    remote, sockets = import_module("nnsight.intervention.backends.remote"), import_module("websocket")
    return remote.RemoteError, sockets.WebSocketException, import_module("httpx").HTTPError, OSError


def require_key() -> None:
    """Refuse runs on NDIF that its servers would refuse.

    Raises:
        LibraryError: nnsight is not installed, or knows no key.
    """
    load_nnsight()
    if not import_module("nnsight.schema.config").CONFIG.API.APIKEY:
        raise LibraryError(
            "network.remote=true: there is no key for NDIF; set NDIF_API_KEY, or leave network.remote out to run the "
            "model here"
        )
