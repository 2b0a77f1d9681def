"""ReplayNetwork: the verbs of HookedNetwork at the cost of what an edit can change, for a frozen model.

Tensor letters: B batch, S sequence, P positions, D hidden.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from itrain.architectures import architecture, blocks, locate
from itrain.devices import device_of
from itrain.inputs import ModelInputs
from itrain.networks.base import ROWS, Network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import Edits
from itrain.networks.replay.budget import Budget, BudgetError, in_words
from itrain.networks.replay.comparison import StaleError, alike
from itrain.networks.replay.eligible import State, inexact, obstacle, shortest_changing, unfit, unkept
from itrain.networks.replay.levels import Choice, choose
from itrain.networks.replay.plan import AGAIN, Plan
from itrain.networks.replay.stores import Sizes, Stores, keep_reading
from itrain.sites import Site
from itrain.weights import fingerprint

Replay = Literal["auto", "on", "off"]
IDLE = 1.0
"""Seconds without a run after which the weights' values are looked at, as after ``AGAIN`` runs."""
PATIENCE = 100
"""How many times as long as such a look takes the network has to be idle, so that looks take a hundredth at most."""


class ReplayNetwork(Network):
    """HookedNetwork's verbs with its results to rounding, without running again what no edit can change.

    Before an example is first edited, the untouched model runs on it, and what no edit can change is kept: the residual
    stream below the lowest edited site and, in causal models, the keys and values of the tokens before the first edited
    one. Then the model's own forward runs on the tokens from the batch's first edited one on, its lower blocks replaced
    by what was kept. Before less than all is first run, answer and gradient are compared with those of plain hooks, as
    they are again after the model has changed. Whatever cannot be replayed exactly runs under plain hooks.

    What was kept is dropped when the model has changed:

    * before the next run after a change of weights, buffers, modules, their classes, forwards, hooks, attributes or
      configurations, adapters among them;
    * after a write without a trace, through ``.data`` or to tensors of inference mode: in the next ``prepare``, after a
      second without a run, or after 500 runs. Values of every row and column are looked at, but not all of them;
    * after any other change, such as of a function that a forward calls: by a comparison with plain hooks, every 500
      runs and where texts are longer than all before.

    Changes that are noticed late are warned of, since results may have been the earlier model's.

    Args:
        hooked: runs the model.
        uses: how often each example is edited at a site; nothing is kept where that would cost more than it saves.
            None: what ``prepare`` is told.
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
        self.trainable = hooked.trainable
        self._expect(uses)
        if not hooked.trainable:
            self.eval()
        self.budget = Budget(budget_gib, None if folder is None else Path(folder))
        self.stores = Stores(hooked, self.budget)
        self._state: State | None = None
        self._looked = False
        self._reads = self._looks = 0
        self._last = self._patience = 0.0
        self._look()

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        return self.hooked.model

    def forward(self, inputs: ModelInputs) -> Tensor:
        return self.hooked(inputs)

    def hidden_size(self, site: Site, example: ModelInputs | None = None) -> int:
        return self.hooked.hidden_size(site, example)

    def read(
        self, inputs: ModelInputs, sites: Iterable[Site], edits: Edits = ()
    ) -> dict[Site, Float[Tensor, "batch *places features"]]:
        wanted = tuple(dict.fromkeys(sites))
        if not self._looked:
            self._look()
        if edits or self._reason is not None:
            in_blocks = self._reason is None and self._in_blocks([*wanted, *(each[0] for each in edits)])
            return self.hooked.read(inputs, wanted, edits, stop_early=in_blocks)
        reason = unfit(inputs, causal=self._causal, changing=self._changing) if self.keeps else None
        if reason is not None and self.strict:
            raise inexact(reason)
        self._reads += 1
        if self._reads > AGAIN and self.keeps and reason is None:
            self._reads = 0
            self._compare_readings(inputs, wanted)
        kept = [site for site in wanted if self.keeps and reason is None and site.tokenwise]
        found = {}
        for site in kept:
            store = self.stores.of(site)
            if (spans := store.find(inputs.keys)) is not None:
                (found[site],) = store.gather(spans, inputs.slots(site)[0], inputs.device)
        if missing := [site for site in wanted if site not in found]:
            found |= self.hooked.read(inputs, missing, stop_early=self._in_blocks(missing))
            for site in missing:
                if site in kept and site not in self._full:
                    try:
                        keep_reading(self.stores.of(site), inputs, site, found[site])
                    except BudgetError as error:
                        self._full.add(site)
                        self.stores.of(site).close()
                        warnings.warn(f"what is read at '{site}' is not cached: {error}", stacklevel=2)
        return {site: found[site] for site in wanted}

    def edit_each(self, inputs: ModelInputs, members: Sequence[Edits], *, rows: int = ROWS) -> list[Tensor]:
        if not self._looked:
            self._look()
        groups = tuple(tuple(dict.fromkeys(each[0] for each in edits)) for edits in members)
        plan = None
        if self._reason is None and all(groups):
            plan = self._plans.get(groups) or self.plan(groups)
        if plan is None:
            return self.hooked.edit_each(inputs, members, rows=rows)
        all_tokens = plan.edits_all_tokens or inputs.answer is None
        reason = unfit(inputs, causal=self._causal, all_tokens=all_tokens, changing=self._changing)
        if reason is not None:
            if self.strict:
                raise inexact(reason)
            return self.hooked.edit_each(inputs, members, rows=rows)
        try:
            return plan.edit_each(inputs, members, rows=rows)
        except StaleError as stale:
            self._drop(str(stale))
            return self.edit_each(inputs, members, rows=rows)

    def unedited(self, inputs: ModelInputs, sites: Sequence[Site]) -> Tensor:
        return self.edit(inputs, [(site, lambda base: base) for site in sites])

    def generate(
        self, inputs: ModelInputs, edits: Edits, *, max_new_tokens: int, **settings: Any
    ) -> Int[Tensor, "rows new"]:
        return self.hooked.generate(inputs, edits, max_new_tokens=max_new_tokens, **settings)

    def plan(self, groups: Sequence[Sequence[Site]]) -> Plan | None:
        """How members that are edited at a group of sites each are run; None: under plain hooks, outside the blocks."""
        key = tuple(dict.fromkeys(map(tuple, groups)))
        if key not in self._plans:
            below = self._below([site for group in key for site in group])
            self._plans[key] = None if below is None else self._new_plan(key, below)
        return self._plans[key]

    def levels(self, groups: Sequence[Sequence[Site]]) -> list[Choice]:
        """How much of a run is skipped when each group of sites is edited, as it stands now, and why no more.

        It may be less for some inputs, for example padded ones. After ``prepare`` it takes the examples into account.

        Raises:
            ValueError: the network is strict, and the model or a site cannot be replayed.
        """
        self._look()
        count = 0 if self._reason else len(blocks(self.model))
        found = []
        for group in groups:
            plan = None if self._reason else self.plan([group])
            why = self._reason or "a site lies outside the blocks"
            found.append(plan.choice if plan else Choice(below=0, blocks=count, level="stop", reason=why))
        return found

    def estimate(
        self,
        groups: Sequence[Sequence[Site]],
        bases: Sequence[ModelInputs],
        sources: Sequence[ModelInputs] = (),
        *,
        read: Sequence[Site] | None = None,
    ) -> Sizes:
        """What would be kept of these examples if all of it had room; the arguments are those of ``prepare``."""
        below = {tuple(group): self._below(group) or 0 for group in groups}
        return self._sizes(self.stores.tokens(below, bases, sources, read), bases)

    def prepare(
        self,
        groups: Sequence[Sequence[Site]],
        bases: Sequence[ModelInputs],
        sources: Sequence[ModelInputs] = (),
        *,
        uses: int | None = None,
        read: Sequence[Site] | None = None,
    ) -> str:
        """Make ready for these examples: take room for them in one piece, and begin no level that has none.

        What was kept for other edits is dropped, but for keys and values that serve these as well.
        """
        self._expect(uses if self.uses is None else self.uses)
        self._look(closely=True)
        if not groups:
            return "blocks up to the sites that are read; what is read is cached"
        below = {} if self._reason else {tuple(group): self._below(group) for group in groups}
        depths = {group: depth for group, depth in below.items() if depth is not None}
        if len(depths) < len(below) or self._reason is not None:
            return self._under_hooks(self._reason or "an edited site lies outside the blocks")
        self._uses = None if self._expected_uses is None else self._expected_uses * len(groups)
        self.stores.make_room(depths, read)
        self._plans.clear()
        plans = [plan for group in depths if (plan := self.plan([group]))]
        unfitting = (
            unfit(
                each,
                causal=self._causal,
                all_tokens=plan.edits_all_tokens or each.answer is None,
                changing=self._changing,
            )
            for plan in plans
            for each in bases
        )
        if (reason := next(filter(None, unfitting), None)) is not None:
            if self.strict:
                raise inexact(reason)
            return self._under_hooks(reason)
        tokens = self.stores.tokens(depths, bases, sources, read)
        sizes = self._sizes(tokens, bases)
        for plan in plans:
            plan.choice = plan.choice.weighed(plan.sites, bases, self._uses)
            while lacks := plan.choice.beyond(sizes, self.budget.room(self._device), self.budget.bytes):
                plan.lower(*lacks)
        self.stores.expect(tokens)
        widest = min(plans, key=lambda plan: plan.below)
        compiled = self._compiled(0 if widest.choice.level == "stop" else len(widest.compiled))
        return f"{widest.choice.describe()}{compiled}; {self._caches(sizes, plans)}{self.hooked.recomputed}"

    def _expect(self, uses: int | None) -> None:
        self._expected_uses = uses
        self.keeps = uses is None or uses > 1
        """Whether what is kept of an example is used again."""

    def forget(self) -> None:
        """Drop all that was kept, as is done whenever the model has changed."""
        self.stores.close()
        self._uses = self._expected_uses
        self._full: set[Site] = set()
        self._plans: dict[tuple[tuple[Site, ...], ...], Plan | None] = {}
        self._depths: dict[Site, int | None] = {}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        self._look()
        self._looked = True
        try:
            yield
        finally:
            self._looked = False

    def _look(self, *, closely: bool = False) -> None:
        """Look whether the model has changed, and forget what was kept of it before.

        Args:
            closely: at the weights' values too, however short a time has passed since the last such look.

        Raises:
            ValueError: it cannot be replayed, and the network is strict.
        """
        if self.training and not self.trainable:
            self.eval()
        if self._state is None or not (self._looked or self._state.holds()):
            self.forget()
            row = architecture(self.model)
            self._causal = row is not None and row.causal
            self._unkept = unkept(self.model)
            self._state, self._reason = State(self.model), obstacle(self.model)
            self._changing = shortest_changing(self.model)
            self._values: str | None = None
        if self._reason is not None:
            if self.strict:
                raise inexact(self._reason)
            return
        last, self._last = self._last, time.perf_counter()
        self._looks += 1
        if closely or self._values is None or self._looks > AGAIN or self._last - last > self._patience:
            self._look_at_values()

    def _look_at_values(self) -> None:
        before, self._values, self._looks = self._values, fingerprint(self.model), 0
        self._patience = max(IDLE, PATIENCE * (time.perf_counter() - self._last))
        if before is not None and before != self._values:
            self._drop("its weights have other values")

    def _drop(self, reason: str) -> None:
        """Forget what was kept of a model that has changed without a trace, and say so."""
        self.forget()
        warnings.warn(
            f"the model has changed without a trace ({reason}), as by a write through .data or a replaced function: "
            "what was kept of its runs is dropped, and results since the change may be the earlier model's",
            stacklevel=2,
        )

    def _compare_readings(self, inputs: ModelInputs, sites: Sequence[Site]) -> None:
        """Read one example again, under plain hooks, and drop all if it is not what was kept of it."""
        one = inputs.take(torch.tensor([0]))
        for site in (site for site in sites if site.tokenwise):
            store = self.stores.of(site)
            if (spans := store.find(one.keys)) is None:
                continue
            (kept,) = store.gather(spans, one.slots(site)[0], one.device)
            if not alike(kept, self.hooked.read(one, [site])[site], self.model):
                return self._drop(f"other activations at '{site}'")

    @property
    def _device(self) -> torch.device:
        return device_of(self.model)

    def _depth(self, site: Site) -> int | None:
        """How many blocks lie below the site; None for a site in no block, or in one of several calls."""
        if site not in self._depths:
            module, end, *_ = locate(self.model, site)
            layers = blocks(self.model)
            depth = next((place for place, block in enumerate(layers) if module in set(block.modules())), None)
            if depth is not None and module is layers[depth] and end == "output":
                depth += 1
            self._depths[site] = depth if site.step is None and end != "weights" else None
        return self._depths[site]

    def _in_blocks(self, sites: Iterable[Site]) -> bool:
        """Whether the sites' modules lie within blocks, the only ones that are known to be called once."""
        return all(self._depth(site) is not None for site in sites)

    def _below(self, sites: Sequence[Site]) -> int | None:
        """How many blocks lie below all of the sites; None where one of them lies in no block.

        Raises:
            ValueError: one of them does, and the network is strict.
        """
        depths = {site: self._depth(site) for site in sites}
        outside = [site for site, depth in depths.items() if depth is None]
        if outside and self.strict:
            raise inexact(f"site '{outside[0]}' lies outside the blocks")
        return None if outside else min((depth or 0 for depth in depths.values()), default=0)

    def _new_plan(self, groups: Sequence[Sequence[Site]], below: int) -> Plan:
        sites = list(dict.fromkeys(site for group in groups for site in group))
        count = len(blocks(self.model))
        return Plan(
            self.hooked,
            sites,
            choice=choose(sites, below=below, blocks=count, causal=self._causal, uses=self._uses, unkept=self._unkept),
            hidden=self.stores.of(("hidden", below)),
            earlier=self.stores.earlier({tuple(group): self._below(group) or 0 for group in groups}),
            strict=self.strict,
            compile=self.compiles,
        )

    def _sizes(self, tokens: Mapping[Any, int], bases: Sequence[ModelInputs]) -> Sizes:
        return self.stores.sizes(tokens, bases[0].take(torch.tensor([0])).to(self._device))

    def _under_hooks(self, reason: str) -> str:
        return f"the whole model, under plain hooks ({reason}){self._compiled(0)}{self.hooked.recomputed}"

    def _compiled(self, count: int) -> str:
        """How many blocks are compiled, if that was asked for."""
        words = {0: "nothing", 1: "one block"}.get(count, f"{count} blocks")
        return f"; {words} compiled" if self.compiles else ""

    def _caches(self, sizes: Sizes, plans: Sequence[Plan]) -> str:
        """How much is kept, and where."""
        levels = {plan.choice.level for plan in plans}
        kept = sizes.hidden * bool(levels - {"stop"}) + sizes.keys_values * ("suffix" in levels)
        kept += sizes.readings * self.keeps
        rest = "" if kept <= self.budget.memory(self._device) else f" in memory, the rest in {self.budget.folder}"
        return f"cache {in_words(kept)} (limit {in_words(self.budget.bytes)}{rest})"
