"""Planned: a read or an edit that waits for the call of its module, and the hooks through which it gets it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from itrain.architectures import Location
from itrain.networks.forward import CHECKPOINT, checkpoint_of
from itrain.networks.lane import Edit, Lane
from itrain.networks.weights import on_weights
from itrain.sites import Site


class AllRead(Exception):
    """All that was to be read is read."""


class Route(NamedTuple):
    """A site's place in a model: its location, the names that lead there, and the modules that it lies in."""

    location: Location
    path: tuple[str, ...]
    inside: tuple[nn.Module, ...]


@dataclass(eq=False, kw_only=True)
class Planned:
    """A read or an edit at a site, for one lane of a run.

    Args:
        lane: whose tokens are meant.
        site: where it acts.
        route: the site's place in the model.
        edit: what takes the activation's place; None: it is read, and ``read`` holds it afterwards.
        with_gradient: refuse to read where gradients are switched off.
        until: the reads after which the run may end; empty: it goes on to its end.
    """

    lane: Lane
    site: Site
    route: Route
    edit: Edit | None = None
    with_gradient: bool = False
    until: Sequence[Planned] = ()
    read: Tensor | None = field(default=None, init=False)
    calls: int = field(default=0, init=False)
    done: bool = field(default=False, init=False)

    def __call__(self, activation: Tensor) -> Tensor:
        """The activation that the module's call goes on with.

        Raises:
            RuntimeError: the module is called several times and the site does not say which call it means, or it runs
                without gradients that the reader wants.
            ValueError: the edit gives another shape than it was given.
        """
        lane, site, location = self.lane, self.site, self.route.location
        call, self.calls = self.calls, self.calls + 1
        if site.step is not None and call != site.step:
            return activation
        if self.done and site.step is None:
            raise RuntimeError(
                f"site '{site}': its module is called several times in a run; name one call, for example '.step0'"
            )
        if self.with_gradient and not torch.is_grad_enabled():
            raise RuntimeError(
                f"site '{site}': its module runs without gradients, as reentrant gradient checkpointing does, so "
                "none would flow through what is read; checkpoint with use_reentrant=False or read under no_grad"
            )
        self.done = True
        given, layout = activation, location.layout
        if layout is not None:
            activation = layout.by_place(activation)
        base, cells = lane.pick(activation, site, location)
        if self.edit is None:
            # Picking tokens copies; a whole activation could share memory with what a later module changes in place.
            self.read = base.clone() if site.position is None else base
            if self.until and all(each.done for each in self.until):
                raise AllRead
            return given
        with torch.autocast(activation.device.type, enabled=False):
            new = self.edit(base)
        if new.shape != base.shape:
            raise ValueError(f"site '{site}': the edit made shape {tuple(new.shape)} of shape {tuple(base.shape)}")
        new = lane.replace(activation, cells, location, new.to(activation.dtype))
        return new if layout is None else layout.back(new, given)

    def again(self) -> Planned:
        """The same for a second run of the module within one step, which does not end early."""
        return Planned(lane=self.lane, site=self.site, route=self.route, edit=self.edit)

    def missing(self) -> RuntimeError:
        """The error of a run in which it was never its turn."""
        calls = f"was called {self.calls} times" if self.calls else "was not called"
        return RuntimeError(f"site '{self.site}': its module {calls} in this run; nothing was read or edited there")


def install(planned: Sequence[Planned], stack: ExitStack) -> None:
    """Hook the modules until the stack is left; what is planned for one activation acts in the order given."""
    groups: dict[tuple[nn.Module, str], list[Planned]] = {}
    for each in planned:
        groups.setdefault(each.route.location[:2], []).append(each)
    for (module, end), group in groups.items():
        if end == "weights":
            stack.enter_context(on_weights(module, group))
            continue
        if end == "output":
            handle = module.register_forward_hook(partial(_on_output, group))
        else:
            handle = module.register_forward_pre_hook(partial(_on_input, group), with_kwargs=True)
        stack.callback(handle.remove)


def recompute_alike(planned: Sequence[Planned], stack: ExitStack) -> None:
    """Have blocks that are recomputed in the backward pass recompute with the same hooks.

    Gradient checkpointing runs a block's forward again after our hooks are gone. Its function is wrapped for this run
    so that the second run puts the hooks of the block and its modules back for its duration.
    """
    for block in dict.fromkeys(block for each in planned for block in each.route.inside):
        checkpoint = checkpoint_of(block)
        if checkpoint is not None:
            inner = [each for each in planned if block in each.route.inside]
            block.__dict__[CHECKPOINT] = partial(_checkpoint, checkpoint, inner)
            stack.callback(setattr, block, CHECKPOINT, checkpoint)


def _on_output(group: Sequence[Planned], module: nn.Module, args: Any, output: Any) -> Any:
    # Several outputs: the first is the activation, under whatever key in transformers' model outputs.
    key: Any = None if isinstance(output, Tensor) else next(iter(output)) if isinstance(output, Mapping) else 0
    activation: Any = output if key is None else output[key]
    new = activation
    for planned in group:
        new = planned(new)
    if new is activation:
        return None
    if isinstance(output, Mapping):
        return type(output)(**{**output, key: new})
    return new if key is None else type(output)((new, *output[1:]))


def _on_input(group: Sequence[Planned], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    key = None if args else next(key for key, value in kwargs.items() if isinstance(value, Tensor))
    activation: Tensor = args[0] if key is None else kwargs[key]
    new = activation
    for planned in group:
        new = planned(new)
    if new is activation:
        return None
    return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})


def _checkpoint(
    checkpoint: Callable[..., Any], group: Sequence[Planned], function: Callable[..., Any], *args: Any
) -> Any:
    runs = 0

    def run(*values: Any) -> Any:
        nonlocal runs
        runs += 1
        with ExitStack() as stack:
            if runs > 1:
                install([planned.again() for planned in group], stack)
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            return function(*values)

    return checkpoint(run, *args)
