"""Attached: edits that act whenever a model is called, until they are detached.

Tensor letters: B batch, P positions, G generated tokens, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from itrain.architectures import unwrap
from itrain.devices import home_of
from itrain.inputs import ModelInputs, PositionError
from itrain.inputs.layout import moved
from itrain.networks.calls import Call, Calls, Prompt, eagerly
from itrain.networks.lane import EditAt, Edits, Lane, Steps, in_words, require_acts, require_strength, scaled
from itrain.networks.planned import Planned, Route, add_to_output, recompute_alike
from itrain.sites import Site
from itrain.weights import served_by

if TYPE_CHECKING:
    from typing_extensions import Self


Place = tuple[nn.Module, str]
"""A module, and which end of it."""


class Matched(NamedTuple):
    """A site that is edited, and where its source is read: with as many tokens in each prompt as in its source."""

    write: Site
    source: ModelInputs
    read: Site


class Attached(ABC):
    """What changes a model's calls until it is detached: an object, and a context at whose end that happens.

    It acts from the start. Several that are attached to one model act in the order in which they were attached, and are
    detached in any. The model's weights, hooks and attributes are afterwards those that it had.

    Args:
        model: any module, also wrapped.
        strength: how much of the change is applied.

    Raises:
        ValueError: the strength is not finite, or the model runs on a server.
    """

    def __init__(self, model: nn.Module, *, strength: float) -> None:
        if served_by(model) is not None:
            raise ValueError(
                f"{type(model).__name__} runs on a server, so that nothing can be attached to it; use the verbs of its "
                "network, or load the model here"
            )
        self.model, self.strength = model, require_strength(strength)
        self._stack: ExitStack | None = None

    @abstractmethod
    def _install(self, stack: ExitStack) -> None:
        """Have it act until the stack is left."""

    def attach(self) -> Self:
        """Have it act, after what is attached already; nothing changes if it does."""
        if self._stack is None:
            with ExitStack() as stack:
                self._install(stack)
                self._stack = stack.pop_all()
        return self

    def detach(self) -> None:
        """Have it act no more; nothing changes if it does not."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    @property
    def attached(self) -> bool:
        """Whether it acts."""
        return self._stack is not None

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached to" if self.attached else "detached from"
        return f"<{self._what()}, strength {self.strength:g}, {state} {type(self.model).__name__}>"

    @abstractmethod
    def _what(self) -> str:
        """What acts, in words."""


class Standing:
    """What stands at a place for as long as edits are attached, and does what is planned for each call.

    Args:
        route: the place.
    """

    def __init__(self, route: Route) -> None:
        self.route = route
        self.planned: list[Planned] | None = None
        """What acts in the call of the model that is going on; None: there is none."""

    def __call__(self, activation: Tensor) -> Tensor:
        if self.planned is None:
            raise RuntimeError(
                f"{type(self.route.location.module).__name__}, at which an edit is attached, is called by itself, so "
                "that the tokens it runs are not known; call the whole model, or detach first"
            )
        for each in self.planned:
            activation = each(activation)
        return activation


