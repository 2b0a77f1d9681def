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
from torch import Tensor, nn

from itrain.architectures import blocks, locate
from itrain.inputs import ModelInputs
from itrain.networks.cache import BudgetError, TokenStore
from itrain.networks.hooks import Edit, HookedNetwork
from itrain.networks.resume import Before, Recorder, after, before, flat, only_at, precision, resumed, unflat, watched
from itrain.sites import Site

Level = Literal["stop", "prefix", "recompute", "suffix"]
"""What of an edited run is spared: nothing; the blocks below the edits; the gradient of the tokens before them; these
tokens altogether."""

TOLERANCE = 1e-4
"""How far a level's answer and gradient may be from plain hooks', relative to their norms."""

Run = Callable[[Sequence[tuple[Site, Edit]]], Tensor]


class Earlier:
    """Keys and values of untouched runs, of the tokens before those that are edited, in the blocks from one on.

    Args:
        store: where they are kept, a part for each block.
        first: the lowest of the blocks.
        groups: sites that are edited together. The tokens before the group that begins last serve them all.
    """

    def __init__(self, store: TokenStore, first: int, groups: Sequence[Sequence[Site]]) -> None:
        self.store, self.first, self.groups = store, first, groups
        self._positions = [{site.position for site in group} for group in groups]

    def serves(self, sites: Sequence[Site], below: int) -> bool:
        """Whether edits at the sites, with so many blocks below them, begin no later than one of the groups."""
        positions = {site.position for site in sites}
        return below >= self.first and any(group <= positions for group in self._positions)

    def reach(self, inputs: ModelInputs) -> Int[Tensor, " batch"]:
        """The first token that is not kept, on the CPU."""
        return torch.stack([earliest(inputs, group) for group in self.groups]).amax(0)


