"""Networks that run a base model through nnsight's traces.

What is in here beyond the names below is of this wing alone.
"""

from itrain.networks.nnsight.library import LibraryError as LibraryError
from itrain.networks.nnsight.network import NNsightNetwork as NNsightNetwork

__all__ = ["LibraryError", "NNsightNetwork"]
