"""HookedNetwork: reads and edits activations of any nn.Module. The only user of torch's hooks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from itrain.architectures import Location, locate, unwrap
from itrain.inputs import ModelInputs
from itrain.networks.base import ROWS, Network
from itrain.networks.forward import CHECKPOINT, cache_arguments, cache_of, checkpoint_of, forward_arguments
from itrain.networks.lanes import Edit, Edits, Lane, answers
from itrain.sites import Site

Transform = Callable[[Tensor], Tensor | None]


class HookedNetwork(Network):
    """The base model with the verbs ``read``, ``edit`` and ``generate``, on plain forward hooks.

    Args:
        model: any module; transformers' models of the table in :mod:`itrain.architectures` have named components.
        trainable: False freezes the model and puts it in eval mode, and keeps its buffers out of checkpoints. True
            leaves it as it is, for training the model itself.

    Checkpoints hold the parameters that are trained at the time, such as adapters that were added, and no frozen ones.
    The model is otherwise left as it was found: the hooks are removed when the run ends, others' hooks stay.
    """

    _loaded_prefix: str

    def __init__(self, model: nn.Module, *, trainable: bool = False) -> None:
        super().__init__()
        self.model, self.trainable = model, trainable
        if not trainable:
            model.requires_grad_(False).eval()
        # On this wrapper, so that the user's model keeps a state dict of its own.
        self.register_state_dict_post_hook(_drop_frozen_weights)
        self.register_load_state_dict_pre_hook(_note_prefix)
        self.register_load_state_dict_post_hook(_forgive_frozen_weights)

    def read(
        self, inputs: ModelInputs, sites: Iterable[Site], *, stop_early: bool = False
    ) -> dict[Site, Float[Tensor, "batch *places features"]]:
        """The activations at the sites, (B, P, D) where a site has a position; at least fp32.

        Positions of ragged spans that an example lacks repeat its first one. ``stop_early`` ends the run as soon as all
        is found: for modules that are known to be called once, since further calls would go unnoticed.

        Raises:
            RuntimeError: a site of a trainable model runs without gradients although they are enabled.
        """
        found: dict[Site, Tensor] = {}
        lane = Lane.alone(inputs)
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.model.parameters())

        def take(site: Site, location: Location, activation: Tensor) -> None:
            if trains and not torch.is_grad_enabled():
                raise RuntimeError(
                    f"site '{site}': its module runs without gradients, as reentrant gradient checkpointing does, so "
                    "none would flow through what is read; checkpoint with use_reentrant=False or read under no_grad"
                )
            picked = lane.pick(activation, site, location)
            recomputed = site in found
            # Picking tokens copies; a whole activation could share memory with what a later module changes in place.
            found[site] = picked.clone() if site.position is None else picked
            if stop_early and len(found) == len(wanted) and not recomputed:
                raise _AllFound

        wanted = list(dict.fromkeys(sites))
        with suppress(_AllFound):
            self._run(inputs.arguments, [lane], [(site, partial(partial, take, site)) for site in wanted])
        # In the order asked for, and apart from what blocks that are recomputed in the backward pass find again.
        return {site: found[site] for site in wanted}

    def edit_each(self, inputs: ModelInputs, members: Sequence[Edits], *, rows: int = ROWS) -> list[Tensor]:
        size = inputs.batch_size
        at_once = max(1, rows // size)
        found = []
        for part in (members[place : place + at_once] for place in range(0, len(members), at_once)):
            copies = len(part)
            lanes = [
                Lane(inputs=inputs, edits=edits, first=number * size, rows=copies * size)
                for number, edits in enumerate(part)
            ]
            arguments = inputs.arguments
            if copies > 1:
                arguments = {name: value.repeat(copies, *[1] * (value.ndim - 1)) for name, value in arguments.items()}
            found += self.run(arguments, lanes)
        return found

    def run(self, arguments: Mapping[str, Any], lanes: Sequence[Lane], *, in_eval: bool = False) -> list[Tensor]:
        """The answer of each lane, from one run of the model's forward with these arguments.

        ``in_eval`` says that all of its modules are known to be in eval mode, in which none is recomputed.
        """
        inputs = lanes[0].inputs
        output = self._run(arguments, lanes, [change for lane in lanes for change in _changes(lane)], in_eval=in_eval)
        answer = output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]
        if inputs.answer is None and inputs.candidates is not None:
            answer = answer[..., inputs.candidates]
        elif inputs.answer is not None and inputs.answer.ndim == 1:
            answer = answer[:, 0]
        if len(lanes) > 1 and len(answer) != lanes[0].rows and inputs.answer is None:
            raise ValueError(
                f"the model's output has shape {tuple(answer.shape)} in a run of {lanes[0].rows} examples, so that "
                "members cannot share the run; fit them apart"
            )
        return list(answer.split(inputs.batch_size)) if len(lanes) > 1 else [answer]

    @torch.no_grad()
    def generate(
        self, inputs: ModelInputs, edits: Edits, *, max_new_tokens: int, end: int | None = None
    ) -> Int[Tensor, "batch new"]:
        prompts = inputs.prompts()
        lane = Lane.alone(prompts, edits)
        output = self._run({**prompts.arguments, "use_cache": True}, [lane], _changes(lane))
        model, cache = unwrap(self.model), cache_of(output)
        if cache is None:
            raise ValueError(f"{type(model).__name__} keeps no keys and values to generate text from")
        tokens, mask = [output.logits[:, 0].argmax(-1)], prompts.arguments["attention_mask"]
        stop = -1 if end is None else end
        while len(tokens) < max_new_tokens and not bool((tokens[-1] == stop).all()):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            last = {"input_ids": tokens[-1][:, None], "attention_mask": mask, **cache_arguments(model, cache)}
            arguments = forward_arguments(model, last)
            if "position_ids" in arguments:
                arguments["position_ids"] = arguments["position_ids"][:, -1:]
            output = self.model(**arguments)
            cache = cache_of(output)
            tokens.append(output.logits[:, -1].argmax(-1).masked_fill(tokens[-1] == stop, stop))
        return torch.stack(tokens, 1)

    def hidden_size(self, site: Site, example: ModelInputs | None = None) -> int:
        location = locate(self.model, site)
        if location.hidden_size is not None:
            return location.hidden_size
        if example is None:
            module = type(location.module).__name__
            raise ValueError(f"site '{site}': {module} does not tell its size; pass an example input")
        with torch.no_grad():
            return self.read(example, [site])[site].shape[-1]

    def prepare(
        self,
        groups: Sequence[Sequence[Site]],
        bases: Sequence[ModelInputs],
        sources: Sequence[ModelInputs] = (),
    ) -> str:
        return "plain hooks"

    def _run(
        self,
        arguments: Mapping[str, Any],
        lanes: Sequence[Lane],
        wanted: Sequence[tuple[Site, Callable[[Location], Transform]]],
        *,
        in_eval: bool = False,
    ) -> Any:
        """The output of one forward with a transform at each site; raises for a site whose module was not called."""
        model = unwrap(self.model)
        plans: Plans = defaultdict(list)
        for site, bind in wanted:
            location = locate(self.model, site)
            plans[location.module, location.end].append(_Planned(site, bind(location)))
        with ExitStack() as stack:
            _install(plans, stack)
            if not in_eval:
                _recompute_alike(model, plans, stack)
            if (at := answers(lanes)) is not None:
                head = _answer_head(model)
                stack.callback(head.register_forward_pre_hook(partial(_keep_rows, at)).remove)
                if (candidates := lanes[0].inputs.candidates) is not None:
                    _keep_columns(head, candidates, stack)
            # A compiled graph was traced without these hooks and would skip them in silence.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            output = self.model(**forward_arguments(model, arguments))
        for planned in (planned for group in plans.values() for planned in group):
            planned.require_done()
        return output


class _AllFound(Exception):
    """All that was to be read is read."""


class _Planned:
    """A transform waiting for its call of the module."""

    def __init__(self, site: Site, transform: Transform) -> None:
        self.site, self.transform = site, transform
        self.calls = 0
        self.done = False

    def __call__(self, activation: Tensor) -> Tensor:
        call, self.calls = self.calls, self.calls + 1
        if self.site.step is not None and call != self.site.step:
            return activation
        if self.done and self.site.step is None:
            raise RuntimeError(
                f"site '{self.site}': its module is called several times in a run; name one call, for example '.step0'"
            )
        self.done = True
        new = self.transform(activation)
        return activation if new is None else new

    def again(self) -> _Planned:
        """The same transform for a second run of the module within one step."""
        return _Planned(self.site, self.transform)

    def require_done(self) -> None:
        if not self.done:
            calls = f"was called {self.calls} times" if self.calls else "was not called"
            raise RuntimeError(f"site '{self.site}': its module {calls} in this run; nothing was read or edited there")


Plans = dict[tuple[nn.Module, str], list[_Planned]]


def _install(plans: Plans, stack: ExitStack) -> None:
    for (module, end), group in plans.items():
        if end == "output":
            handle = module.register_forward_hook(partial(_on_output, group))
        else:
            handle = module.register_forward_pre_hook(partial(_on_input, group), with_kwargs=True)
        stack.callback(handle.remove)


def _through(group: list[_Planned], activation: Tensor) -> Tensor:
    for planned in group:
        activation = planned(activation)
    return activation


def _on_output(group: list[_Planned], module: nn.Module, args: Any, output: Any) -> Any:
    # Several outputs: the first is the activation, under whatever key in transformers' model outputs.
    key: Any = None if isinstance(output, Tensor) else next(iter(output)) if isinstance(output, Mapping) else 0
    activation: Any = output if key is None else output[key]
    new = _through(group, activation)
    if new is activation:
        return None
    if isinstance(output, Mapping):
        return type(output)(**{**output, key: new})
    return new if key is None else type(output)((new, *output[1:]))


def _on_input(group: list[_Planned], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    key = None if args else next(key for key, value in kwargs.items() if isinstance(value, Tensor))
    activation: Tensor = args[0] if key is None else kwargs[key]
    new = _through(group, activation)
    if new is activation:
        return None
    return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})


def _recompute_alike(model: nn.Module, plans: Plans, stack: ExitStack) -> None:
    """Have blocks that are recomputed in the backward pass recompute with the same hooks.

    Gradient checkpointing runs a block's forward again after our hooks are gone. Its function is wrapped for this run
    so that the second run puts the hooks of the block and its modules back for its duration.
    """
    for block in modules_of(model):
        checkpoint = checkpoint_of(block)
        if checkpoint is None:
            continue
        own = set(block.modules())
        inner = {key: group for key, group in plans.items() if key[0] in own}
        if inner:
            block.__dict__[CHECKPOINT] = partial(_checkpoint, checkpoint, inner)
            stack.callback(setattr, block, CHECKPOINT, checkpoint)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """What ``model.modules()`` gives, in another order and a quarter of the time, which every run takes."""
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def _checkpoint(checkpoint: Callable[..., Any], inner: Plans, function: Callable[..., Any], *args: Any) -> Any:
    runs = 0

    def run(*values: Any) -> Any:
        nonlocal runs
        runs += 1
        with ExitStack() as stack:
            if runs > 1:
                _install({key: [planned.again() for planned in group] for key, group in inner.items()}, stack)
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            return function(*values)

    return checkpoint(run, *args)


def _changes(lane: Lane) -> list[tuple[Site, Callable[[Location], Transform]]]:
    """The lane's edits as what is done to the modules' activations."""

    def change(site: Site, apply: Edit, location: Location, activation: Tensor) -> Tensor:
        base = lane.pick(activation, site, location)
        with torch.autocast(activation.device.type, enabled=False):
            new = apply(base)
        if new.shape != base.shape:
            raise ValueError(f"site '{site}': the edit made shape {tuple(new.shape)} of shape {tuple(base.shape)}")
        return lane.replace(activation, site, location, new.to(activation.dtype))

    return [(site, partial(partial, change, site, apply)) for site, apply in lane.edits]


def _answer_head(model: Any) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        name = type(model).__name__
        raise ValueError(f"{name} has no language-model head, so it has no logits at answer tokens; load it with one")
    return head


def _keep_rows(at: tuple[Tensor, Tensor], head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Only what the head makes of the answer tokens: the vocabulary is a small model's widest layer."""
    return (args[0][at], *args[1:])