class Plan:
    """Edits at some sites of a frozen model, replayed above the blocks that lie ``below`` them.

    Args:
        hooked: runs the model.
        sites: where the edits are.
        below: the number of blocks below the lowest of them.
        level: the most that may be spared.
        reason: why no more.
        hidden: keeps what the highest block below puts out.
        earlier: the keys and values of earlier tokens in the blocks above.
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
        earlier: Earlier,
    ) -> None:
        self.hooked, self.sites, self.below, self.hidden, self.earlier = hooked, sites, below, hidden, earlier
        self.blocks = list(blocks(hooked.model))
        self.mlp = self._last_mlp()
        self.level: Level = level
        self.reason = reason
        if level == "prefix" and not below:
            self.level, self.reason = "stop", f"{reason}, and no block lies below the edits"
        self.agreed: set[tuple[Level, bool]] = set()

    def edit(self, inputs: ModelInputs, edits: Sequence[tuple[Site, Edit]]) -> Tensor:
        """The model's answer, replayed where that is exact; what it takes is kept of the examples before."""
        start = self._start(inputs)
        while (level := self._level(start)) != "stop":
            start = start if level in ("suffix", "recompute") else 0
            kept = self._keep(inputs, start)
            if kept is None:
                continue
            replay = partial(self._replay, inputs, kept, start)
            if self._agrees(level, replay, partial(self.hooked.edit, inputs), edits):
                return replay(edits)
        return self.hooked.edit(inputs, edits)

    def weigh(self, bases: Sequence[ModelInputs], uses: int | None) -> None:
        """Spare nothing where the run that fills what is kept costs more than all uses of the examples spare.

        In units of a forward run of the whole model, a step under hooks costs 1 + a, where a is the share of the blocks
        that lie above the edits and take part in the backward run; a replayed one costs 2 a s, where s is the share of
        the tokens that run; and what is kept costs 1.
        """
        if uses is None or self.level == "stop":
            return
        above = 1 - self.below / len(self.blocks)
        whole = sum(int((each.extent[1] - each.extent[0]).sum()) for each in bases)
        run = whole
        if self.level == "suffix":
            run = sum(int((each.extent[1] - earliest(each, self.sites)).sum()) for each in bases)
        if uses * (1 + above - 2 * above * run / max(whole, 1)) < 1:
            self.level, self.reason = "stop", f"to keep what it takes would cost more than {uses} uses spare"

    def lower(self, level: Level, reason: str) -> None:
        """Spare less than the level from now on, and give back what was kept for it."""
        if level == "suffix":
            self.earlier.store.close()
        if level == "prefix":
            self.hidden.close()
        spared: dict[Level, Level] = {"suffix": "recompute", "recompute": self._under, "prefix": "stop"}
        self.level, self.reason = spared[level], reason
        warnings.warn(f"replay is lowered from '{level}' to '{self.level}': {reason}", stacklevel=2)

    def describe(self) -> str:
        """What runs, and why not less."""
        if self.level == "stop":
            return f"edits run in full ({self.reason})"
        last = len(self.blocks) - 1
        runs = f"only blocks {self.below}-{last} run" if self.below <= last else "only the head runs"
        if self.level == "recompute":
            return f"{runs}, tokens before the first edited one without gradients ({self.reason})"
        return runs + (f" ({self.reason})" if self.reason else ", from the first edited token on")

    def sees_padding(self, inputs: ModelInputs) -> bool:
        """Whether edits or answer take in all tokens, among them padding, of which nothing true is kept."""
        return inputs.answer is None or any(site.position is None for site in self.sites)

    def _start(self, inputs: ModelInputs) -> int:
        """The first token that has to run."""
        # Token types can tie tokens to later ones, as within Gemma 3's images.
        spares = self.level in ("suffix", "recompute")
        if not spares or inputs.facts.answer is None or "token_type_ids" in inputs.arguments:
            return 0
        start = int(torch.minimum(earliest(inputs, self.sites), inputs.facts.answer).min())
        return start if start > int(inputs.extent[0].min()) else 0

    def _level(self, start: int) -> Level:
        return self._under if self.level in ("suffix", "recompute") and not start else self.level

    @property
    def _under(self) -> Level:
        """What can be spared without a suffix."""
        return "prefix" if self.below else "stop"

    def _keep(self, inputs: ModelInputs, start: int) -> list[Int[Tensor, "batch 2"]] | None:
        """The examples' spans in the stores that are needed, after an untouched run of those that are not kept yet.

        None, and a lower level, where there is no room for them.
        """
        keys = inputs.facts.keys
        needed = [self.hidden] * (self.below > 0)
        needed += [self.earlier.store] * (start > 0 and self.level == "suffix" and self.below < len(self.blocks))
        spans = [store.find(keys) for store in needed]
        if any(each is None for each in spans):
            rows = torch.cat([store.missing(keys) for store in needed]).unique()
            if not self._run_untouched(inputs.take(rows)):
                return None
            spans = [store.find(keys) for store in needed]
        return [each for each in spans if each is not None]

    def _last_mlp(self) -> nn.Module | None:
        """The MLP whose output no other token sees and no edit, in which only the answer's token has to run."""
        model, last = self.hooked.model, Site(layer=len(self.blocks) - 1, component="mlp_input")
        inside = set(self.blocks[-1].modules())
        if any(locate(model, site).module in inside for site in self.sites):
            return None
        try:
            return locate(model, last).module
        except ValueError:
            return None

    def _run_untouched(self, inputs: ModelInputs) -> bool:
        """Keep what the examples' untouched run shows; False, and a lower level, where there is no room for it."""
        recorder = Recorder(self.earlier.first)
        arguments = {"past_key_values": recorder, "use_cache": True} if self.level == "suffix" else {}
        with torch.no_grad(), watched(self.blocks[self.below - 1] if self.below else None) as seen:
            self.hooked.edit(inputs, [], arguments=arguments)
        first, end = inputs.extent
        level: Level = "prefix"
        try:
            if self.below:
                self.hidden.layout = seen.outputs
                keep(self.hidden, inputs, first, end, [seen.hidden])
            level = "suffix"
            if recorder.noted:
                rows, shapes = zip(*map(flat, recorder.noted.values()), strict=True)
                self.earlier.store.layout = dict(zip(recorder.noted, shapes, strict=True))
                keep(self.earlier.store, inputs, first, self.earlier.reach(inputs), rows)
        except BudgetError as error:
            self.lower(level, str(error))
            return False
        return True

    def _replay(
        self, inputs: ModelInputs, kept: list[Int[Tensor, "batch 2"]], start: int, edits: Sequence[tuple[Site, Edit]]
    ) -> Tensor:
        place = torch.arange(inputs.length) - inputs.extent[0][:, None]
        with ExitStack() as stack:
            cache = self._before(inputs, kept, place[:, :start]) if start else None
            self._resume(stack, kept, place[:, start:], inputs.device)
            arguments = {}
            if cache is not None:
                arguments = {"past_key_values": cache, "use_cache": True}
                inputs = after(inputs, start, self.hooked.model)
            if self.mlp is not None and inputs.answer is not None and inputs.answer.ndim == 1:
                stack.enter_context(only_at(inputs.answer, self.mlp))
            return self.hooked.edit(inputs, edits, arguments=arguments)

    def _resume(
        self,
        stack: ExitStack,
        kept: list[Int[Tensor, "batch 2"]],
        place: Int[Tensor, "batch tokens"],
        device: torch.device,
    ) -> None:
        """Have the blocks below do nothing but put out what is kept of the tokens at these places."""
        if self.below:
            (hidden,) = self.hidden.gather(kept[0], place, device)
            stack.enter_context(resumed(self.blocks[: self.below], hidden, self.hidden.layout))

    def _before(
        self, inputs: ModelInputs, kept: list[Int[Tensor, "batch 2"]], place: Int[Tensor, "batch earlier"]
    ) -> Before:
        """The keys and values of the tokens at these places: those kept, or from a run of them without gradients."""
        length = place.shape[1]
        if self.below == len(self.blocks):
            return Before(length, {})
        if self.level == "suffix":
            store = self.earlier.store
            shapes = {block: each for block, each in store.layout.items() if block >= self.below}
            rows = store.gather(kept[-1], place, inputs.device, len(store.layout) - len(shapes))
            return Before(length, dict(zip(shapes, map(unflat, rows, shapes.values()), strict=True)))
        recorder = Recorder(self.below)
        with torch.no_grad(), ExitStack() as stack:
            self._resume(stack, kept, place, inputs.device)
            arguments = {"past_key_values": recorder, "use_cache": True}
            self.hooked.edit(before(inputs, length, self.hooked.model), [], arguments=arguments)
        return Before(length, recorder.noted)

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

    ``activations`` are (B, S, ...), each a part of the store.

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
    store.add(inputs.facts.keys[rows], counts, [activation[at].flatten(1) for activation in activations])


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
