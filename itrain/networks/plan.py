"""Plan: what of a run has to be run again when the same sites are edited, and what is kept for the rest.

Tensor letters: B batch, S sequence, D hidden, T tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from itrain.architectures import blocks
from itrain.inputs import ModelInputs
from itrain.networks.cache import BudgetError, TokenStore
from itrain.networks.hooks import Edit, HookedNetwork
from itrain.networks.resume import Before, Recorder, after, precision, resumed, watched
from itrain.sites import Site

Level = Literal["stop", "prefix", "suffix"]
"""What of an edited run is spared: nothing; the blocks below the edits; also the tokens before them."""

TOLERANCE = 1e-4
"""How far a level's answer and gradient may be from plain hooks', relative to their norms."""

Run = Callable[[Sequence[tuple[Site, Edit]]], Tensor]


class Plan:
    """Edits at some sites of a frozen model, replayed above the blocks that lie ``below`` them.

    Args:
        hooked: runs the model.
        sites: where the edits are.
        below: the number of blocks below the lowest of them.
        level: the most that may be spared.
        reason: why no more.
        hidden: keeps what the highest block below puts out.
        before: keeps the keys and values of the tokens before the first edited one, in the blocks above.
    """

    def __init__(
        self,
        hooked: HookedNetwork,
        sites: Sequence[Site],
        *,
        below: int,
        level: Level,
        reason: str,
        hidden: TokenStore,
        before: TokenStore,
    ) -> None:
        self.hooked, self.sites, self.below, self.hidden, self.before = hooked, sites, below, hidden, before
        self.blocks = list(blocks(hooked.model))
        self.level: Level = level
        self.reason = reason
        if level == "prefix" and not below:
            self.level, self.reason = "stop", f"{reason}, and no block lies below the edits"
        self.agreed: set[tuple[Level, bool]] = set()

    def edit(self, inputs: ModelInputs, edits: Sequence[tuple[Site, Edit]]) -> Tensor:
        """The model's answer, replayed where that is exact and all examples are kept; if not, they are from now on."""
        start = self._start(inputs)
        while (level := self._level(start)) != "stop":
            start = start if level == "suffix" else 0
            kept = self._find(inputs.facts.keys, start)
            if kept is None:
                return self._edit_and_keep(inputs, edits)
            replay = partial(self._replay, inputs, kept, start)
            if self._agrees(level, replay, partial(self.hooked.edit, inputs), edits):
                return replay(edits)
        return self.hooked.edit(inputs, edits)

    def lower(self, level: Level, reason: str) -> None:
        """Spare less than the level from now on, and give back what was kept for it."""
        (self.before if level == "suffix" else self.hidden).close()
        self.level, self.reason = self._under if level == "suffix" else "stop", reason
        warnings.warn(f"replay is lowered from '{level}' to '{self.level}': {reason}", stacklevel=2)

    def describe(self) -> str:
        """What runs, and why not less."""
        if self.level == "stop":
            return f"edits run in full ({self.reason})"
        last = len(self.blocks) - 1
        runs = f"blocks {self.below}-{last} run" if self.below <= last else "the head runs"
        return f"only {runs}" + (f" ({self.reason})" if self.reason else ", from the first edited token on")

    def sees_padding(self, inputs: ModelInputs) -> bool:
        """Whether edits or answer take in all tokens, among them padding, of which nothing true is kept."""
        return inputs.answer is None or any(site.position is None for site in self.sites)

    def _start(self, inputs: ModelInputs) -> int:
        """The first token that has to run."""
        # Token types can tie tokens to later ones, as within Gemma 3's images.
        if self.level != "suffix" or inputs.facts.answer is None or "token_type_ids" in inputs.arguments:
            return 0
        start = int(torch.minimum(earliest(inputs, self.sites), inputs.facts.answer).min())
        return start if start > int(inputs.extent[0].min()) else 0

    def _level(self, start: int) -> Level:
        return self._under if self.level == "suffix" and not start else self.level

    @property
    def _under(self) -> Level:
        """What can be spared without a suffix."""
        return "prefix" if self.below else "stop"

    def _find(self, keys: Tensor, start: int) -> list[Tensor] | None:
        """The examples' spans in the stores that are needed; None unless all are there."""
        needed = [self.hidden] * (self.below > 0) + [self.before] * (start > 0 and self.below < len(self.blocks))
        spans = [store.find(keys) for store in needed]
        found = [each for each in spans if each is not None]
        return found if len(found) == len(needed) else None

    def _replay(
        self, inputs: ModelInputs, kept: list[Int[Tensor, "batch 2"]], start: int, edits: Sequence[tuple[Site, Edit]]
    ) -> Tensor:
        place = torch.arange(inputs.length) - inputs.extent[0][:, None]
        with ExitStack() as stack:
            if self.below:
                hidden = self.hidden.gather(kept[0], place[:, start:], inputs.device)
                stack.enter_context(resumed(self.blocks[: self.below], hidden, self.hidden.layout))
            if not start:
                return self.hooked.edit(inputs, edits)
            cache = Before(start)
            if self.below < len(self.blocks):
                cache.hold(self.before.gather(kept[-1], place[:, :start], inputs.device), self.before.layout)
            arguments = {"past_key_values": cache, "use_cache": True}
            return self.hooked.edit(after(inputs, start, self.hooked.model), edits, arguments=arguments)

    def _edit_and_keep(self, inputs: ModelInputs, edits: Sequence[tuple[Site, Edit]]) -> Tensor:
        recorder = Recorder(self.below)
        arguments = {"past_key_values": recorder, "use_cache": True} if self.level == "suffix" else {}
        with watched(self.blocks[self.below - 1] if self.below else None) as seen:
            answer = self.hooked.edit(inputs, edits, arguments=arguments)
        first, end = inputs.extent
        level: Level = "prefix"
        try:
            if self.below:
                self.hidden.layout = seen.outputs
                keep(self.hidden, inputs, first, end, [seen.hidden])
            level = "suffix"
            if recorder.noted:
                self.before.layout = recorder.shapes
                activations = [each for pair in recorder.noted.values() for each in pair]
                keep(self.before, inputs, first, earliest(inputs, self.sites), activations)
        except BudgetError as error:
            self.lower(level, str(error))
        return answer

    def _agrees(self, level: Level, replay: Run, plain: Run, edits: Sequence[tuple[Site, Edit]]) -> bool:
        """Whether the level does what plain hooks do; tried once with and once without gradients."""
        trial = level, torch.is_grad_enabled()
        if trial in self.agreed:
            return True
        expected, values = _probe(plain, edits)
        try:
            found, _ = _probe(replay, edits, values)
            pairs = zip(found, expected, strict=True)
            worst = max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)
            reason = f"answer or gradient is {worst:.1e} from plain hooks'"
        except Exception as error:
            worst, reason = float("inf"), f"it fails with {type(error).__name__}: {error}"
        # A few roundings, where the model's precision is so low that these are more.
        if worst <= max(TOLERANCE, 8 * torch.finfo(precision(self.hooked.model)).eps):
            self.agreed.add(trial)
            return True
        self.lower(level, reason)
        return False


