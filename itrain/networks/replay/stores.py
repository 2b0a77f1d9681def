"""What is kept of examples from step to step, by what it is for, and how much room that takes.

Rows of features for the examples' tokens are found by the examples' keys. Tensor letters: B batch, N examples kept,
T tokens kept, P positions, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itrain.architectures import architecture, blocks, has
from itrain.inputs import ModelInputs, needs_no_wait
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay.arrivals import Arrivals
from itrain.networks.replay.budget import Budget
from itrain.networks.replay.eligible import unkept
from itrain.sites import Site

Groups = Mapping[tuple[Site, ...], int]
"""Sites that are edited together, and how many blocks lie below them."""


class Sizes(NamedTuple):
    """Bytes that are kept: the residual stream below the edits, keys and values, and what was read."""

    hidden: int
    keys_values: int
    readings: int


class TokenStore:
    """Rows of features for the tokens of examples, one example's after the other's, without padding.

    Args:
        budget: gives the room.
        expected: tokens that are going to be kept, for which room is taken in one piece; more than that is no error.

    Features of several kinds lie in ``parts``, tensors of their own, so that some of them can be had without the rest.
    ``layout`` is for the user to note what they are.
    """

    def __init__(self, budget: Budget, expected: int = 0) -> None:
        self.budget, self.expected = budget, expected
        self.keys = torch.empty(0, dtype=torch.long)
        self.spans = torch.empty(0, 2, dtype=torch.long)
        self.parts: list[Float[Tensor, "tokens features"]] = []
        self.layout: Any = None
        self.used = 0

    def find(self, keys: Int[Tensor, " batch"]) -> Int[Tensor, "batch 2"] | None:
        """Each example's first row and how many it has; None unless all of them are kept."""
        if not len(self.keys):
            return None
        at = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return self.spans[at] if torch.equal(self.keys[at], keys) else None

    def missing(self, keys: Int[Tensor, " batch"]) -> Int[Tensor, " examples"]:
        """The first of the batch's examples with each key that is not kept, in the order of the keys."""
        order = keys.argsort(stable=True)
        fresh = ~torch.isin(keys[order], self.keys)
        fresh[1:] &= keys[order].diff() != 0
        return order[fresh]

    def add(
        self,
        keys: Int[Tensor, " examples"],
        counts: Int[Tensor, " examples"],
        parts: Sequence[Float[Tensor, "tokens features"]],
    ) -> None:
        """Keep rows, ``counts`` of them for each of the examples, whose keys are new and in order.

        Raises:
            BudgetError: there is no room for them; the store has to be closed.
        """
        end = self.used + len(parts[0])
        if not self.parts or end > len(self.parts[0]):
            self._grow(end, parts)
        for kept, rows in zip(self.parts, parts, strict=True):
            kept[self.used : end] = rows
        at = torch.searchsorted(self.keys, keys) + torch.arange(len(keys))
        self.spans = _merged(self.spans, torch.stack([self.used + counts.cumsum(0) - counts, counts], 1), at)
        self.keys = _merged(self.keys, keys, at)
        self.used = end

    def gather(
        self,
        spans: Int[Tensor, "batch 2"],
        place: Int[Tensor, "batch positions"],
        device: torch.device,
        first_part: int = 0,
    ) -> Sequence[Float[Tensor, "batch positions features"]]:
        """Rows at places counted within each example, on the device, of the parts from one on.

        A place outside of the example, which is padding, gets its nearest row, or any where it has none.
        """
        first, count = spans[:, :1], spans[:, 1:]
        index = (first + place.clamp(min=0).minimum(count - 1).clamp(min=0)).clamp(max=self.used - 1)
        flat, parts = index.flatten(), self.parts[first_part:]
        if device.type == "cuda" and any(part.device.type == "cpu" for part in parts):
            return Arrivals(parts, index, device)
        rows = (part.index_select(0, flat.to(part.device, non_blocking=True)).to(device) for part in parts)
        return [each.view(*place.shape, -1) for each in rows]

    @property
    def nbytes(self) -> int:
        """What is kept, without room that is not used yet."""
        return sum(self.used * part.shape[1] * part.element_size() for part in self.parts)

    def close(self) -> None:
        """Forget all, and give the room back."""
        for part in self.parts:
            self.budget.give_back(part)
        self.keys, self.spans, self.parts, self.used = self.keys[:0], self.spans[:0], [], 0

    def _grow(self, needed: int, like: Sequence[Tensor]) -> None:
        for number, part in enumerate(like):
            old = self.parts[number] if number < len(self.parts) else None
            rows, row = max(needed, self.expected), part.shape[1] * part.element_size()
            if self.budget.place(2 * self.used * row, part.device, old) is not None:
                rows = max(rows, 2 * self.used)
            grown = self.budget.take(rows, part.shape[1], part.dtype, part.device, freed=old)
            if old is None:
                self.parts.append(grown)
            else:
                grown[: self.used] = old[: self.used]
                self.parts[number] = grown


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

    def of(self, key: Site | tuple[Any, ...]) -> TokenStore:
        """What is read at a site, or ``("hidden", n)``, the residual stream above n blocks."""
        if key not in self._stores:
            self._stores[key] = TokenStore(self.budget, self._expected.get(key, 0))
        return self._stores[key]

    def earlier(self, groups: Groups) -> Earlier:
        """Where keys and values are kept for these groups: where others' are, if that serves these too."""
        if self._earlier is not None and all(self._earlier.serves(*group) for group in groups.items()):
            return self._earlier
        first = min(groups.values())
        return Earlier(self.of(_earlier(first, list(groups))), first, list(groups))

    def make_room(self, groups: Groups, read: Sequence[Site] | None = None) -> None:
        """Drop what was kept for other edits and readings than these, but for keys and values that serve these."""
        if self._earlier is not None and not self._earlier.store.used:
            self._earlier = None
        if placed := _placed(groups):
            self._earlier = self.earlier(placed)
        needed = {*_read(groups, read), *(("hidden", below) for below in groups.values())}
        serving = None if self._earlier is None else self._earlier.store
        for key in [key for key, store in self._stores.items() if key not in needed and store is not serving]:
            self._stores.pop(key).close()

    def expect(self, tokens: Mapping[Any, int]) -> None:
        """Take room in one piece for so many tokens in each store."""
        for key, count in tokens.items():
            self._expected[key] = self.of(key).expected = count

    def tokens(
        self,
        groups: Groups,
        bases: Sequence[ModelInputs],
        sources: Sequence[ModelInputs],
        read: Sequence[Site] | None = None,
    ) -> dict[Any, int]:
        """The tokens of different examples in each of the stores that the groups and what is read need."""
        whole = _different(bases, lambda inputs: inputs.extent[1] - inputs.extent[0])
        tokens: dict[Any, int] = {}
        for below in filter(None, groups.values()):
            tokens["hidden", below] = whole
        for site in (site for site in _read(groups, read) if site.position is not None):
            tokens[site] = _different(sources, lambda inputs, site=site: inputs.slots(site)[1])
        row = architecture(self.hooked.model)
        if row is not None and row.causal and unkept(self.hooked.model) is None and (placed := _placed(groups)):
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
                total["hidden"] += count * hidden_size(Site(layer=0, component="block_output"), example) * size
            else:
                above = range(key[1], len(blocks(model)))
                pairs = [
                    Site(layer=layer, component=each) for layer in above for each in ("key_output", "value_output")
                ]
                total["keys_values"] += count * sum(hidden_size(site) for site in pairs if has(model, site)) * size
        return Sizes(**total)

    def close(self) -> None:
        """Drop all."""
        for store in self:
            store.close()
        self._stores.clear()
        self._earlier = None


