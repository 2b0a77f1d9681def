"""Calls: what a model's caller gives it, a prompt or generated tokens, told from each call of its forward.

Tensor letters: B batch, S sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, ClassVar, NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from itrain.architectures import layers, unwrap
from itrain.inputs import ModelInputs, TwoTexts
from itrain.inputs.layout import MASK, MEDIA, SECOND, TEXTS
from itrain.networks.forward import CACHE, cache_of, held_by
from itrain.networks.planned import Acting, Route, install, surround

PACKED = ("cu_seq_lens_q", "block_table")
"""Arguments of a forward that holds several texts in one row, as continuous batching has them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompt:
    """What generated tokens follow.

    Args:
        inputs: the prompt of each row of a run.
        examples: how many prompts there are; a prompt's rows, as of its beams, lie one after the other.
        text: whether it is a text, which has tokens.
        known: how many tokens of a row a cache held before edits could act on them.
    """

    inputs: ModelInputs
    examples: int
    text: bool = True
    known: int = 0

    @property
    def width(self) -> int:
        """Tokens of a row, padding included."""
        return self.inputs.length


class Call(NamedTuple):
    """A call of a model's forward: which of the tokens of prompt and generated text it runs."""

    prompt: Prompt
    start: int = 0
    stop: int = 0
    text: Tensor | None = None
    """The tokens that run, (B, S) or as embeddings; None: it is no text."""

    @property
    def runs_prompt(self) -> bool:
        """Whether tokens of the prompt are among those that run."""
        return not self.prompt.text or self.start < self.prompt.width

    @property
    def steps(self) -> range:
        """The generated tokens that run, counted from 0."""
        if not self.prompt.text:
            return range(0)
        return range(max(self.start - self.prompt.width, 0), max(self.stop - self.prompt.width, 0))


class Listener(Protocol):
    """What acts in calls of a model."""

    def generates(self, settings: Mapping[str, Any]) -> None:
        """The model's ``generate`` is called with these settings, which may be refused."""

    def begin(self, call: Call) -> None:
        """Make ready for a call."""

    def end(self, *, whole: bool) -> None:
        """The call has ended; ``whole``: without an error."""


@dataclass(kw_only=True)
class Generation:
    """A call of the model's ``generate`` that is going on.

    Args:
        given: the prompts, (B, S) or as embeddings; None: the model begins with a token of its own.
        mask: what is padding of them.
    """

    given: Tensor | None
    mask: Tensor | None
    prompt: Prompt | None = None
    cache: object | None = None
    stop: int = 0


class Together:
    """All that acts at a place, in the order in which it has joined.

    Args:
        route: the place.
    """

    def __init__(self, route: Route) -> None:
        self.route, self.stack = route, ExitStack()
        self.acting: list[Acting] = []

    def __call__(self, activation: Tensor) -> Tensor:
        for each in self.acting:
            activation = each(activation)
        return activation


