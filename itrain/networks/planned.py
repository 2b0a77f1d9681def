"""Planned: a read or an edit that waits for the call of its module, and the hooks through which it gets it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from itrain.architectures import Location, locate
from itrain.inputs import Acts
from itrain.networks.forward import CHECKPOINT, checkpoint_of
from itrain.networks.lane import Edit, Lane, Steps
from itrain.networks.weights import on_the_way
from itrain.sites import Site


class AllRead(Exception):
    """All that was to be read is read."""


class Route(NamedTuple):
    """A site's place in a model: its location, the names that lead there, and the modules that it lies in."""

    location: Location
    path: tuple[str, ...]
    inside: tuple[nn.Module, ...]

    @property
    def gathered_in(self) -> nn.Module | None:
        """The part of a sharded model that is gathered for its own run, where the place lies within it."""
        *_, part = (None, *(each for each in self.inside[1:] if hasattr(each, "reshard")))
        return None if part is self.location.module and self.location.end == "output" else part

    @classmethod
    def to(cls, site: Site, model: nn.Module) -> Route:
        """The site's place in the model as it is now; without names where the model does not hold the module.

        Raises:
            ValueError: the model does not have the site.
        """
        with torch.inference_mode(False):  # columns serve steps with gradients too
            location = locate(model, site)
        path = next((name for name, each in model.named_modules() if each is location.module), None)
        inside = tuple(each for each in model.modules() if location.module in set(each.modules()))
        return cls(location, tuple(path.split(".")) if path else (), inside)


class Acting(Protocol):
    """What acts on the activation at a place."""

    route: Route

    def __call__(self, activation: Tensor) -> Tensor:
        """The activation that the module's call goes on with."""
        ...


@dataclass(eq=False, kw_only=True)
class Planned:
    """A read or an edit at a site, for one lane of a run.

    Args:
        lane: whose tokens are meant.
        site: where it acts.
        route: the site's place in the model.
        edit: what takes the activation's place; None: it is read, and ``read`` holds it afterwards.
        acts: on which tokens.
        with_gradient: refuse to read where gradients are switched off.
        until: the reads after which the run may end; empty: it goes on to its end.
        home: where the lane's tokens and the edit are, of a model whose modules lie on several devices; None: where the
            activation is.
        repeats: whether the module is run again in the backward pass, with what is planned for it.
    """

    lane: Lane | Steps
    site: Site
    route: Route
    edit: Edit | None = None
    acts: Acts = "prompt"
    with_gradient: bool = False
    until: Sequence[Planned] = ()
    home: torch.device | None = None
    repeats: bool = False
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
            raise self.repeated()
        if self.with_gradient and not torch.is_grad_enabled():
            raise RuntimeError(
                f"site '{site}': its module runs without gradients, as reentrant gradient checkpointing does, so "
                "none would flow through what is read; checkpoint with use_reentrant=False or read under no_grad"
            )
        self.done = True
        arrived = activation
        if self.home is not None:
            activation, location = activation.to(self.home), _moved(location, self.home)
        given, layout = activation, location.layout
        if layout is not None:
            activation = layout.by_place(activation, lane.rows)
        base, cells = lane.pick(activation, site, location, self.acts)
        if self.edit is None:
            # Picking tokens copies; a whole activation could share memory with what a later module changes in place.
            self.read = base.clone() if site.position is None else base
            if self.until and all(each.done for each in self.until):
                raise AllRead
            return arrived
        if not base.shape[1:].numel():
            return arrived  # no example has such a token
        # What the edit saves is kept as ever: it may save other tensors when it runs again, as where a parametrisation
        # was cached, and checkpoints tell saved tensors apart by their order.
        saving = saved_tensors_hooks(_same, _same) if self.repeats else nullcontext()
        with torch.autocast(activation.device.type, enabled=False), saving:
            new = self.edit(base)
        if new is None:
            raise ValueError(f"site '{site}': the edit returns nothing; return the new activation")
        if new.shape != base.shape:
            raise ValueError(f"site '{site}': the edit made shape {tuple(new.shape)} of shape {tuple(base.shape)}")
        new = lane.replace(activation, cells, location, new.to(activation.dtype))
        new = new if layout is None else layout.back(new, given)
        return new.to(arrived.device)

    def again(self) -> Planned:
        """The same for a second run of the module within one step, which does not end early."""
        return replace(self, with_gradient=False, until=())

    def repeated(self) -> RuntimeError:
        """The error of a run in which it could be the turn of several calls."""
        return RuntimeError(
            f"site '{self.site}': its module is called several times in a run; name one call, for example '.step0'"
        )

    def missing(self) -> RuntimeError:
        """The error of a run in which it was never its turn."""
        calls = f"was called {self.calls} times" if self.calls else "was not called"
        return RuntimeError(f"site '{self.site}': its module {calls} in this run; nothing was read or edited there")


def _moved(location: Location, device: torch.device) -> Location:
    """The location with columns that index an activation on the device."""
    columns = location.columns
    return location._replace(columns=columns.to(device)) if isinstance(columns, Tensor) else location