def _read(groups: Groups, read: Sequence[Site] | None) -> Sequence[Site]:
    """Where sources are read: at all the sites of the groups, unless it is said."""
    return list(dict.fromkeys(site for group in groups for site in group)) if read is None else read


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
    # A blocking copy would wait for all that the accelerator has still to do.
    at = tuple(each.to(inputs.device, non_blocking=needs_no_wait(inputs.device)) for each in (example, token))
    store.add(inputs.keys[rows], counts, [activation[at].flatten(1) for activation in activations])


def keep_reading(
    store: TokenStore, inputs: ModelInputs, site: Site, activation: Float[Tensor, "batch positions features"]
) -> None:
    """Keep what was read at the site's own tokens of the examples; raises as :func:`keep` does."""
    slots, counts = inputs.slots(site)
    # Slots that repeat a token hold the same, so that it does not matter which of them is taken.
    slot = torch.zeros_like(slots).scatter(1, slots, torch.arange(slots.shape[1]).expand_as(slots))
    slot = slot.to(activation.device, non_blocking=needs_no_wait(activation.device))
    activation = activation.take_along_dim(slot[:, :, None], 1)
    keep(store, inputs, torch.zeros_like(counts), counts, [activation])


def earliest(inputs: ModelInputs, sites: Sequence[Site]) -> Int[Tensor, " batch"]:
    """The earliest token at any of the sites, on the CPU."""
    return torch.stack([inputs.earliest(site) for site in sites]).amin(0)


def _merged(old: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """Both, with the new values at their places in the result."""
    others = torch.ones(len(old) + len(new), dtype=torch.bool)
    others[at] = False
    result = old.new_empty(len(others), *old.shape[1:])
    result[at], result[others] = new, old
    return result
