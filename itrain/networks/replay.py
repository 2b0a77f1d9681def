"""ReplayNetwork: the verbs of HookedNetwork at the cost of what an edit can change, for a frozen model.

Tensor letters: B batch, S sequence, P positions, D hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from itrain.architectures import architecture, blocks, locate
from itrain.inputs import ModelInputs
from itrain.networks.base import ROWS, Network
from itrain.networks.cache import Budget, BudgetError, in_words
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lanes import Edits
from itrain.networks.plan import Level, Plan, keep
from itrain.networks.resume import TEXT, obstacle, state
from itrain.networks.stores import Sizes, Stores
from itrain.sites import Site

Replay = Literal["auto", "on", "off"]


class ReplayNetwork(Network):
    """HookedNetwork's verbs with its results to rounding, without running again what no edit can change.

    Before an example is first edited, the untouched model runs on it, and what no edit can change is kept: the residual
    stream below the lowest edited site and, in causal models, the keys and values of the tokens before the first edited
    one. Then the model's own forward runs on the tokens from the batch's first edited one on, its lower blocks replaced
    by what was kept. Before less than all is first run, answer and gradient are compared with those of plain hooks, as
    they are again after the model has changed. Whatever cannot be replayed exactly runs under plain hooks.

    Args:
        hooked: runs the model.
        uses: how often each example is edited at a site; nothing is kept where that would cost more than it spares.
            None: often.
        budget_gib: the most that is kept in the device's memory, and as much again in the host's.
        folder: where memory-mapped files hold what exceeds the budget; None: a cheaper level is chosen instead.
        strict: refuse what cannot be replayed exactly.
        compile: have the blocks above the edits that no edit acts within run compiled, by torch.compile.

    Raises:
        ValueError: ``strict``, and the model, a site or an input cannot be replayed exactly; the message says why.
        CompileError: ``compile``, and a compiled block fails or replay is not exact with it.
    """

    def __init__(
        self,
        hooked: HookedNetwork,
        *,
        uses: int | None = None,
        budget_gib: float = 4.0,
        folder: Path | str | None = None,
        strict: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.hooked, self.strict, self.uses, self.compiles = hooked, strict, uses, compile
        self.keeps = uses is None or uses > 1
        self.budget = Budget(budget_gib, None if folder is None else Path(folder))
        self.stores = Stores(hooked, self.budget)
        self._state: object = None
        self._looked = False
        self._obstacle()

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        return self.hooked.model

    def forward(self, inputs: ModelInputs) -> Tensor:
        return self.hooked(inputs)

    def hidden_size(self, site: Site, example: ModelInputs | None = None) -> int:
        return self.hooked.hidden_size(site, example)

    def read(self, inputs: ModelInputs, sites: Iterable[Site]) -> dict[Site, Float[Tensor, "batch *places features"]]:
        wanted = tuple(dict.fromkeys(sites))
        if self._obstacle() is not None:
            return self.hooked.read(inputs, wanted)
        keeps = self.keeps and self._unfit(inputs) is None
        stores = {site: self.stores.readings(site) for site in _placed(wanted) if keeps}
        found = {}
        for site, store in stores.items():
            if (kept := store.find(inputs.keys)) is not None:
                (found[site],) = store.gather(kept, inputs.slots(site)[0], inputs.device)
        if missing := [site for site in wanted if site not in found]:
            # Only modules within blocks are known to be called once.
            in_blocks = all(self._depth(site) is not None for site in missing)
            found |= self.hooked.read(inputs, missing, stop_early=in_blocks)
            for site in missing:
                if site in stores:
                    self._keep_reading(inputs, site, found[site])
        return {site: found[site] for site in wanted}

    def edit_each(self, inputs: ModelInputs, members: Sequence[Edits], *, rows: int = ROWS) -> list[Tensor]:
        groups = [[site for site, _ in edits] for edits in members]
        plan = self._plan(groups) if all(groups) and self._obstacle() is None else None
        if plan is None or self._unfit(inputs, plan) is not None:
            return self.hooked.edit_each(inputs, members, rows=rows)
        return plan.edit_each(inputs, members, rows=rows)

    def generate(
        self, inputs: ModelInputs, edits: Edits, *, max_new_tokens: int, end: int | None = None
    ) -> Int[Tensor, "batch new"]:
        return self.hooked.generate(inputs, edits, max_new_tokens=max_new_tokens, end=end)

    def estimate(
        self,
        groups: Sequence[Sequence[Site]],
        bases: Sequence[ModelInputs],
        sources: Sequence[ModelInputs] = (),
    ) -> Sizes:
        """What would be kept of these examples if all of it had room; the arguments are those of ``prepare``."""
        below = {tuple(group): self._below(group) or 0 for group in groups}
        return self._sizes(self.stores.tokens(below, bases, sources), bases)

    def _sizes(self, tokens: Mapping[Any, int], bases: Sequence[ModelInputs]) -> Sizes:
        return self.stores.sizes(tokens, bases[0].take(torch.tensor([0])).to(self._device))

    def prepare(
        self,
        groups: Sequence[Sequence[Site]],
        bases: Sequence[ModelInputs],
        sources: Sequence[ModelInputs] = (),
    ) -> str:
        """Make ready for these examples: take room for them in one piece, and begin no level that has none.

        What was kept for other edits is dropped, but for keys and values that serve these as well.
        """
        if not groups:
            return "reads are kept, and stop at the site"
        reason = self._obstacle()
        below = {} if reason else {tuple(group): self._below(group) for group in groups}
        if None in below.values():
            reason = "an edited site lies in no block"
        if reason is not None:
            return self._and_compiled(f"plain hooks: {reason}", 0)
        self._uses = None if self.uses is None else self.uses * len(groups)
        depths = {group: depth for group, depth in below.items() if depth is not None}
        self.stores.make_room(depths)
        self._plans.clear()
        plans = [plan for group in depths if (plan := self._plan([group]))]
        unfit = (self._unfit(each, plan) for plan in plans for each in bases)
        if (reason := next(filter(None, unfit), None)) is not None:
            return self._and_compiled(f"plain hooks: {reason}", 0)
        for plan in plans:
            plan.weigh(bases, self._uses)
        tokens = self.stores.tokens(depths, bases, sources)
        sizes, room = self._sizes(tokens, bases), self.budget.room(self._device)
        budget = f"the budget is {in_words(self.budget.bytes)}"
        for plan in plans:
            if plan.level == "suffix" and sum(sizes) > room:
                plan.lower("suffix", f"keys and values take {in_words(sizes.keys_values)}, {budget}")
            if plan.level in ("prefix", "recompute") and sizes.hidden + sizes.readings > room:
                plan.lower("prefix", f"outputs of the blocks below take {in_words(sizes.hidden)}, {budget}")
        self.stores.expect(tokens)
        levels = {plan.level for plan in plans}
        kept = sizes.hidden * bool(levels - {"stop"}) + sizes.keys_values * ("suffix" in levels)
        kept += sizes.readings * self.keeps
        where = "" if kept <= self.budget.memory(self._device) else f" of memory, the rest lies in {self.budget.folder}"
        widest = min(plans, key=lambda plan: plan.below)
        runs = self._and_compiled(widest.describe(), 0 if widest.level == "stop" else len(widest.compiled))
        return f"{runs}; {in_words(kept)} are kept, {budget}{where}"

    def _and_compiled(self, line: str, blocks: int) -> str:
        """The line, and how many blocks are compiled if that was asked for."""
        words = {0: "nothing is", 1: "one block is"}.get(blocks, f"{blocks} blocks are")
        return f"{line}; {words} compiled" if self.compiles else line

    def forget(self) -> None:
        """Drop all that was kept, as is done whenever the model has changed."""
        self.stores.close()
        self._uses = self.uses
        self._full: set[Site] = set()
        self._plans: dict[tuple[tuple[Site, ...], ...], Plan | None] = {}
        self._depths: dict[Site, int | None] = {}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        self._obstacle()
        self._looked = True
        try:
            yield
        finally:
            self._looked = False

    def _obstacle(self) -> str | None:
        """Why this model cannot be replayed, if it cannot; forgets what was kept of it before it changed."""
        seen = self._state if self._looked else state(self.model)
        if seen != self._state:
            self.forget()
            self._state, self._reason = seen, obstacle(self.model)
        return self._refused(self._reason)

    def _unfit(self, inputs: ModelInputs, plan: Plan | None = None) -> str | None:
        """Why these inputs cannot be replayed, if they cannot."""
        left, right = inputs.padding
        padded = left or right
        reason = None
        if others := set(inputs.arguments) - TEXT:
            reason = f"the model is given '{min(others)}' besides tokens"
        elif padded and "attention_mask" not in inputs.arguments:
            reason = "there is padding and no attention mask"
        elif left and not self._causal:
            reason = "an encoder counts padding on the left as tokens"
        elif padded and plan is not None and plan.sees_padding(inputs):
            reason = "the answer or an edit takes in padding"
        return self._refused(reason)

    def _refused(self, reason: str | None) -> str | None:
        if self.strict and reason is not None:
            raise ValueError(f"replay would not be exact: {reason}")
        return reason

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _causal(self) -> bool:
        row = architecture(self.model)
        return row is not None and row.causal

    def _depth(self, site: Site) -> int | None:
        """How many blocks lie below the site; None for a site in no block, or in one of several calls."""
        if site not in self._depths:
            module, end, *_ = locate(self.model, site)
            layers = blocks(self.model)
            depth = next((place for place, block in enumerate(layers) if module in set(block.modules())), None)
            if depth is not None and module is layers[depth] and end == "output":
                depth += 1
            self._depths[site] = depth if site.step is None else None
        return self._depths[site]

    def _below(self, sites: Sequence[Site]) -> int | None:
        """How many blocks lie below all of the sites; None where one of them lies in no block.

        Raises:
            ValueError: one of them does, and the network is strict.
        """
        depths = {site: self._depth(site) for site in sites}
        outside = [site for site, depth in depths.items() if depth is None]
        self._refused(f"site '{outside[0]}' lies in no block" if outside else None)
        return None if outside else min((depth or 0 for depth in depths.values()), default=0)

    def _plan(self, groups: Sequence[Sequence[Site]]) -> Plan | None:
        """The plan for members that are edited at a group of sites each; None where one of these lies in no block."""
        key = tuple(dict.fromkeys(map(tuple, groups)))
        if key not in self._plans:
            sites = list(dict.fromkeys(site for group in key for site in group))
            below = self._below(sites)
            self._plans[key] = None if below is None else self._new_plan(key, sites, below)
        return self._plans[key]

    def _new_plan(self, groups: Sequence[Sequence[Site]], sites: Sequence[Site], below: int) -> Plan:
        level: Level = "suffix"
        reason = ""
        if self._uses == 1:
            level, reason = "stop", "each example is used once"
        elif not self._causal:
            level, reason = "prefix", "in an encoder every token sees the edited one"
        elif len(_placed(sites)) < len(sites):
            level, reason = "prefix", "a site without a position has all tokens edited"
        return Plan(
            self.hooked,
            sites,
            below=below,
            level=level,
            reason=reason,
            hidden=self.stores.hidden(below),
            earlier=self.stores.earlier({tuple(group): self._below(group) or 0 for group in groups}),
            strict=self.strict,
            compile=self.compiles,
        )

    def _keep_reading(
        self, inputs: ModelInputs, site: Site, activation: Float[Tensor, "batch positions features"]
    ) -> None:
        if site in self._full:
            return
        store = self.stores.readings(site)
        slots, counts = inputs.slots(site)
        # Slots that repeat a token hold the same, so that it does not matter which of them is taken.
        slot = torch.zeros_like(slots).scatter(1, slots, torch.arange(slots.shape[1]).expand_as(slots))
        activation = activation.take_along_dim(slot[:, :, None].to(activation.device), 1)
        try:
            keep(store, inputs, torch.zeros_like(counts), counts, [activation])
        except BudgetError as error:
            self._full.add(site)
            store.close()
            warnings.warn(f"what is read at '{site}' is not kept: {error}", stacklevel=2)


def _placed(sites: Sequence[Site]) -> list[Site]:
    return [site for site in sites if site.position is not None]


def __getattr__(name: str) -> Any:
    """``make_network`` under the path that configurations of before name."""
    if name == "make_network":
        from itrain.networks import choose

        return choose.make_network
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
