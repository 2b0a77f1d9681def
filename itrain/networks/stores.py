"""Stores: what replay keeps of examples, by what it is for, and how much room that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from itrain.architectures import architecture, blocks
from itrain.inputs import ModelInputs
from itrain.networks.cache import Budget, TokenStore
from itrain.networks.hooks import HookedNetwork
from itrain.networks.plan import Earlier
from itrain.sites import Site

Groups = Mapping[tuple[Site, ...], int]
"""Sites that are edited together, and how many blocks lie below them."""


class Sizes(NamedTuple):
    """Bytes that are kept: the residual stream below the edits, keys and values, and what was read."""

    hidden: int
    keys_values: int
    readings: int


class Stores:
    """A store for what is read at each site, for the stream above so many blocks, and for keys and values.

    Args:
        hooked: whose model's activations are kept.
        budget: gives the room.
    """

    def __init__(self, hooked: HookedNetwork, budget: Budget) -> None:
        self.hooked, self.budget = hooked, budget
        self._stores: dict[Any, TokenStore] = {}
        self._expected: dict[Any, int] = {}
        self._earlier: Earlier | None = None

    def __iter__(self) -> Iterator[TokenStore]:
        yield from self._stores.values()

    def readings(self, site: Site) -> TokenStore:
        """What is read at the site."""
        return self._store(site)

    def hidden(self, below: int) -> TokenStore:
        """The residual stream above so many blocks."""
        return self._store(("hidden", below))

    def earlier(self, groups: Groups) -> Earlier:
        """Where keys and values are kept for these groups: where others' are, if that serves these too."""
        if self._earlier is not None and all(self._earlier.serves(*group) for group in groups.items()):
            return self._earlier
        first = min(groups.values())
        return Earlier(self._store(_earlier(first, list(groups))), first, list(groups))

    def make_room(self, groups: Groups) -> None:
        """Drop what was kept for other edits and readings than these, but for keys and values that serve these."""
        if self._earlier is not None and not self._earlier.store.used:
            self._earlier = None
        if placed := _placed(groups):
            self._earlier = self.earlier(placed)
        needed = {site for group in groups for site in group} | {("hidden", below) for below in groups.values()}
        serving = None if self._earlier is None else self._earlier.store
        for key in [key for key, store in self._stores.items() if key not in needed and store is not serving]:
            self._stores.pop(key).close()

    def expect(self, tokens: Mapping[Any, int]) -> None:
        """Take room in one piece for so many tokens in each store."""
        for key, count in tokens.items():
            self._expected[key] = self._store(key).expected = count

    def tokens(self, groups: Groups, bases: Sequence[ModelInputs], sources: Sequence[ModelInputs]) -> dict[Any, int]:
        """The tokens of different examples in each of the stores that the groups need."""
        whole = _different(bases, lambda inputs: inputs.extent[1] - inputs.extent[0])
        tokens: dict[Any, int] = {}
        for group, below in groups.items():
            if below:
                tokens["hidden", below] = whole
            for site in (site for site in group if site.position is not None and site not in tokens):
                tokens[site] = _different(sources, lambda inputs, site=site: inputs.slots(site)[1])
        row = architecture(self.hooked.model)
        if row is not None and row.causal and (placed := _placed(groups)):
            earlier = self.earlier(placed)
            key = _earlier(earlier.first, earlier.groups)
            tokens[key] = _different(bases, lambda inputs: earlier.reach(inputs) - inputs.extent[0])
        return tokens

    def sizes(self, tokens: Mapping[Any, int], example: ModelInputs) -> Sizes:
        """The bytes of so many tokens in each of the stores."""
        hidden_size, model = self.hooked.hidden_size, self.hooked.model
        size = next(model.parameters()).dtype.itemsize
        total = dict.fromkeys(Sizes._fields, 0)
        for key, count in tokens.items():
            if isinstance(key, Site):
                total["readings"] += count * hidden_size(key, example) * torch.float32.itemsize
            elif key[0] == "hidden":
                total["hidden"] += count * hidden_size(Site(layer=0, component="block_output")) * size
            else:
                above = range(key[1], len(blocks(model)))
                pairs = [
                    Site(layer=layer, component=each) for layer in above for each in ("key_output", "value_output")
                ]
                total["keys_values"] += count * sum(hidden_size(site) for site in pairs) * size
        return Sizes(**total)

    def close(self) -> None:
        """Drop all."""
        for store in self:
            store.close()
        self._stores.clear()
        self._earlier = None

    def _store(self, key: Any) -> TokenStore:
        if key not in self._stores:
            self._stores[key] = TokenStore(self.budget, self._expected.get(key, 0))
        return self._stores[key]


def _placed(groups: Groups) -> Groups:
    """The groups whose sites all have positions."""
    return {group: below for group, below in groups.items() if all(site.position is not None for site in group)}


def _earlier(first: int, groups: Sequence[Sequence[Site]]) -> tuple[str, int, frozenset[frozenset[str | None]]]:
    """The name of the store of keys and values in the blocks from ``first`` on, which serves these groups."""
    return "earlier", first, frozenset(frozenset(site.position for site in group) for group in groups)


def _different(batches: Sequence[ModelInputs], count: Callable[[ModelInputs], Tensor]) -> int:
    """The sum over different examples."""
    keys = torch.cat([batch.keys for batch in batches]) if batches else torch.empty(0, dtype=torch.long)
    if not len(keys):
        return 0
    order = keys.argsort()
    first = torch.ones(len(keys), dtype=torch.bool)
    first[1:] = keys[order].diff() != 0
    return int(torch.cat([count(batch) for batch in batches])[order][first].sum())
