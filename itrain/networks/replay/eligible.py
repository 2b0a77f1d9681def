"""What can be replayed: which models, in which state, on which inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

# torch has no public names for the hooks of all modules.
from torch.nn.modules import module as hooks_of_all

from itrain.architectures import architecture, blocks, unwrap
from itrain.devices import execution_devices, is_dispatched, kept_weights
from itrain.inputs import ModelInputs
from itrain.networks.forward import shares_keys, takes_cache
from itrain.quantized import rounds_inputs
from itrain.shards import has_shards, own_class

TEXT = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
"""Arguments of a model's forward that say no more than which tokens an example has."""
INTERNAL = frozenset(vars(nn.Module()))
"""The attributes of a module that are torch's own."""
HELD = (
    "_modules",
    "_parameters",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Those among them whose contents a run depends on."""
EVERYWHERE: tuple[Mapping[int, Any], ...] = (
    hooks_of_all._global_forward_hooks,
    hooks_of_all._global_forward_pre_hooks,
    hooks_of_all._global_backward_hooks,
    hooks_of_all._global_backward_pre_hooks,
)
"""The hooks that are called for all modules."""


def obstacle(model: nn.Module) -> str | None:
    """Why runs of the model cannot be resumed with the same result; None where they can."""
    try:
        blocks(model)
    except ValueError as unknown:
        return str(unknown).partition(". ")[0]
    row = architecture(model)
    if row is not None and row.stacks:
        return "the model has several stacks of blocks, whose tokens differ"
    if shares_keys(model):
        return "some blocks take their keys and values from an earlier one, which a resumed run may skip"
    if any(parameter.requires_grad for parameter in model.parameters()):
        return "the model's weights are trained"
    if any(module.training for module in model.modules()):
        return "the model is not in eval mode"
    if has_shards(model):
        return "the model's weights are sharded over processes"
    if rounds_inputs(model):
        return "its 8-bit modules round the tokens of a run together"
    places = {parameter.device for parameter in model.parameters()}
    if is_dispatched(model):
        # What is offloaded is brought to one device, on which each module computes as ever.
        places = set(execution_devices(model))
    elif any(place.type == "meta" for place in places):
        return "weights of the model are on the meta device"
    if len(places) > 1 or _is_split(model):
        return "the model's weights are spread over several devices"
    hooked = next((name for name, module in model.named_modules() if _hooks_of_others(module)), None)
    if hooked is not None:
        return f"other code has hooks on the model's module '{hooked}'"
    return "other code has hooks on all modules" if hooks_everywhere() else None


def unkept(model: nn.Module) -> str | None:
    """Why keys and values of earlier tokens cannot be kept; None where they can."""
    row, model = architecture(model), unwrap(model)
    if row is not None and row.recurrent:
        return "blocks hand on a state from token to token, which is not kept"
    return None if takes_cache(model) else f"the forward of {own_class(model).__name__} takes no cache"


def shortest_changing(model: nn.Module) -> int | None:
    """From how many tokens on the model's rotary embedding depends on the longest text of a run; None: it never does.

    transformers calls such embeddings ``dynamic`` and ``longrope``.
    """
    config: Any = getattr(unwrap(model), "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    own = config.get_text_config()
    limits = [
        min(own.max_position_embeddings, each.get("original_max_position_embeddings") or own.max_position_embeddings)
        for each in _rotary_settings(getattr(own, "rope_parameters", None))
        if "dynamic" in each["rope_type"] or each["rope_type"] == "longrope"
    ]
    return min(limits, default=None)


def unfit(inputs: ModelInputs, *, causal: bool, all_tokens: bool = False, changing: int | None = None) -> str | None:
    """Why the inputs cannot be replayed; None where they can.

    Args:
        inputs: what the model is given.
        causal: whether a token sees only itself and those before it.
        all_tokens: whether edits or the answer take in all tokens, padding among them.
        changing: from how many tokens on a run's longest text changes what the model computes; None: it never does.
    """
    if changing is not None and inputs.length >= changing:
        return f"the rotary embedding depends on the longest text of a run from {changing} tokens on"
    if others := inputs.arguments.keys() - TEXT:
        return f"the model is given '{min(others)}' besides tokens"
    left, right = inputs.padding
    if not (left or right):
        return None
    if "attention_mask" not in inputs.arguments:
        return "there is padding and no attention mask"
    if left and not causal:
        return "an encoder counts padding on the left as tokens"
    if all_tokens:
        return "the answer or an edit takes in padding"
    return None


def inexact(reason: str) -> ValueError:
    """The error where replay is insisted on."""
    return ValueError(f"replay would not be exact: {reason}")


class State:
    """A model as it is: modules, forwards, hooks, attributes, configurations, weights and the precision of a run.

    ``holds`` says whether all that is the same still, without looking at the values of a weight: a write through
    ``.data`` leaves no trace, nor does a change of the attributes of a module that is offloaded. The references that
    are kept go with the state.

    Args:
        model: the model, wrappers included.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._precision = model, precision(model)
        self._modules = modules_of(model)
        self._classes = [type(module) for module in self._modules]
        self._forwards = {kind: kind.forward for kind in self._classes}
        self._everywhere = hooks_everywhere()
        self._live: list[Any] = []
        self._tensors: list[Tensor] = []
        seen: set[int] = set()
        for module in self._modules:
            own = vars(module)
            if kept_weights(module) is not None:
                # Each run brings its weights and takes them away again, as other objects.
                self._live += [own[name] for name in HELD if name not in ("_parameters", "_buffers")]
                continue
            self._live += [own, *(own[name] for name in HELD)]
            self._tensors += [*module._parameters.values(), *module._buffers.values()]
            for name in own.keys() - INTERNAL:
                self._watch(own[name], seen)
        self._copies = [copy(each) for each in self._live]
        # Tensors of other classes may have no memory of their own.
        self._tensors = [each for each in self._tensors if type(each) in (Tensor, nn.Parameter)]
        self._marks = self._marked()

    def holds(self) -> bool:
        """Whether the model is as it was."""
        try:
            same = self._live == self._copies
        except (RuntimeError, TypeError, ValueError):
            # Tensors and arrays that are compared are not the same object, and do not tell by a single truth value.
            return False
        return (
            same
            and self._classes == [type(module) for module in self._modules]
            and all(kind.forward is forward for kind, forward in self._forwards.items())
            and self._everywhere == (hooks_everywhere() if any(EVERYWHERE) else [])
            and self._marks == self._marked()
            and self._precision == precision(self._model)
        )

    def _watch(self, value: Any, seen: set[int]) -> None:
        """Have what a container or a configuration holds compared, and what those within it hold."""
        if isinstance(value, Tensor):
            self._tensors.append(value)
            return
        # Of other objects the identity is compared: what they refer to could be anything, such as a data set.
        held = value if isinstance(value, dict | list | set) else None
        if hasattr(value, "to_dict") and hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
            held = vars(value)
        if held is None or id(held) in seen:
            return
        seen.add(id(held))
        self._live.append(held)
        for each in held.values() if isinstance(held, dict) else held:
            self._watch(each, seen)

    def _marked(self) -> list[tuple[int, int, bool]]:
        return [
            (each.data_ptr(), 0 if each.is_inference() else each._version, each.requires_grad) for each in self._tensors
        ]


def hooks_everywhere() -> list[Any]:
    """The hooks that others have put on all modules; torch's own count operations."""
    hooks = [hook for table in EVERYWHERE for hook in table.values()]
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("torch.")]


def precision(model: nn.Module) -> torch.dtype:
    """What the model computes in: its weights' type, or autocast's."""
    weight = next(model.parameters(), None)
    device, dtype = ("cpu", torch.float32) if weight is None else (weight.device.type, weight.dtype)
    if device == "meta":
        return dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


def modules_of(model: nn.Module) -> list[nn.Module]:
    """What ``model.modules()`` gives, in another order and a quarter of the time."""
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def _is_split(model: nn.Module) -> bool:
    return isinstance(model, nn.DataParallel) or any(hasattr(weight, "device_mesh") for weight in model.parameters())


def _rotary_settings(settings: object) -> Iterator[Mapping[str, Any]]:
    """Settings of rotary embeddings: the model's or, within them, those of each kind of layer."""
    if isinstance(settings, Mapping):
        if isinstance(settings.get("rope_type"), str):
            yield settings
        for each in settings.values():
            yield from _rotary_settings(each)


def _hooks_of_others(module: nn.Module) -> bool:
    hooks = (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    )
    # transformers leaves hooks behind that collect hidden states when asked for them, and else do nothing.
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)
