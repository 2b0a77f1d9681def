"""Plan: what of a run has to be run again when the same sites are edited, and what is kept for the rest.

Tensor letters: B batch, S sequence, D hidden, T tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from itrain.architectures import blocks, locate, unwrap
from itrain.inputs import ModelInputs
from itrain.networks.cache import BudgetError, TokenStore
from itrain.networks.compiled import CompileError, compiled, unedited
from itrain.networks.forward import cache_arguments
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lanes import Edits, Lane, answers
from itrain.networks.resume import Before, Recorder, flat, only_at, resumed, unflat, watched
from itrain.networks.rows import Rows, arranged, lie_beside, text_arguments
from itrain.networks.trial import Difference, Run, difference, failure
from itrain.sites import Site

Level = Literal["stop", "prefix", "recompute", "suffix"]
"""What of an edited run is spared: nothing; the blocks below the edits; the gradient of the tokens before them; these
tokens altogether."""


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
        sites: where the edits of all members are.
        below: the number of blocks below the lowest of them.
        level: the most that may be spared.
        reason: why no more.
        hidden: keeps what the highest block below puts out.
        earlier: the keys and values of earlier tokens in the blocks above.
        strict: refuse to lower the level where it does something else than plain hooks.
        compile: have the blocks above run compiled that no edit acts within.
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
        strict: bool = False,
        compile: bool = False,
    ) -> None:
        self.hooked, self.sites, self.below, self.hidden, self.earlier = hooked, sites, below, hidden, earlier
        self.strict = strict
        self.model, self.blocks = unwrap(hooked.model), list(blocks(hooked.model))
        self.mlp = self._last_mlp()
        self.compiled = unedited(self.blocks, hooked.model, sites, below) if compile else {}
        self.level: Level = level
        self.reason = reason
        if level == "prefix" and not below:
            self.level, self.reason = "stop", f"{reason}, and no block lies below the edits"
        self.beside = True
        """Whether members may lie side by side in a row."""
        self.agreed: set[tuple[Level, bool, bool]] = set()
        """The levels that did what plain hooks do, with members side by side or not, with gradients or not."""

    def edit_each(self, inputs: ModelInputs, members: Sequence[Edits], *, rows: int) -> list[Tensor]:
        """Each member's answer, replayed where that is exact; what it takes is kept of the examples before."""
        while True:
            starts = [self._start(inputs, [site for site, _ in edits]) for edits in members]
            level = self.level if any(starts) else self._without_suffix
            if level == "stop":
                return self.hooked.edit_each(inputs, members, rows=rows)
            kept = self._keep(inputs, suffix=any(starts))
            if kept is None:
                continue
            beside = self.beside and len(set(starts)) > 1 and lie_beside(self.hooked.model, inputs)
            lengths = tuple(inputs.length - start for start in starts)
            runs = arranged(lengths, at_once=max(1, rows // inputs.batch_size), beside=beside)
            replay = partial(self._replay, inputs, kept, starts, runs)
            if self._agrees(level, beside, replay, inputs, members):
                return replay(members)

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
        spared: dict[Level, Level] = {"suffix": "recompute", "recompute": self._without_suffix, "prefix": "stop"}
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

    def _start(self, inputs: ModelInputs, sites: Sequence[Site]) -> int:
        """The first token that has to run after edits at the sites."""
        # Token types can tie tokens to later ones, as within Gemma 3's images.
        spares = self.level in ("suffix", "recompute")
        if not spares or inputs.earliest_answer is None or "token_type_ids" in inputs.arguments:
            return 0
        start = int(torch.stack([inputs.earliest_answer, *map(inputs.earliest, sites)]).min())
        return start if start > int(inputs.extent[0].min()) else 0

    @property
    def _without_suffix(self) -> Level:
        """What can be spared where all tokens run."""
        return "prefix" if self.below and self.level != "stop" else "stop"

    def _keep(self, inputs: ModelInputs, *, suffix: bool) -> list[Int[Tensor, "batch 2"]] | None:
        """The examples' spans in the stores that are needed, after an untouched run of those that are not kept yet.

        None, and a lower level, where there is no room for them.
        """
        keys = inputs.keys
        needed = [self.hidden] * (self.below > 0)
        needed += [self.earlier.store] * (suffix and self.level == "suffix" and self.below < len(self.blocks))
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
        """Keep what the examples' untouched run shows; False, and a lower level, where that fails or has no room."""
        recorder, lane = Recorder(self.earlier.first), Lane.alone(inputs)
        first, end = inputs.extent
        level: Level = "prefix"
        try:
            arguments = cache_arguments(self.model, recorder) if self.level == "suffix" else {}
            with torch.no_grad(), watched(self.blocks[self.below - 1] if self.below else None) as seen:
                self.hooked.run({**inputs.arguments, **arguments}, [lane], in_eval=True)
            if self.below:
                self.hidden.layout = seen.outputs
                keep(self.hidden, inputs, first, end, [seen.hidden])
            level = "suffix"
            if arguments and self.earlier.first < len(self.blocks):
                rows, shapes = zip(*map(flat, recorder.of_all(len(self.blocks))), strict=True)
                self.earlier.store.layout = dict(zip(recorder.noted, shapes, strict=True))
                keep(self.earlier.store, inputs, first, self.earlier.reach(inputs), rows)
        except BudgetError as error:
            self.lower(level, str(error))
            return False
        except Exception as error:
            # What the model calls of a cache is no public promise of transformers.
            with torch.no_grad():
                self.hooked.run(inputs.arguments, [lane])  # raises what is the model's own fault
            self._distrust(self.level, failure(error))
            return False
        return True

    def _replay(
        self,
        inputs: ModelInputs,
        kept: list[Int[Tensor, "batch 2"]],
        starts: Sequence[int],
        runs: Sequence[Sequence[Sequence[int]]],
        members: Sequence[Edits],
    ) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for run in (Rows(inputs, members, starts, rows) for rows in runs):
            with ExitStack() as stack:
                arguments: dict[str, Any] = run.arguments(self.hooked.model)
                if run.before:
                    arguments |= cache_arguments(self.model, self._before(inputs, kept, run.before))
                self._resume(stack, kept, run.places(), inputs.device)
                stack.enter_context(compiled(self.compiled))
                if self.mlp is not None and inputs.answer is not None and inputs.answer.ndim == 1:
                    at = answers(run.lanes)
                    assert at is not None, "the inputs have answers"
                    stack.enter_context(only_at(at, self.mlp))
                found |= zip(run.order, self.hooked.run(arguments, run.lanes, in_eval=True), strict=True)
        return [found[member] for member in range(len(members))]

    def _resume(
        self,
        stack: ExitStack,
        kept: list[Int[Tensor, "batch 2"]],
        places: Int[Tensor, "rows*batch tokens"],
        device: torch.device,
    ) -> None:
        """Have the blocks below do nothing but put out what is kept of the tokens at these places."""
        if self.below:
            (hidden,) = self.hidden.gather(kept[0].repeat(len(places) // len(kept[0]), 1), places, device)
            stack.enter_context(resumed(self.blocks[: self.below], hidden, self.hidden.layout))

    def _before(self, inputs: ModelInputs, kept: list[Int[Tensor, "batch 2"]], length: int) -> Before:
        """The keys and values of so many first tokens: those kept, or from a run of them without gradients."""
        places = torch.arange(length) - inputs.extent[0][:, None]
        if self.below == len(self.blocks):
            return Before(length, {})
        if self.level == "suffix":
            store = self.earlier.store
            shapes = {block: each for block, each in store.layout.items() if block >= self.below}
            rows = store.gather(kept[-1], places, inputs.device, len(store.layout) - len(shapes))
            return Before(length, dict(zip(shapes, map(unflat, rows, shapes.values()), strict=True)))
        recorder = Recorder(self.below)
        arguments = {name: value[:, :length] for name, value in text_arguments(inputs, self.hooked.model).items()}
        # What answers is of no interest.
        lane = Lane.alone(
            replace(inputs, answer=torch.zeros(inputs.batch_size, dtype=torch.long, device=inputs.device))
        )
        with torch.no_grad(), ExitStack() as stack:
            self._resume(stack, kept, places, inputs.device)
            self.hooked.run(arguments | cache_arguments(self.model, recorder), [lane], in_eval=True)
        return Before(length, recorder.noted)

    def _agrees(self, level: Level, beside: bool, replay: Run, inputs: ModelInputs, members: Sequence[Edits]) -> bool:
        """Whether the level does what plain hooks do; tried once with and once without gradients.

        Raises:
            CompileError: it does not, and blocks are compiled.
            ValueError: it does not, and the plan is strict.
        """
        trial = level, beside, torch.is_grad_enabled()
        found = None if trial in self.agreed else difference(self.hooked, inputs, members, replay)
        if found is None:
            self.agreed.add(trial)
            return True
        if beside:
            self.beside = False
            warnings.warn(f"members are replayed in turn, not side by side: {found.reason}", stacklevel=2)
        elif self.compiled:
            raise CompileError(f"replay with compiled blocks: {found.reason}") from found.error
        else:
            self._distrust(level, found)
        return False

    def _distrust(self, level: Level, found: Difference) -> None:
        """Spare less than a level that does something else than plain hooks.

        Raises:
            ValueError: the plan is strict.
        """
        if self.strict:
            raise ValueError(f"replay would not be exact: at level '{level}', {found.reason}") from found.error
        self.lower(level, found.reason)


def keep(store: TokenStore, inputs: ModelInputs, start: Tensor, end: Tensor, activations: Sequence[Tensor]) -> None:
    """Keep the tokens from start to end, (B,) each, of the examples that are not kept yet.

    ``activations`` are (B, S, ...), each a part of the store.

    Raises:
        BudgetError: there is no room for them.
    """
    rows = store.missing(inputs.keys)
    if not len(rows):
        return
    counts = (end - start)[rows]
    example = rows.repeat_interleave(counts)
    token = torch.arange(len(example)) - (counts.cumsum(0) - counts - start[rows]).repeat_interleave(counts)
    at = example.to(inputs.device), token.to(inputs.device)
    store.add(inputs.keys[rows], counts, [activation[at].flatten(1) for activation in activations])


def earliest(inputs: ModelInputs, sites: Sequence[Site]) -> Int[Tensor, " batch"]:
    """The earliest token at any of the sites, on the CPU."""
    return torch.stack([inputs.earliest(site) for site in sites]).amin(0)