class Calls:
    """Tells whoever is attached to a model which tokens each of its calls runs; one for all that are attached to it.

    In ``generate`` the prompt is what it was given, with or without a cache, in one forward or several, and each token
    that follows is a step. Elsewhere a call without earlier tokens is a prompt, and what is run after it with its cache
    are steps.
    """

    _of: ClassVar[WeakKeyDictionary[nn.Module, Calls]] = WeakKeyDictionary()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.listeners: list[Listener] = []
        self._stack = ExitStack()
        self._places: dict[tuple[nn.Module, str], Together] = {}
        self._watched: dict[nn.Module, list[str]] = {}
        self._outermost: nn.Module | None = None
        self._generation: Generation | None = None
        self._prompts: WeakKeyDictionary[Any, Prompt] = WeakKeyDictionary()
        self._counts: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._now: Call | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Calls:
        """The calls of the model, whatever wraps it."""
        inner = unwrap(model)
        if inner not in cls._of:
            cls._of[inner] = cls(inner)
        return cls._of[inner]

    def join(self, listener: Listener, model: nn.Module, acting: Sequence[Acting]) -> None:
        """Tell the listener of each call of the model, which may be wrapped, after those that have joined before.

        What is ``acting`` does so after theirs at the same place, and before the hooks of others.
        """
        if not self.listeners:
            eagerly(self._stack)
            if hasattr(self.model, "generate"):
                self._watch_generate()
        trunk = getattr(self.model, "base_model", self.model)
        for module in dict.fromkeys([*layers(model), trunk]):
            if module not in self._watched:
                of = module if module in (self.model, trunk) else self.model
                self._watched[module] = list(inspect.signature(of.forward).parameters)
                surround(module, self._before, self._after, self._stack)
        self.listeners.append(listener)
        for each in acting:
            place = each.route.location[:2]
            if place not in self._places:
                self._places[place] = Together(each.route)
                install([self._places[place]], self._places[place].stack, first=True)
            self._places[place].acting.append(each)

    def leave(self, listener: Listener, acting: Sequence[Acting]) -> None:
        """Tell the listener of no more calls; the model is left as it was found with the last of them."""
        self.listeners.remove(listener)
        for each in acting:
            there = self._places[each.route.location[:2]]
            there.acting.remove(each)
            if not there.acting:
                self._places.pop(each.route.location[:2]).stack.close()
        if not self.listeners:
            self._stack.close()
            self._watched.clear()

    def _watch_generate(self) -> None:
        own, generate = self.model.__dict__.get("generate"), cast(Callable[..., Any], self.model.generate)

        @wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._require_known(kwargs)
            for listener in self.listeners:
                listener.generates(kwargs)
            given = next((kwargs[name] for name in ("inputs_embeds", "input_ids", "inputs") if name in kwargs), None)
            before, self._outermost = self._generation, None
            self._generation = Generation(given=args[0] if args and given is None else given, mask=kwargs.get(MASK))
            try:
                return generate(*args, **kwargs)
            finally:
                self._generation = before

        self.model.__dict__["generate"] = watched
        self._stack.callback(partial(self._restore, own))

    def _restore(self, own: Callable[..., Any] | None) -> None:
        if own is None:
            del self.model.__dict__["generate"]
        else:
            self.model.__dict__["generate"] = own

    def _require_known(self, settings: Mapping[str, Any]) -> None:
        """Refuse kinds of generation in which tokens cannot be told.

        Raises:
            ValueError: naming the kind.
        """
        name, config = type(self.model).__name__, getattr(self.model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"{name} generates with a decoder of its own, whose tokens cannot be told from the prompt's; call the "
                "model itself instead of generate, or detach first"
            )
        if settings.get("cache_implementation") == "paged":
            raise ValueError(f"{name}.generate(cache_implementation='paged') packs texts into one row; leave it out")

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._outermost not in (None, module):
            return
        self._outermost = module
        given = {**dict(zip(self._watched[module], args, strict=False)), **kwargs}
        self._now = self._call(given)
        for listener in self.listeners:
            listener.begin(self._now)

    def _after(self, module: nn.Module, output: Any) -> None:
        if self._outermost is not module:
            return
        self._outermost, whole = None, output is not None
        if whole and self._now is not None and (cache := cache_of(output)) is not None:
            self._prompts[cache], self._counts[cache] = self._now.prompt, self._now.stop
        for listener in self.listeners:
            listener.end(whole=whole)

    def _call(self, given: Mapping[str, Any]) -> Call:
        """Which tokens a forward with these arguments runs.

        Raises:
            ValueError: that cannot be told.
        """
        if any(given.get(name) is not None for name in PACKED):
            raise ValueError(
                f"{type(self.model).__name__} is run on several texts in one row (continuous batching), in which "
                "prompts and steps cannot be told; use generate"
            )
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim}
        name = next((name for name in ("inputs_embeds", "input_ids") if name in tensors), None)
        if not tensors:
            raise ValueError(
                f"{type(self.model).__name__} is called without a tensor among its arguments, so that the examples of "
                "the call cannot be told; give it tensors with the batch first"
            )
        if name is None or any(each in given for each in SECOND):
            first = {*TEXTS, *MEDIA}.intersection(tensors)
            both = first and any(each in tensors for each in SECOND)
            inputs = TwoTexts(arguments=tensors) if both else ModelInputs(arguments=tensors)
            return Call(Prompt(inputs=inputs, examples=inputs.batch_size, text=False))
        text, cache = tensors[name], next((given[each] for each in CACHE if given.get(each) is not None), None)
        start = 0 if cache is None else self._held(cache)
        stop = start + text.shape[1]
        if self._generation is not None:
            return Call(self._prompt_of_generation(self._generation, text, given, cache, start), start, stop, text)
        if start == 0:
            return Call(Prompt(inputs=_texts(text, given.get(MASK)), examples=len(text)), 0, stop, text)
        prompt = self._prompts.get(cache)
        if prompt is None:
            raise ValueError(
                f"{type(self.model).__name__} is given a cache of {start} tokens that it did not fill itself while "
                "edits were attached, so that the prompt cannot be told; run the prompt inside too"
            )
        return Call(prompt, start, stop, text)

    def _held(self, cache: Any) -> int:
        """How many tokens a cache holds.

        Raises:
            ValueError: it holds a state that no call has filled while edits were attached.
        """
        count = held_by(cache)
        if count is None:
            count = self._counts.get(cache)
        if count is None:
            raise ValueError(
                f"{type(self.model).__name__} is given the state of a text that it did not run itself while edits were "
                "attached, so that the prompt cannot be told; run the prompt inside too"
            )
        return count

    def _prompt_of_generation(
        self, generation: Generation, text: Tensor, given: Mapping[str, Any], cache: object | None, start: int
    ) -> Prompt:
        """The prompt of a ``generate`` that is going on, of which a forward runs ``text``.

        Raises:
            ValueError: the forward runs another text, or how many tokens it has seen cannot be told.
        """
        name, stop = type(self.model).__name__, start + text.shape[1]
        if generation.prompt is None:
            if start and cache in self._prompts:
                raise ValueError(
                    f"{name}.generate is given a cache of {start} tokens that were run as another prompt, where edits "
                    "acted by its positions; give it the whole text without the cache"
                )
            prompt = _prompt(generation, text, given.get(MASK), name)
            generation.prompt, generation.cache = replace(prompt, known=start), cache
        elif cache is not generation.cache:
            raise ValueError(
                f"{name}.generate runs a second text, as guidance_scale and negative_prompt_ids have it, which edits "
                "cannot tell from the first; leave them out"
            )
        elif cache is None and stop <= generation.stop:
            raise ValueError(f"{name} keeps no keys and values by which the tokens that it has seen can be counted")
        generation.stop = stop
        return generation.prompt