def keep(store: TokenStore, inputs: ModelInputs, start: Tensor, end: Tensor, activations: Sequence[Tensor]) -> None:
    """Keep the tokens from start to end, (B,) each, of the examples that are not kept yet.

    ``activations`` are (B, S, ...), kept side by side.

    Raises:
        BudgetError: there is no room for them.
    """
    rows = store.missing(inputs.facts.keys)
    if not len(rows):
        return
    counts = (end - start)[rows]
    example = rows.repeat_interleave(counts)
    token = torch.arange(len(example)) - (counts.cumsum(0) - counts - start[rows]).repeat_interleave(counts)
    at = example.to(inputs.device), token.to(inputs.device)
    store.add(inputs.facts.keys[rows], counts, torch.cat([activation[at].flatten(1) for activation in activations], 1))


def earliest(inputs: ModelInputs, sites: Sequence[Site]) -> Int[Tensor, " batch"]:
    """The earliest token at any of the sites, on the CPU."""
    return torch.stack([inputs.earliest(site) for site in sites]).amin(0)


def _probe(
    run: Run, edits: Sequence[tuple[Site, Edit]], values: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Answer, the activations that edits are given, and the gradient in what they make of them; and the latter.

    With ``values`` edits are not called again: they may be random.
    """
    made: list[Tensor] = []
    given: list[Tensor] = []

    def probe(apply: Edit, base: Tensor) -> Tensor:
        # With gradients, if they are on: a parametrisation computed without would be cached without for the step.
        new = apply(base) if values is None else values[len(made)]
        made.append(new.detach().clone().requires_grad_(torch.is_grad_enabled()))
        given.append(base.detach())
        return made[-1]

    # The edits' random numbers must be those that they would draw without the trial.
    device = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=device):
        answer = run([(site, partial(probe, apply)) for site, apply in edits]).float()
    results = [answer.detach(), *given]
    if torch.is_grad_enabled():
        gradients = torch.autograd.grad(answer.square().sum(), made, allow_unused=True, materialize_grads=True)
        results += gradients
    return results, [each.detach() for each in made]
