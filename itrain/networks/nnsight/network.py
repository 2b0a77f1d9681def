"""NNsightNetwork: a base model under nnsight's traces, equal to plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from itrain.inputs import ModelInputs
from itrain.networks.answer import READ, Answers, answer_only, keep_rows
from itrain.networks.attached import AttachedEdits, Standing
from itrain.networks.calls import Calls
from itrain.networks.forward import checkpoint_of
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import Edits
from itrain.networks.nnsight.library import load_nnsight
from itrain.networks.nnsight.traces import Place, Tree, trace
from itrain.networks.planned import Planned
from itrain.sites import Site


class NNsightNetwork(HookedNetwork):
    """The base model with the verbs of a network, each run as one trace of nnsight in this process.

    Reads and edits are those of :class:`~itrain.networks.hooks.HookedNetwork`, and so are gradients. nnsight serves a
    module's activations inside of the hooks that others have registered there: what those change is not read. It has
    no attention weights that could be edited, and no trace of what gradient checkpointing recomputes.

    Args:
        model: any module.
        trainable: whether the model itself is trained.

    Raises:
        LibraryError: nnsight is not installed.
    """

    def __init__(self, model: nn.Module, *, trainable: bool = False) -> None:
        load_nnsight()
        super().__init__(model, trainable=trainable)
        self._tree: Tree | None = None

    def prepare(
        self,
        groups: Sequence[Sequence[Site]],
        bases: Sequence[ModelInputs],
        sources: Sequence[ModelInputs] = (),
        *,
        uses: int | None = None,
        read: Sequence[Site] | None = None,
    ) -> str:
        return "the whole model, in traces of nnsight"

    def run(
        self,
        arguments: Mapping[str, Any],
        planned: Sequence[Planned],
        at: Answers | None,
        candidates: Int[Tensor, " candidates"] | None = None,
    ) -> Any:
        if self.training and not self.trainable:
            self.eval()
        places = self.places(planned)
        if at is not None:
            places += self._answering(at, candidates, arguments, asked=all(each.edit is not None for each in planned))
        forward = partial(self.model, **self.call.arguments(arguments))
        # A compiled graph would skip nnsight's wrappers in silence.
        with torch.compiler.set_stance("force_eager"):
            return trace(self.tree, forward, places)

    def generated(self, prompts: ModelInputs, edits: Edits, run: Callable[[], Tensor]) -> Tensor:
        with TracedEdits(self.model, edits, prompts=prompts) as acting:
            places = [self.place(*standing.route.location[:2], each=True) for standing in acting.standing]
            for place, standing in zip(places, acting.standing, strict=True):
                place.acting.append(standing)
            return trace(self.tree, run, places)

    @property
    def tree(self) -> Tree:
        """nnsight's view of the model, made anew where modules have changed."""
        if self._tree is None or self._tree.model is not self.model or not self._tree.current:
            self._tree = Tree(self.model)
        return self._tree

    def place(self, module: nn.Module, end: str, **which: Any) -> Place:
        """One end of a module of the model.

        Raises:
            ValueError: nnsight serves nothing there.
        """
        if end == "weights":
            raise ValueError(
                f"{type(module).__name__}: attention weights are not to be had through nnsight; use network=replay"
            )
        return Place(envoy=self.tree.envoy(module), module=module, end=end, **which)

    def places(self, planned: Sequence[Planned]) -> list[Place]:
        """The places of what is planned, each with all that acts on one activation.

        Raises:
            ValueError: nnsight cannot edit there.
        """
        found: dict[tuple[nn.Module, str, int | None], Place] = {}
        for each in planned:
            module, end, step = *each.route.location[:2], each.site.step
            if any(checkpoint_of(block) is not None for block in each.route.inside):
                raise ValueError(
                    f"site '{each.site}': gradient checkpointing runs its block again after the trace has ended, "
                    "without what was edited; switch it off, or use network=replay"
                )
            if (module, end, step) not in found:
                found[module, end, step] = self.place(module, end, step=step)
            each.calls = step or 0
            found[module, end, step].acting.append(each)
        return list(found.values())

    def _answering(
        self, at: Answers, candidates: Tensor | None, arguments: Mapping[str, Any], *, asked: bool
    ) -> list[Place]:
        """The places at which the head is given the answer tokens alone, and the candidates' logits are taken."""
        model: Any = self.call.model
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is None:
            answer_only(model, at, candidates, arguments, ExitStack(), asked=asked)  # refuses it where it must
            return []
        tokens = next((arguments[name].shape[1] for name in READ if name in arguments), None)
        keep: Callable[[Tensor], Tensor] = lambda hidden: keep_rows(at, tokens, head, (hidden,))[0]  # noqa: E731
        places = [self.place(head, "input")]
        places[0].acting.append(keep)
        if candidates is not None:
            chosen = candidates.clone() if candidates.is_inference() else candidates
            places.append(self.place(head, "output"))
            places[1].acting.append(lambda logits: logits[..., chosen])
        return places


class TracedEdits(AttachedEdits):
    """Edits that act in all calls of a model while a trace serves what stands at their places."""

    def _install(self, stack: ExitStack) -> None:
        calls = Calls.of(self.model)
        calls.join(self, self.model, [])
        stack.callback(calls.leave, self, [])

    @property
    def standing(self) -> list[Standing]:
        """What stands at each place that is edited."""
        return list(self._standing.values())
