"""HookedNetwork: reads and edits activations of any nn.Module, under plain forward hooks.

Tensor letters: B batch, P positions, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from itrain.architectures import blocks, locate
from itrain.devices import HOOK, is_dispatched
from itrain.inputs import ModelInputs, with_decoder
from itrain.inputs.layout import MASK, SECOND
from itrain.layouts import REMEDY
from itrain.networks.answer import Answers, answer_only, answers, each_answer
from itrain.networks.attached import AttachedEdits
from itrain.networks.base import ROWS, Network
from itrain.networks.forward import Forward
from itrain.networks.frozen import keep_trained_weights_alone
from itrain.networks.generation import generate
from itrain.networks.lane import EditAt, Edits, Lane
from itrain.networks.planned import AllRead, Planned, Route, install, outputs_of, recompute, recompute_alike
from itrain.shards import tied
from itrain.sites import Site

if TYPE_CHECKING:
    from typing_extensions import Self


class HookedNetwork(Network):
    """The base model with the verbs ``read``, ``edit`` and ``generate``, on plain forward hooks.

    Args:
        model: any module; transformers' models of the table in :mod:`itrain.architectures` have named components.
        trainable: False freezes the model and puts it in eval mode, and keeps its buffers out of checkpoints. True
            leaves it as it is, for training the model itself.
        gradient_checkpointing: keep the blocks' inputs alone for the backward pass, which computes the blocks again.

    Checkpoints hold the parameters that are trained at the time, such as adapters that were added, and no frozen ones.
    The model is otherwise left as it was found: the hooks are removed when the run ends, others' hooks stay.
    """

    def __init__(self, model: nn.Module, *, trainable: bool = False, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        require_module(model)
        self.model, self.trainable, self.gradient_checkpointing = model, trainable, gradient_checkpointing
        self.why: str | None = None
        """Why plain hooks run the model where another network was asked for."""
        if gradient_checkpointing:
            _require_blocks(model)
        self._reshard()  # or what is frozen would be the gathered weights, not the parts
        if not trainable:
            model.requires_grad_(False)
            self.eval()
        self._forward: Forward | None = None
        self._routes: dict[Site, Route] = {}
        # On this wrapper, so that the user's model keeps a state dict of its own.
        keep_trained_weights_alone(self)

    def read(
        self, inputs: ModelInputs, sites: Iterable[Site], edits: Edits = (), *, stop_early: bool = False
    ) -> dict[Site, Float[Tensor, "batch *places features"]]:
        """The activations at the sites, (B, P, D) where a site has a position or the texts are ragged; at least fp32.

        Positions that an example lacks repeat its first one. ``stop_early`` ends the run as soon as all is found: for
        modules that are known to be called once, since further calls would go unnoticed. Edits that come later are then
        not made.

        Raises:
            RuntimeError: a site of a trainable model runs without gradients although they are enabled.
        """
        if self.call.start is not None:
            inputs = self._decoded(inputs, self.call.start)
        if self.call.right and not inputs.all_own:
            inputs = self._padded_right(inputs, reads=True)
        lane = Lane(inputs=inputs, rows=inputs.batch_size)
        learns = torch.is_grad_enabled() and (
            bool(edits) or any(parameter.requires_grad for parameter in self.model.parameters())
        )
        home = self.call.home
        reads = [
            Planned(lane=lane, site=site, route=self._route(site), with_gradient=learns, home=home)
            for site in dict.fromkeys(sites)
        ]
        if stop_early:
            for each in reads:
                each.until = reads
        # First, so that a site that is edited and read is read as edited.
        edited = [
            Planned(lane=lane, site=part.site, route=self._route(part.site), edit=part.edit, acts=part.acts, home=home)
            for each in edits
            for part in (each if isinstance(each, EditAt) else EditAt(*each)).parts
        ]
        sharded = learns and hasattr(self.model, "reshard")
        parts = {each: each.route.gathered_in for each in reads} if sharded else {}
        ends: dict[nn.Module, Tensor] = {}
        with suppress(AllRead), ExitStack() as stack:
            if parts:
                outputs_of(dict.fromkeys(part for part in parts.values() if part is not None), ends, stack)
            self.run(inputs.arguments, [*edited, *reads], answers([lane]))
        for each, part in parts.items():
            if part is not None and each.read is not None:
                # A part is gathered for the backward pass when a gradient reaches its output.
                each.read = tied(each.read, ends[part])
        return {each.site: each.read for each in reads if each.read is not None}

    def edit_each(self, inputs: ModelInputs, members: Sequence[Edits], *, rows: int = ROWS) -> list[Tensor]:
        if self.call.start is not None:
            inputs = self._decoded(inputs, self.call.start)
        if self.call.right and not inputs.all_own:
            inputs = self._padded_right(inputs)
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
            found += self.run_edits(arguments, lanes, answers(lanes))
        return found

    def run_edits(self, arguments: Mapping[str, Any], lanes: Sequence[Lane], at: Answers | None) -> list[Tensor]:
        """The answer of each lane under its edits, from one run of the model's forward with these arguments."""
        home = self.call.home
        planned = [
            Planned(lane=lane, site=part.site, route=self._route(part.site), edit=part.edit, acts=part.acts, home=home)
            for lane in lanes
            for each in (each if isinstance(each, EditAt) else EditAt(*each) for each in lane.edits)
            for part in (each.parts if each.generated else (each,))
        ]
        return each_answer(self.run(arguments, planned, at, lanes[0].inputs.candidates), lanes)

    @torch.no_grad()
    def generate(
        self,
        inputs: ModelInputs,
        edits: Edits,
        *,
        max_new_tokens: int,
        end: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
        **settings: Any,
    ) -> Int[Tensor, "rows new"]:
        prompts = inputs.prompts()
        if self.call.limit is not None and prompts.length > self.call.limit:
            raise self.call.too_long(prompts.arguments["input_ids"])
        if self.call.right and prompts.padding[0] and self.in_step:
            name = type(self.call.model).__name__
            raise ValueError(
                f"{name}: prompts of different lengths are continued in runs of each length, of which processes with "
                "parts of the model would make different numbers; take prompts of equal length, or trainer=ddp"
            )
        if self.call.right and prompts.padding[0]:
            return self._generate_by_length(
                prompts, edits, max_new_tokens=max_new_tokens, end=end, generators=generators, **settings
            )
        if self.training and not self.trainable:
            self.eval()
        run = partial(
            generate,
            self.call.model,
            prompts,
            max_new_tokens=max_new_tokens,
            end=end,
            generators=generators,
            settings={**settings, "synced_gpus": True} if self.in_step else settings,
        )
        return self.generated(prompts, edits, run)

    def generated(self, prompts: ModelInputs, edits: Edits, run: Callable[[], Tensor]) -> Tensor:
        """What a generation after the prompts gives while the edits act."""
        with AttachedEdits(self.model, edits, prompts=prompts):
            made = run()
        self._reshard()
        return made

    def hidden_size(self, site: Site, example: ModelInputs | None = None) -> int:
        location = locate(self.model, site)
        if location.hidden_size is not None:
            return location.hidden_size
        if example is None:
            module = type(location.module).__name__
            raise ValueError(
                f"site '{site}': {module} does not tell its size; pass an example input, or, to a "
                "training, hidden_sizes=itrain.count_features(network, sites, data.example())"
            )
        with torch.no_grad():
            shape = self.read(example, [site])[site].shape
        if not 2 <= len(shape) <= 3:
            raise ValueError(
                f"site '{site}': the activation there has shape {tuple(shape)}, in which features cannot be told from "
                f"places; {REMEDY}"
            )
        return shape[-1]

    def prepare(
        self,
        groups: Sequence[Sequence[Site]],
        bases: Sequence[ModelInputs],
        sources: Sequence[ModelInputs] = (),
        *,
        uses: int | None = None,
        read: Sequence[Site] | None = None,
    ) -> str:
        return f"the whole model, under plain hooks{f' ({self.why})' if self.why else ''}{self.recomputed}"

    @property
    def recomputed(self) -> str:
        """The end of the line that says how the model will be run."""
        return "; blocks are computed again in the backward pass" if self.gradient_checkpointing else ""

    def run(
        self,
        arguments: Mapping[str, Any],
        planned: Sequence[Planned],
        at: Answers | None,
        candidates: Int[Tensor, " candidates"] | None = None,
    ) -> Any:
        """The output of one forward in which what is planned happens, with logits at the answers ``at`` alone.

        Raises:
            RuntimeError: the module of a planned site was not called.
            PositionError: a text is longer than the model has positions for.
        """
        if self.training and not self.trainable:
            self.eval()
        forward, ids = self.call, arguments.get("input_ids")
        if forward.limit is not None and ids is not None and ids.shape[1] > forward.limit:
            raise forward.too_long(ids)
        with ExitStack() as stack:
            install(planned, stack)
            if any(block.training for each in planned for block in each.route.inside):
                recompute_alike(planned, stack)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # accelerate takes a module's weights away again when its run has come to an end.
                recompute(blocks(self.model), planned, stack, whole=forward.home is not None)
            if at is not None:
                asked = all(each.edit is not None for each in planned)
                answer_only(forward.model, at, candidates, arguments, stack, asked=asked)
            # A compiled graph was traced without these hooks and would skip them in silence.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            output = self.model(**forward.arguments(arguments))
        if not torch.is_grad_enabled() and hasattr(self.model, "reshard"):
            self._reshard()
        for each in planned:
            if not each.done:
                raise each.missing()
        return output

    @property
    def call(self) -> Forward:
        """How the model is called, looked up again where another has taken its place."""
        known = self._forward
        # accelerate may have placed the model since, or have let go of it.
        if known is None or known.wrapped is not self.model or hasattr(known.model, HOOK) != (known.home is not None):
            self._forward = known = Forward.of(self.model)
        return known

    def _decoded(self, inputs: ModelInputs, start: int) -> ModelInputs:
        """The inputs with a text of the decoder's, which answers: of a prompt alone the token that it starts with."""
        asked = inputs.answer is not None and not any(name in inputs.arguments for name in (*SECOND, "labels"))
        return with_decoder(inputs, start) if asked else inputs

    def _padded_right(self, inputs: ModelInputs, *, reads: bool = False) -> ModelInputs:
        """The inputs with padding on the right alone; ``reads``: where the answer is of no interest.

        Raises:
            ValueError: the model cannot be told of padding, or its whole output is the answer, of which padding on
                another side would move the tokens.
        """
        if not any(inputs.padding):
            return inputs
        name = type(self.call.model).__name__
        if MASK in inputs.arguments and MASK not in self.call.names:
            raise ValueError(
                f"{name}: its forward takes no {MASK}, so it would take padding for text; take texts of equal length"
            )
        if not inputs.padding[0]:
            return inputs
        if inputs.answer is None and not reads:
            raise ValueError(
                f"{name}: models of this type may count padding on the left as tokens; pad the texts on the right "
                "(tokenizer.padding_side='right'), or name the token that answers"
            )
        return inputs.padded_right()

    def _generate_by_length(
        self,
        prompts: ModelInputs,
        edits: Edits,
        *,
        end: int | None,
        generators: Sequence[torch.Generator] | None,
        **settings: Any,
    ) -> Int[Tensor, "rows new"]:
        """The new tokens, from runs of prompts of one length each, which need no padding."""
        lengths = prompts.extent[1] - prompts.extent[0]
        found: dict[int, Tensor] = {}
        for length in lengths.unique():
            rows = (lengths == length).nonzero()[:, 0]
            each = len(generators or ()) // prompts.batch_size
            own = [
                generator for row in rows.tolist() for generator in (generators or ())[row * each : (row + 1) * each]
            ]
            tokens = self.generate(prompts.take(rows), edits, end=end, generators=own or None, **settings)
            found |= zip(rows.tolist(), tokens.split(len(tokens) // len(rows)), strict=True)
        # Rows differ in length only where all of a run have ended.
        return pad_sequence(
            [each for row in range(prompts.batch_size) for each in found[row].unbind()],
            batch_first=True,
            padding_value=0 if end is None else end,
        )

    def _reshard(self) -> None:
        """Put a sharded model's parts in their place again, which FSDP2 leaves gathered for a backward pass."""
        reshard = getattr(self.model, "reshard", None)
        if reshard is not None:
            reshard()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # What accelerate has placed, nobody else may move: weights on the meta device have no values to be moved.
        return self if is_dispatched(self.model) else super()._apply(fn, recurse)

    def _route(self, site: Site) -> Route:
        """The site's place in the model, looked up again where another module has taken it."""
        known = self._routes.get(site)
        if known is not None:
            module: nn.Module | None = self.model
            for name in known.path:
                module = None if module is None else module._modules.get(name)
            columns = known.location.columns
            moved = isinstance(columns, Tensor) and _lies_elsewhere(known.location.module, columns)
            if module is known.location.module and not moved:
                return known
        route = Route.to(site, self.model)
        if route.path:
            self._routes[site] = route
        return route


def require_module(model: object) -> None:
    """Refuse what is no module, of which a network could be made.

    Raises:
        TypeError: naming what it is.
    """
    if not isinstance(model, nn.Module):
        holds = "; give its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise TypeError(f"model: a network is made of a torch.nn.Module, not of {type(model).__name__}{holds}")


def _require_blocks(model: nn.Module) -> None:
    """Refuse to compute again what cannot be told apart.

    Raises:
        ValueError: the model's blocks are not known.
    """
    try:
        blocks(model)
    except ValueError as unknown:
        raise ValueError(f"gradient_checkpointing: {str(unknown).partition('. ')[0]}; leave it out") from unknown


def _lies_elsewhere(module: nn.Module, columns: Tensor) -> bool:
    """Whether the module has been moved since its columns were looked up."""
    device = next(module.parameters()).device
    return device != columns.device and device.type != "meta"
