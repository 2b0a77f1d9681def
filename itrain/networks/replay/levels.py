"""Levels: how much of an edited run is skipped, and why no more. All that decides on a level stands here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from itrain.inputs import ModelInputs
from itrain.networks.replay.budget import in_words
from itrain.networks.replay.stores import Sizes, earliest
from itrain.sites import Site

Level = Literal["stop", "prefix", "recompute", "suffix"]
"""What of an edited run is skipped: nothing; the blocks below the edits; the gradient of the tokens before them; these
tokens altogether."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The level at which edits at some sites are replayed.

    Args:
        below: how many blocks lie below the lowest of the sites.
        blocks: how many the model has.
        level: what is skipped.
        reason: why no more is; empty where the most is.
    """

    below: int
    blocks: int
    level: Level
    reason: str = ""

    @property
    def all_tokens(self) -> Level:
        """The level of a run in which all tokens have to run."""
        return "prefix" if self.below and self.level != "stop" else "stop"

    def lowered(self, failed: Level, reason: str) -> Choice:
        """The choice where a level cannot be had: the next one down."""
        level: Level = "stop" if failed == "prefix" else "recompute" if failed == "suffix" else self.all_tokens
        return replace(self, level=level, reason=reason)

    def weighed(self, sites: Sequence[Site], bases: Sequence[ModelInputs], uses: int | None) -> Choice:
        """Nothing is skipped where filling the caches costs more than all uses of the examples save.

        In units of a forward run of the whole model, a step under hooks costs 1 + a, where a is the share of the blocks
        that lie above the edits and take part in the backward run; a replayed one costs 2 a s, where s is the share of
        the tokens that run; and filling the caches costs 1.
        """
        if uses is None or self.level == "stop":
            return self
        above = 1 - self.below / self.blocks
        whole = sum(int((each.extent[1] - each.extent[0]).sum()) for each in bases)
        run = whole
        if self.level == "suffix":
            run = sum(int((each.extent[1] - earliest(each, sites)).sum()) for each in bases)
        if uses * (1 + above - 2 * above * run / max(whole, 1)) >= 1:
            return self
        return replace(self, level="stop", reason=f"filling the cache costs more than {uses} uses save")

    def beyond(self, sizes: Sizes, room: float, limit: int) -> tuple[Level, str] | None:
        """The part of the caches for which there is no room, as the level that needs it, and why; None: all fits.

        Args:
            sizes: the bytes of the caches.
            room: the bytes that may be taken, on the device, the host and in files.
            limit: the same, as the user has set it.
        """
        if self.level == "suffix" and sum(sizes) > room:
            return "suffix", f"keys and values need {in_words(sizes.keys_values)} of cache, limit {in_words(limit)}"
        if self.level in ("prefix", "recompute") and sizes.hidden + sizes.readings > room:
            return "prefix", f"outputs of the blocks below need {in_words(sizes.hidden)}, limit {in_words(limit)}"
        return None

    def describe(self) -> str:
        """What runs, and why not less."""
        why = f" ({self.reason})" if self.reason else ""
        if self.level == "stop":
            return f"the whole model{why}"
        last = self.blocks - 1
        blocks = f"blocks {self.below}-{last}" if self.below < last else f"block {last}"
        runs = f"{blocks} and the head" if self.below <= last else "the head only"
        if self.level == "suffix":
            return f"{runs}, from the first edited token on"
        if self.level == "recompute":
            return f"{runs}, tokens before the first edited one without gradients{why}"
        return f"{runs}, for all tokens{why}"


def choose(
    sites: Sequence[Site], *, below: int, blocks: int, causal: bool, uses: int | None, unkept: str | None = None
) -> Choice:
    """The most that may be skipped, by where the edits are and what model it is.

    Args:
        sites: what is edited together.
        below: how many blocks lie below the lowest of the sites.
        blocks: how many the model has.
        causal: whether a token sees only itself and those before it.
        uses: how often each example is edited; None: often.
        unkept: why keys and values of earlier tokens cannot be kept; None: they can.
    """
    level: Level = "suffix"
    reason = ""
    if uses == 1:
        level, reason = "stop", "each example is used once"
    elif not causal:
        level, reason = "prefix", "encoder: every token sees the edited one"
    elif unkept is not None:
        level, reason = "prefix", unkept
    elif any(site.position is None for site in sites):
        level, reason = "prefix", "a site without a position edits all tokens"
    if level == "prefix" and not below:
        level, reason = "stop", f"{reason}, and no block lies below"
    return Choice(below=below, blocks=blocks, level=level, reason=reason)