class _Eager:
    """How many ask for eager runs, so that the last of them ends what the first began, in whatever order they leave."""

    def __init__(self) -> None:
        self.count, self.stack = 0, ExitStack()

    def leave(self) -> None:
        self.count -= 1
        if not self.count:
            self.stack.close()


_EAGER = _Eager()


def eagerly(stack: ExitStack) -> None:
    """Have compiled modules run eagerly until the stack is left: graphs skip hooks that they were traced without."""
    if not _EAGER.count:
        _EAGER.stack.enter_context(torch.compiler.set_stance("force_eager"))
    _EAGER.count += 1
    stack.callback(_EAGER.leave)


def _prompt(generation: Generation, text: Tensor, mask: Any, name: str) -> Prompt:
    """The prompt from what ``generate`` was given and its first forward is.

    Raises:
        ValueError: the mask does not tell what is padding.
    """
    whole = generation.given
    whole = text if whole is None else whole.to(text.device)
    rows, examples, width = len(text), len(whole), whole.shape[1]
    if rows != examples:
        whole = whole.repeat_interleave(rows // examples, 0)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < width:
        own = generation.mask
        if own is None and mask is not None:
            raise ValueError(f"{name}.generate was given no {MASK}, so that padding cannot be told; add it to the call")
        mask = None if own is None else own.to(text.device).repeat_interleave(rows // examples, 0)
    return Prompt(inputs=_texts(whole, None if mask is None else mask[:, :width]), examples=examples)


def _texts(text: Tensor, mask: Tensor | None) -> ModelInputs:
    """The texts with their layout; without a mask they have no padding.

    Raises:
        ValueError: the mask does not tell padding from text.
    """
    name = "input_ids" if text.ndim == 2 else "inputs_embeds"
    assert name in TEXTS
    arguments = {name: text} if mask is None else {name: text, MASK: mask}
    whole = torch.tensor([[0, text.shape[1]]]).expand(len(text), 2) if mask is None else None
    return ModelInputs(arguments=arguments, tokens=whole)