def _keep_columns(head: nn.Module, candidates: Tensor, stack: ExitStack) -> None:
    """Only the candidates' logits: a plain linear head computes no others, of any other kind the rest is cut off."""
    if type(head) is nn.Linear and not head._forward_hooks and "forward" not in head.__dict__:
        head.__dict__["forward"] = partial(_some_logits, head, candidates)
        stack.callback(head.__dict__.pop, "forward")
    else:
        # After the hooks of others and of sites, which see all.
        stack.callback(head.register_forward_hook(lambda head, args, logits: logits[..., candidates]).remove)


def _some_logits(head: nn.Linear, candidates: Tensor, hidden: Tensor) -> Tensor:
    return linear(hidden, head.weight[candidates], None if head.bias is None else head.bias[candidates])


def _drop_frozen_weights(network: HookedNetwork, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in _frozen(network, state, f"{prefix}model."):
        del state[name]


def _note_prefix(network: HookedNetwork, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    network._loaded_prefix = f"{prefix}model."


def _forgive_frozen_weights(network: HookedNetwork, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    frozen = _frozen(network, missing, network._loaded_prefix)
    missing[:] = [name for name in missing if name not in frozen]


def _frozen(network: HookedNetwork, names: Iterable[str], prefix: str) -> set[str]:
    """Those of the state's names that stand for what is not trained: parameters and, of a frozen model, buffers."""
    trained = {
        f"{prefix}{name}": parameter.requires_grad
        for name, parameter in network.model.named_parameters(remove_duplicate=False)
    }
    return {name for name in names if name.startswith(prefix) and not trained.get(name, network.trainable)}
