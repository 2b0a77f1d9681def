"""Rows: how members that begin at different tokens lie side by side in one run.

Tensor letters: B batch, S sequence, R rows of an example, W width of a row, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from itrain.inputs import ModelInputs
from itrain.networks.forward import Forward, takes_any_mask
from itrain.networks.lane import Edits, Lane
from itrain.networks.replay.eligible import TEXT, precision


class Rows:
    """A run of some members on the same examples, each from its own first token on, whatever the examples are.

    Each row of the run holds one or several members' tokens of one example, one member's after the other's. A token
    sees the tokens of its own member and, by their kept keys and values, those before the member's first.

    Args:
        starts: each member's first token.
        length: the tokens that an example has.
        rows: the members in each of an example's rows.
    """

    def __init__(self, starts: Sequence[int], length: int, rows: Sequence[Sequence[int]]) -> None:
        self.length, self.order = length, [member for row in rows for member in row]
        self.before = max(starts[member] for member in self.order)
        self.plain = all(starts[row[0]] == self.before and len(row) == 1 for row in rows)
        """Whether all rows hold the same tokens, so that models know by themselves which of them see which."""
        width = max(sum(length - starts[member] for member in row) for row in rows)
        # What is left over at the end of a row repeats the last token, which nothing sees.
        self.tokens = torch.full((len(rows), width), length - 1)
        self.cells: list[tuple[int, slice, int]] = []
        """The row, columns and first token of each member, in order."""
        for number, row in enumerate(rows):
            column = 0
            for member in row:
                start, stop = starts[member], column + length - starts[member]
                self.tokens[number, column:stop] = torch.arange(start, length)
                self.cells.append((number, slice(column, stop), start))
                column = stop

    def lanes(self, inputs: ModelInputs, members: Sequence[Edits]) -> list[Lane]:
        """The lane of each of the run's members, in order."""
        size = inputs.batch_size
        return [
            Lane(
                inputs=inputs,
                edits=members[member],
                first=row * size,
                rows=len(self.tokens) * size,
                shift=start - columns.start,
            )
            for member, (row, columns, start) in zip(self.order, self.cells, strict=True)
        ]

    def arguments(self, inputs: ModelInputs, forward: Forward) -> dict[str, Tensor]:
        """What the model's forward is given of the examples besides keys and values."""
        given = text_arguments(inputs, forward)
        mask = given.pop("attention_mask", None)
        if self.plain:
            arguments = {name: value[:, self.before :] for name, value in given.items()}
            if mask is not None:
                arguments["attention_mask"] = mask
            rows = len(self.tokens)
            return arguments if rows == 1 else {name: value.repeat(rows, 1) for name, value in arguments.items()}
        device, dtype = inputs.device, precision(forward.model)
        places = torch.arange(self.length, device=device)
        given.setdefault("position_ids", places.expand(inputs.batch_size, -1))
        tokens = self.tokens.to(device, non_blocking=True)
        arguments = {name: value[:, tokens].transpose(0, 1).flatten(0, 1) for name, value in given.items()}
        visible = self.visible(mask, inputs.batch_size).to(device, non_blocking=True)
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, torch.finfo(dtype).min)
        return arguments | {"attention_mask": mask}

    def visible(
        self, mask: Int[Tensor, "batch sequence"] | None, batch_size: int
    ) -> Bool[Tensor, "rows*batch 1 width keys"]:
        """Which of the earlier tokens and of its row's each token sees; ``mask`` says which are no padding."""
        starts, owners = torch.zeros_like(self.tokens), torch.full_like(self.tokens, -1)
        for owner, (row, columns, start) in enumerate(self.cells):
            starts[row, columns], owners[row, columns] = start, owner
        earlier = torch.arange(self.before) < starts[:, :, None]
        own = owners[:, :, None] == owners[:, None]
        visible = torch.cat([earlier, own & (self.tokens[:, :, None] >= self.tokens[:, None])], 2)[:, None]
        if mask is not None:
            keys = torch.cat([torch.arange(self.before).expand(len(self.tokens), -1), self.tokens], 1)
            visible, keys = (each.to(mask.device, non_blocking=True) for each in (visible, keys))
            visible = visible & (mask > 0)[:, keys].transpose(0, 1)[:, :, None]
            # Padding sees itself, so that no token sees nothing.
            visible[..., self.before :] |= torch.eye(len(self.tokens[0]), dtype=torch.bool, device=mask.device)
        return visible.expand(-1, batch_size, -1, -1).flatten(0, 1)[:, None]


@lru_cache(maxsize=256)
def runs(starts: tuple[int, ...], length: int, *, at_once: int, beside: bool) -> list[Rows]:
    """The runs of members that begin at these tokens, at most ``at_once`` rows of an example in each."""
    lengths = [length - start for start in starts]
    # They serve later steps too, in which gradients may be wanted.
    with torch.inference_mode(False):
        return [Rows(starts, length, rows) for rows in arranged(lengths, at_once=at_once, beside=beside)]


def arranged(lengths: Sequence[int], *, at_once: int, beside: bool) -> list[list[list[int]]]:
    """The members of each row of each run, at most ``at_once`` rows a run, from how many tokens each member has.

    ``beside`` each other members lie in rows of the length, up to twice the longest member's, that leaves the least
    room unused. Otherwise each has a row of its own, in a run of those that are as long.
    """
    order = sorted(range(len(lengths)), key=lambda member: -lengths[member])
    if beside:
        longest = max(lengths)
        widths = range(longest, 2 * longest + 1, max(1, longest // 32))
        _, rows = min((_filled(order, lengths, width) for width in widths), key=lambda each: each[0])
        return _parts(rows, at_once)
    alike = [list(group) for _, group in groupby(order, key=lengths.__getitem__)]
    return [[[each] for each in part] for group in alike for part in _parts(group, at_once)]


def _filled(order: Sequence[int], lengths: Sequence[int], width: int) -> tuple[int, list[list[int]]]:
    """Rows of the width, each member in the first that has room for it, and how many tokens they come to."""
    rows: list[list[int]] = []
    room: list[int] = []
    for member in order:
        fitting = (row for row, left in enumerate(room) if left >= lengths[member])
        if (row := next(fitting, None)) is None:
            row = len(rows)
            rows.append([])
            room.append(width)
        rows[row].append(member)
        room[row] -= lengths[member]
    return len(rows) * width, rows


def lie_beside(forward: Forward, inputs: ModelInputs) -> bool:
    """Whether the model can be told where each token stands and which others it sees."""
    mask = inputs.arguments.get("attention_mask")
    # Windows count places in a row, which holds earlier tokens and up to twice the longest member's own.
    return (
        "position_ids" in forward.names
        and takes_any_mask(forward.model, 3 * inputs.length)
        and (mask is None or mask.ndim == 2)
    )


def text_arguments(inputs: ModelInputs, forward: Forward) -> dict[str, Tensor]:
    """What the model's forward is given of the examples' tokens."""
    # Without a mask to look into, transformers need not wait for the accelerator.
    wanted = TEXT - {"attention_mask"} if inputs.unpadded else TEXT
    return {name: value for name, value in forward.arguments(inputs.arguments).items() if name in wanted}


def _parts(things: list[Any], size: int) -> list[list[Any]]:
    return [things[place : place + size] for place in range(0, len(things), size)]
