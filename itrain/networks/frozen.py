"""What a checkpoint holds of a base model: the weights that are trained at the time, and no frozen ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from itrain.networks.base import Network
from itrain.quantized import is_part_of, packed_weights
from itrain.shards import divided

PREFIX = "_loaded_prefix"
"""A network's attribute: what the names of its model's weights begin with in the state that is being loaded."""


def keep_trained_weights_alone(network: Network) -> None:
    """Have the network's state leave out what is frozen, and forgive that when it is loaded.

    Any other weight that is missing is refused. Whole weights are divided where the model is sharded.
    """
    network.register_state_dict_post_hook(_drop_frozen_weights)
    network.register_load_state_dict_pre_hook(_note_prefix)
    network.register_load_state_dict_pre_hook(_divide_weights)
    network.register_load_state_dict_post_hook(_forgive_frozen_weights)


def _drop_frozen_weights(network: Network, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in _frozen(network, state, f"{prefix}model."):
        del state[name]


def _note_prefix(network: Network, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    setattr(network, PREFIX, f"{prefix}model.")


def _divide_weights(network: Network, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Divide whole weights as those of the model are, where it is sharded."""
    for name, weight in network.model.named_parameters(remove_duplicate=False):
        if (key := f"{prefix}model.{name}") in state:
            state[key] = divided(state[key], weight)


def _forgive_frozen_weights(network: Network, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    frozen = _frozen(network, missing, getattr(network, PREFIX))
    missing[:] = [name for name in missing if name not in frozen]


def _frozen(network: Network, names: Iterable[str], prefix: str) -> set[str]:
    """Those of the state's names that stand for what is not trained: parameters and, of a frozen model, buffers."""
    trained = {
        f"{prefix}{name}": parameter.requires_grad
        for name, parameter in network.model.named_parameters(remove_duplicate=False)
    }
    packed = packed_weights(network.model)
    return {
        name
        for name in names
        if name.startswith(prefix)
        and (not trained.get(name, network.trainable) or is_part_of(name.removeprefix(prefix), packed))
    }