def install(acting: Sequence[Acting], stack: ExitStack, *, first: bool = False) -> None:
    """Hook the modules until the stack is left; what acts on one activation does so in the order given.

    ``first``: before the hooks of others, which then see what becomes of the activation.
    """
    groups: dict[tuple[nn.Module, str], list[Acting]] = {}
    for each in acting:
        groups.setdefault(each.route.location[:2], []).append(each)
    for (module, end), group in groups.items():
        if end in ("weights", "logits"):
            stack.enter_context(on_the_way(module, end, group))
            continue
        if end == "output":
            handle = module.register_forward_hook(partial(on_output, group), prepend=first)
        else:
            handle = module.register_forward_pre_hook(partial(on_input, group), prepend=first, with_kwargs=True)
        stack.callback(handle.remove)


def add_to_output(module: nn.Module, added: Callable[[Tensor], Tensor], stack: ExitStack) -> None:
    """Add to a module's output what a function makes of its input, until the stack is left."""

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + added(args[0])

    handle = module.register_forward_hook(add, prepend=True)
    stack.callback(handle.remove)


def outputs_of(modules: Iterable[nn.Module], found: dict[nn.Module, Tensor], stack: ExitStack) -> None:
    """Put the outputs of modules into ``found`` as they are called, until the stack is left."""

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found[module] = output if isinstance(output, Tensor) else next(iter(output))

    for module in modules:
        stack.callback(module.register_forward_hook(keep).remove)


def surround(
    module: nn.Module,
    before: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
    after: Callable[[nn.Module, Any], None],
    stack: ExitStack,
) -> None:
    """Have a function called before each call of the module, and one after it, with None where the call has failed."""
    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    handle = module.register_forward_hook(lambda module, args, output: after(module, output), always_call=True)
    stack.callback(handle.remove)


def recompute_alike(
    planned: Sequence[Planned],
    stack: ExitStack,
    put_back: Callable[[Sequence[Planned], ExitStack], None] = install,
) -> None:
    """Have blocks that are recomputed in the backward pass recompute with the same hooks.

    Gradient checkpointing runs a block's forward again after our hooks are gone. Its function is wrapped for this run
    so that the second run puts the hooks of the block and its modules back for its duration.
    """
    for block in dict.fromkeys(block for each in planned for block in each.route.inside):
        own = checkpoint_of(block)
        if own is not None:
            inner = [each for each in planned if block in each.route.inside]
            for each in inner:
                each.repeats = True
            block.__dict__[CHECKPOINT] = partial(_checkpoint, own, inner, put_back)
            stack.callback(setattr, block, CHECKPOINT, own)


def recompute(blocks: Iterable[nn.Module], planned: Sequence[Planned], stack: ExitStack, *, whole: bool) -> None:
    """Have blocks keep their inputs alone for the backward pass, which runs them again with the same hooks inside.

    Unlike transformers' own checkpoints these serve frozen models too, in eval mode.

    Args:
        blocks: of the model.
        planned: what acts in the run.
        stack: after which the blocks are as they were.
        whole: run a block again to its end, also after all that the backward pass needs is there.
    """
    for block in blocks:
        if checkpoint_of(block) is not None:
            continue
        inside = set(block.modules()) - {block}
        inner = [each for each in planned if each.route.location.module in inside]
        for each in inner:
            each.repeats = True
        own = block.__dict__.get("forward")
        run = partial(_checkpoint, partial(checkpoint, use_reentrant=False), inner, install, block.forward)
        block.__dict__["forward"] = partial(_run_again, run, whole)
        stack.callback(_put_forward, block, own)


def _run_again(run: Callable[..., Any], whole: bool, *args: Any, **kwargs: Any) -> Any:
    with set_checkpoint_early_stop(not whole):
        return run(*args, **kwargs)


def _put_forward(block: nn.Module, own: Callable[..., Any] | None) -> None:
    if own is None:
        del block.__dict__["forward"]
    else:
        block.__dict__["forward"] = own


def _same(saved: Tensor) -> Tensor:
    return saved


def on_output(group: Sequence[Callable[[Tensor], Tensor]], module: nn.Module, args: Any, output: Any) -> Any:
    """The module's output after all that acts on it; None where nothing has changed it."""
    # Several outputs: the first is the activation, under whatever key in transformers' model outputs.
    key: Any = None if isinstance(output, Tensor) else next(iter(output)) if isinstance(output, Mapping) else 0
    activation: Any = output if key is None else output[key]
    new = activation
    for acting in group:
        new = acting(new)
    if new is activation:
        return None
    if isinstance(output, Mapping):
        return type(output)(**{**output, key: new})
    return new if key is None else type(output)((new, *output[1:]))


def on_input(
    group: Sequence[Callable[[Tensor], Tensor]], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The module's arguments after all that acts on the first tensor of them; None where nothing has changed it."""
    key = None if args else next(key for key, value in kwargs.items() if isinstance(value, Tensor))
    activation: Tensor = args[0] if key is None else kwargs[key]
    new = activation
    for acting in group:
        new = acting(new)
    if new is activation:
        return None
    return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})


def _checkpoint(
    again: Callable[..., Any],
    group: Sequence[Planned],
    put_back: Callable[[Sequence[Planned], ExitStack], None],
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    runs = 0

    def run(*values: Any, **named: Any) -> Any:
        nonlocal runs
        runs += 1
        with ExitStack() as stack:
            if runs > 1:
                put_back([planned.again() for planned in group], stack)
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            return function(*values, **named)

    return again(run, *args, **kwargs)