class AttachedEdits(Attached):
    """Edits of a model that act whenever it is called.

    The model is called as ever, by ``model(**inputs)`` or ``model.generate(...)`` with all
    that the latter takes: sampling, beams, its cache, batches, streaming. Positions count a prompt's own tokens, told
    from the attention mask.

    Args:
        model: any module, also wrapped.
        edits: what acts, where and when.
        strength: how much of an edit's effect is applied: base + strength * (edit(base) - base).
        prompts: the prompts of all calls, for positions that name spans; None: positions name tokens by their place.
        matched: the sources whose activations the edits put in; one for all prompts, or one for each of them.

    Raises:
        ValueError: the model does not have a site.
    """

    def __init__(
        self,
        model: nn.Module,
        edits: Edits,
        *,
        strength: float = 1.0,
        prompts: ModelInputs | None = None,
        matched: Sequence[Matched] = (),
    ) -> None:
        super().__init__(model, strength=strength)
        self.prompts, self.matched = prompts, tuple(matched)
        self.edits = tuple(each if isinstance(each, EditAt) else EditAt(*each) for each in edits)
        for each in self.edits:
            require_acts(each.acts)
            if prompts is None and each.acts in ("prompt", "all") and (named := each.site.named):
                raise ValueError(
                    f"site '{each.site}': calls of a model say nothing of '{named}'; attach with prompts=<the texts of "
                    "the calls>, or use first, last or an integer"
                )
        self._home = home_of(model)
        self._routes = {each.site: Route.to(each.site, model) for each in self.edits}
        self._standing = {place: Standing(route) for place, route in self._at_places().items()}
        self._call = ExitStack()
        self._planned: list[Planned] = []
        self._prompt: Prompt | None = None
        self._inputs: ModelInputs | None = None
        self.attach()

    def _install(self, stack: ExitStack) -> None:
        calls, standing = Calls.of(self.model), list(self._standing.values())
        calls.join(self, self.model, standing)
        stack.callback(calls.leave, self, standing)

    def _what(self) -> str:
        acts = {f"{each.site} ({in_words(each.acts)})": None for each in self.edits}
        return ", ".join(acts) or "no edit"

    def generates(self, settings: Mapping[str, Any]) -> None:
        """Nothing is refused: edits act in all that ``generate`` does."""

    def begin(self, call: Call) -> None:
        """Plan what acts in a call of the model."""
        if call.prompt is not self._prompt:
            self._inputs = self._inputs_of(call.prompt)
            self._prompt = call.prompt
        self._planned = [planned for each in self.edits for planned in self._plan(each, call)]
        self._fill(self._planned)
        if any(block.training for each in self._planned for block in each.route.inside):
            recompute_alike(self._planned, self._call, self._put_back)

    def end(self, *, whole: bool) -> None:
        """Forget the call that has ended.

        Raises:
            RuntimeError: a site's module was not called in it.
        """
        self._call.close()
        planned, self._planned = self._planned, []
        for standing in self._standing.values():
            standing.planned = None
        for each in planned if whole else ():
            if not each.done:
                raise each.missing()

    def _plan(self, edit: EditAt, call: Call) -> list[Planned]:
        """What of an edit acts in a call."""
        site, acts, planned = edit.site, edit.acts, []
        route = self._routes[site]
        if acts in ("prompt", "all") and call.runs_prompt and (lane := self._lane(site, call)) is not None:
            # Without a position all of the prompt's tokens are meant, and none that were generated since.
            whole = site if site.position is not None or not call.steps else site.at("all")
            planned.append(
                Planned(lane=lane, site=whole, route=route, edit=scaled(edit.edit, self.strength), home=self._home)
            )
        if acts != "prompt" and call.steps:
            steps = [step for step in call.steps if isinstance(acts, str) or step in acts]
            if steps:
                first = call.prompt.width - call.start
                columns = tuple(first + step for step in steps)
                make = edit.edit if edit.generated is None else partial(_of_steps, edit.generated, steps)
                lane = Steps(columns=columns, count=call.stop - call.start, rows=call.prompt.inputs.batch_size)
                planned.append(
                    Planned(lane=lane, site=site, route=route, edit=scaled(make, self.strength), home=self._home)
                )
        return planned

    def _lane(self, site: Site, call: Call) -> Lane | None:
        """Where the prompt's tokens lie in a call; None where those at the site's position are not run in it.

        Raises:
            PositionError: some of them are run in it, and others not.
        """
        inputs = self._inputs
        assert inputs is not None, "a call has begun"
        rows, width = inputs.batch_size, call.prompt.width
        if not call.prompt.text or (call.start == 0 and call.stop == width):
            return Lane(inputs=inputs, rows=rows)
        if call.start > 0 or call.stop < width:
            index, valid = inputs.indices(site, width)
            inside = (index >= call.start) & (index < call.stop)
            inside = inside if valid is None else inside | ~valid
            if not bool(inside.all()):
                if bool(inside.any()):
                    raise PositionError(
                        f"site '{site}': the prompt is run in several parts, and only some of the tokens there are in "
                        "this one; run it in one (no prefill_chunk_size), or name one token"
                    )
                return None
        return Lane(inputs=inputs, rows=rows, shift=call.start)

    def _inputs_of(self, prompt: Prompt) -> ModelInputs:
        """The prompts of a call's rows, with the spans of those that were given; they and sources must fit.

        Raises:
            ValueError: there are more or fewer of them than prompts, or a position does not exist in one.
        """
        inputs = prompt.inputs
        row = torch.arange(prompt.examples).repeat_interleave(inputs.batch_size // prompt.examples)
        if self.prompts is not None:
            inputs = _with_spans(inputs, self.prompts, row)
        for each in self.edits:
            if prompt.text and each.acts in ("prompt", "all"):
                try:
                    inputs.require(each.site)
                    _require_run(inputs, each.site, prompt)
                except PositionError as error:
                    raise PositionError(f"an edit is attached until detach(): {error}") from error
        for write, source, read in self.matched:
            count = source.batch_size
            if count not in (1, prompt.examples):
                raise ValueError(
                    f"site '{write}': {count} sources are attached and the model is called with {prompt.examples} "
                    "prompts; give one source for all, or one for each prompt"
                )
            if prompt.text:
                inputs.require_same_count(source.take(row if count > 1 else torch.zeros_like(row)), write, read)
        return inputs

    def _at_places(self) -> dict[Place, Route]:
        """The different activations that are edited, in the order of the edits."""
        return {route.location[:2]: route for route in reversed(list(self._routes.values()))}

    def _fill(self, planned: Sequence[Planned]) -> None:
        """Have what is planned act, and nothing else."""
        for standing in self._standing.values():
            standing.planned = []
        for each in planned:
            there = self._standing[each.route.location[:2]]
            there.planned = [*(there.planned or ()), each]

    def _put_back(self, planned: Sequence[Planned], stack: ExitStack) -> None:
        """Have what is planned act until the stack is left, where a block is run again in the backward pass."""
        for standing in self._standing.values():
            stack.callback(setattr, standing, "planned", standing.planned)
        self._fill(planned)


class AttachedMaps(Attached):
    """Low-rank maps added to linear modules of a model: W x + strength * scale * B A x, at every token.

    Args:
        model: any module, also wrapped.
        maps: A and B of the modules, by path, in fp32.
        scale: of all of them.
        strength: how much of them is applied.
    """

    def __init__(
        self, model: nn.Module, maps: Mapping[str, tuple[nn.Module, nn.Module]], *, scale: float, strength: float = 1.0
    ) -> None:
        super().__init__(model, strength=strength)
        self.maps, self.scale = dict(maps), scale
        self.attach()

    def _install(self, stack: ExitStack) -> None:
        inner = unwrap(self.model)
        eagerly(stack)
        for path, maps in self.maps.items():
            add_to_output(inner.get_submodule(path), partial(self._added, *maps), stack)

    def _added(self, down: nn.Module, up: nn.Module, given: Tensor) -> Tensor:
        return (self.strength * self.scale * up(down(given.float()))).to(given.dtype)

    def _what(self) -> str:
        return f"low-rank maps of {len(self.maps)} modules"


def _of_steps(generated: Callable[[Tensor, Sequence[int]], Tensor], steps: Sequence[int], base: Tensor) -> Tensor:
    return generated(base, steps)


def _with_spans(inputs: ModelInputs, given: ModelInputs, row: Tensor) -> ModelInputs:
    """The inputs with the spans and characters of the same texts, whatever their padding.

    Raises:
        ValueError: they are other texts.
    """
    count = int(row.max()) + 1
    if given.batch_size != count:
        raise ValueError(
            f"prompts: {given.batch_size} are attached and the model is called with {count}; attach those of the call"
        )
    if given.tokens is None or inputs.tokens is None:
        return inputs
    ours, theirs = inputs.tokens, given.tokens[row]
    texts = [each.arguments.get("input_ids") for each in (inputs, given)]
    for number, example in enumerate(row.tolist() if all(each is not None for each in texts) else ()):
        one, other = (
            text[place, slice(*tokens[number].tolist())].cpu()
            for text, place, tokens in zip(texts, (number, example), (ours, theirs), strict=True)
            if text is not None
        )
        if not torch.equal(one, other):
            raise ValueError(
                f"the model is called with another prompt than the attached {given.name(example)}; attach those of the "
                "call: prompts=..."
            )
    shift, characters = ours[:, 0] - theirs[:, 0], given.characters
    return replace(
        inputs,
        spans={name: span[row] + shift[:, None] for name, span in given.spans.items()},
        texts=None if given.texts is None else [given.texts[each] for each in row.tolist()],
        characters=None if characters is None else moved({"": characters[row]}, shift, inputs.length)[""],
    )


def _require_run(inputs: ModelInputs, site: Site, prompt: Prompt) -> None:
    """Refuse tokens of a prompt that a cache holds already, so that no edit can act on them.

    Raises:
        PositionError: naming the site.
    """
    if not prompt.known:
        return
    index, valid = inputs.indices(site, prompt.width)
    early = index < prompt.known
    if bool((early if valid is None else early & valid).any()):
        raise PositionError(
            f"site '{site}': the cache holds the first {prompt.known} tokens of the prompt already, and some of them "
            "are to be edited; run the whole prompt without the cache, or name a later token"
        )
