"""Plan: runs edits at some sites again at the level that was chosen, and keeps what that takes.

Tensor letters: B batch, S sequence, D hidden, T tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from itrain.architectures import blocks, locate
from itrain.inputs import ModelInputs
from itrain.networks.answer import answers
from itrain.networks.forward import Forward, cache_arguments
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import Edits, Lane
from itrain.networks.replay.budget import BudgetError
from itrain.networks.replay.comparison import Difference, Run, StaleError, difference, failure
from itrain.networks.replay.compiled import CompileError, compiled, compiling, unedited
from itrain.networks.replay.forwards import Forwards, forwards, only_at, resumed, watched
from itrain.networks.replay.levels import Choice, Level
from itrain.networks.replay.prefix import Before, Recorder, Unflat, flat
from itrain.networks.replay.rows import Rows, lie_beside, runs, text_arguments
from itrain.networks.replay.stores import Earlier, TokenStore, keep
from itrain.sites import Site

AGAIN = 500
"""Runs after which examples are compared with plain hooks again: that takes about a hundredth of the time of all."""

Spans = list[Int[Tensor, "batch 2"]]
"""The examples' rows in each of the stores that a level needs: first row and count."""


class Plan:
    """Edits at some sites of a frozen model, replayed above the blocks that lie below them.

    Args:
        hooked: runs the model.
        sites: where the edits of all members are.
        choice: the level, at first the most that may be skipped.
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
        choice: Choice,
        hidden: TokenStore,
        earlier: Earlier,
        strict: bool = False,
        compile: bool = False,
    ) -> None:
        self.hooked, self.sites, self.choice, self.hidden, self.earlier = hooked, sites, choice, hidden, earlier
        self.strict, self.below = strict, choice.below
        self.forward, self.blocks = Forward.of(hooked.model), list(blocks(hooked.model))
        self.edits_all_tokens = any(site.position is None for site in sites)
        self.mlp = self._last_mlp()
        self.compiled = unedited(self.blocks, hooked.model, sites, self.below) if compile else {}
        self.beside = True
        """Whether members may lie side by side in a row."""
        self.agreed: dict[tuple[Level, bool, bool], int] = {}
        """The levels that did what plain hooks do, with members side by side or not, with gradients or not, and for how
        many tokens."""
        self.since = 0
        """Runs since the last comparison."""
        self.fresh = not (hidden.used or earlier.store.used)
        """Whether all that is kept is of the model as it was at the first comparison."""

    def edit_each(self, inputs: ModelInputs, members: Sequence[Edits], *, rows: int) -> list[Tensor]:
        """Each member's answer, replayed where that is exact; what it takes is kept of the examples before.

        Raises:
            StaleError: what was kept is not what the model puts out any more.
        """
        while True:
            starts = tuple(self._start(inputs, edits) for edits in members)
            suffix = any(starts)
            level = self.choice.level if suffix else self.choice.all_tokens
            if level == "stop":
                return self.hooked.edit_each(inputs, members, rows=rows)
            kept = self._spans(inputs, suffix=suffix)
            if kept is None:
                continue
            beside = self.beside and len(set(starts)) > 1 and lie_beside(self.forward, inputs)
            at_once = max(1, rows // inputs.batch_size)
            replay = partial(self._replay, inputs, kept, runs(starts, inputs.length, at_once=at_once, beside=beside))
            agreed = self.agreed.get((level, beside, torch.is_grad_enabled()), -1)
            # Longer texts may be the first that a window cuts.
            if inputs.length <= agreed and self.since < AGAIN:
                self.since += 1
                return replay(members)
            self._compare(level, beside, replay, inputs, members)

    def lower(self, level: Level, reason: str) -> None:
        """Skip less than the level from now on, and give back what was kept for it."""
        if level == "suffix":
            self.earlier.store.close()
        if level == "prefix":
            self.hidden.close()
        before, self.choice = self.choice, self.choice.lowered(level, reason)
        warnings.warn(f"replay is lowered from '{before.level}' to '{self.choice.level}': {reason}", stacklevel=2)

    def _start(self, inputs: ModelInputs, edits: Edits) -> int:
        """The first token that has to run under the edits."""
        # Token types can tie tokens to later ones, as within Gemma 3's images.
        skips = self.choice.level in ("suffix", "recompute")
        if not skips or inputs.earliest_answer is None or "token_type_ids" in inputs.arguments:
            return 0
        # What edits of a response's tokens can change comes after the prompt's tokens at their sites.
        earliest = (inputs.earliest(each[0]) for each in edits)
        start = int(torch.stack([inputs.earliest_answer, *earliest]).min())
        return start if start > int(inputs.extent[0].min()) else 0

    def _spans(self, inputs: ModelInputs, *, suffix: bool) -> Spans | None:
        """The examples' spans in the stores that are needed, after an untouched run of those that are not kept yet.

        None, and a lower level, where that fails or there is no room for them.
        """
        needed = [self.hidden] if self.below else []
        if suffix and self.choice.level == "suffix" and self.below < len(self.blocks):
            needed.append(self.earlier.store)
        keys = inputs.keys
        spans = [store.find(keys) for store in needed]
        if any(each is None for each in spans):
            rows = torch.cat([store.missing(keys) for store in needed]).unique()
            if not self._run_untouched(inputs.take(rows)):
                return None
            spans = [store.find(keys) for store in needed]
        return [each for each in spans if each is not None]

    def _run_untouched(self, inputs: ModelInputs) -> bool:
        """Keep what the examples' untouched run shows; False, and a lower level, where that fails or has no room."""
        recorder, at = Recorder(self.earlier.first), answers([Lane(inputs=inputs, rows=inputs.batch_size)])
        first, end = inputs.extent
        level: Level = "prefix"
        try:
            arguments = cache_arguments(self.forward.model, recorder) if self.choice.level == "suffix" else {}
            with torch.no_grad(), watched(self.blocks[self.below - 1] if self.below else None) as seen:
                self.hooked.run({**inputs.arguments, **arguments}, [], at, inputs.candidates)
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
                self.hooked.run(inputs.arguments, [], at, inputs.candidates)  # raises what is the model's own fault
            self._distrust(self.choice.level, failure(error))
            return False
        return True

    def _replay(
        self, inputs: ModelInputs, kept: Spans, planned: Sequence[Rows], members: Sequence[Edits]
    ) -> list[Tensor]:
        """Each member's answer from runs of their rows, with what is kept of the examples in place of the rest."""
        found: dict[int, Tensor] = {}
        for run in planned:
            lanes = run.lanes(inputs, members)
            at, places = answers(lanes), (run.tokens[:, None] - inputs.extent[0][:, None]).flatten(0, 1)
            arguments: dict[str, Any] = run.arguments(inputs, self.forward)
            replaced = self._resumed(inputs, kept, places)
            if run.before:
                arguments |= cache_arguments(self.forward.model, self._before(inputs, kept, run.before))
            if self.mlp is not None and at is not None and at[1].shape[1] == 1:
                replaced |= only_at(at, self.mlp)
            with ExitStack() as stack:
                if self.compiled:
                    replaced |= compiled(self.compiled)
                    stack.enter_context(compiling())
                stack.enter_context(forwards(replaced))
                found |= zip(run.order, self.hooked.run_edits(arguments, lanes, at), strict=True)
        return [found[member] for member in range(len(members))]

    def _resumed(self, inputs: ModelInputs, kept: Spans, places: Int[Tensor, "rows*batch tokens"]) -> Forwards:
        """Have the blocks below do nothing but put out what is kept of the tokens at these places."""
        if not self.below:
            return {}
        spans = kept[0].repeat(len(places) // len(kept[0]), 1)
        (hidden,) = self.hidden.gather(spans, places, inputs.device)
        return resumed(self.blocks[: self.below], hidden, self.hidden.layout)

    def _before(self, inputs: ModelInputs, kept: Spans, length: int) -> Before:
        """The keys and values of so many first tokens: those kept, or from a run of them without gradients."""
        if self.below == len(self.blocks):
            return Before(length, {})
        places = torch.arange(length) - inputs.extent[0][:, None]
        if self.choice.level == "suffix":
            store = self.earlier.store
            shapes = {block: each for block, each in store.layout.items() if block >= self.below}
            rows = store.gather(kept[-1], places, inputs.device, len(store.layout) - len(shapes))
            return Before(length, Unflat(shapes, rows))
        recorder = Recorder(self.below)
        arguments = {name: value[:, :length] for name, value in text_arguments(inputs, self.forward).items()}
        # What answers is of no interest.
        rows = torch.arange(inputs.batch_size, device=inputs.device)[:, None]
        with torch.no_grad(), forwards(self._resumed(inputs, kept, places)):
            cache = cache_arguments(self.forward.model, recorder)
            self.hooked.run(arguments | cache, [], (rows, torch.zeros_like(rows)))
        return Before(length, recorder.noted)

    def _compare(self, level: Level, beside: bool, replay: Run, inputs: ModelInputs, members: Sequence[Edits]) -> None:
        """Note that the level does what plain hooks do, with gradients or without as it is, or skip less.

        Raises:
            StaleError: it does not, and something was kept before.
            CompileError: it does not, and blocks are compiled.
            ValueError: it does not, and the plan is strict.
        """
        found = difference(self.hooked, inputs, members, replay)
        self.since = 0
        if found is None:
            key = level, beside, torch.is_grad_enabled()
            self.agreed[key] = max(inputs.length, self.agreed.get(key, 0))
            self.fresh = False
        elif not self.fresh:
            raise StaleError(found.reason)
        elif beside:
            self.beside = False
            warnings.warn(f"members are replayed in turn, not side by side: {found.reason}", stacklevel=2)
        elif self.compiled:
            raise CompileError(f"replay with compiled blocks: {found.reason}") from found.error
        else:
            self._distrust(level, found)

    def _distrust(self, level: Level, found: Difference) -> None:
        """Skip less than a level that does something else than plain hooks.

        Raises:
            ValueError: the plan is strict.
        """
        if self.strict:
            raise ValueError(f"replay would not be exact: at level '{level}', {found.reason}") from found.error
        self.lower(level, found.reason)

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
