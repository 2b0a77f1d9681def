"""Rows: how members that begin at different tokens lie side by side in one run.

Tensor letters: B batch, S sequence, R rows of an example, W width of a row, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from itrain.architectures import unwrap
from itrain.inputs import ModelInputs
from itrain.networks.forward import accepts, forward_arguments, takes_any_mask
from itrain.networks.lanes import Edits, Lane
from itrain.networks.resume import TEXT, precision


class Rows:
    """A run of some members on the same examples, each from its own first token on.

    Each row of the run holds one or several members' tokens of one example, one member's after the other's. A token
    sees the tokens of its own member and, by their kept keys and values, those before the member's first.

    Args:
        inputs: the examples.
        members: the edits of each.
        starts: each one's first token.
        rows: the members in each of an example's rows.
    """

    def __init__(
        self, inputs: ModelInputs, members: Sequence[Edits], starts: Sequence[int], rows: Sequence[Sequence[int]]
    ) -> None:
        self.inputs, self.order = inputs, [member for row in rows for member in row]
        size, length = inputs.batch_size, inputs.length
        self.before = max(starts[member] for member in self.order)
        self.plain = all(starts[row[0]] == self.before and len(row) == 1 for row in rows)
        """Whether all rows hold the same tokens, so that models know by themselves which of them see which."""
        width = max(sum(length - starts[member] for member in row) for row in rows)
        # What is left over at the end of a row repeats the last token, which nothing sees.
        self.tokens = torch.full((len(rows), width), length - 1)
        self.lanes: list[Lane] = []
        self._cells: list[tuple[int, slice, int]] = []
        for number, row in enumerate(rows):
            column = 0
            for member in row:
                start, stop = starts[member], column + length - starts[member]
                self.tokens[number, column:stop] = torch.arange(start, length)
                self._cells.append((number, slice(column, stop), start))
                first, shift = number * size, start - column
                lane = Lane(inputs=inputs, edits=members[member], first=first, rows=len(rows) * size, shift=shift)
                self.lanes.append(lane)
                column = stop

    def places(self) -> Int[Tensor, "rows*batch width"]:
        """The places of the rows' tokens, counted within each example, on the CPU."""
        return (self.tokens[:, None] - self.inputs.extent[0][:, None]).flatten(0, 1)

    def arguments(self, model: nn.Module) -> dict[str, Tensor]:
        """What the model's forward is given besides keys and values."""
        given = text_arguments(self.inputs, model)
        mask = given.pop("attention_mask", None)
        if self.plain:
            arguments = {name: value[:, self.before :] for name, value in given.items()}
            if mask is not None:
                arguments["attention_mask"] = mask
            rows = len(self.tokens)
            return arguments if rows == 1 else {name: value.repeat(rows, 1) for name, value in arguments.items()}
        device = self.inputs.device
        places = torch.arange(self.inputs.length, device=device)
        given.setdefault("position_ids", places.expand(self.inputs.batch_size, -1))
        tokens = self.tokens.to(device, non_blocking=True)
        arguments = {name: value[:, tokens].transpose(0, 1).flatten(0, 1) for name, value in given.items()}
        visible = self._visible(mask).to(device, non_blocking=True)
        hidden = torch.finfo(precision(model)).min
        mask = torch.zeros(visible.shape, dtype=precision(model), device=device).masked_fill(~visible, hidden)
        return arguments | {"attention_mask": mask}

    def _visible(self, mask: Int[Tensor, "batch sequence"] | None) -> Bool[Tensor, "rows*batch 1 width keys"]:
        """Which of the earlier tokens and of its row's each token sees; ``mask`` says which are no padding."""
        starts, owners = torch.zeros_like(self.tokens), torch.full_like(self.tokens, -1)
        for owner, (row, columns, start) in enumerate(self._cells):
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
        return visible.expand(-1, self.inputs.batch_size, -1, -1).flatten(0, 1)[:, None]


@cache
def arranged(lengths: tuple[int, ...], *, at_once: int, beside: bool) -> list[list[list[int]]]:
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


def lie_beside(model: nn.Module, inputs: ModelInputs) -> bool:
    """Whether the model can be told where each token stands and which others it sees."""
    mask = inputs.arguments.get("attention_mask")
    return (
        accepts(unwrap(model), "position_ids")
        and takes_any_mask(model, inputs.length)
        and (mask is None or mask.ndim == 2)
    )


def text_arguments(inputs: ModelInputs, model: nn.Module) -> dict[str, Tensor]:
    """What the model's forward is given of the examples' tokens."""
    given = forward_arguments(unwrap(model), inputs.arguments)
    # Without a mask to look into, transformers need not wait for the accelerator.
    wanted = TEXT - {"attention_mask"} if inputs.unpadded else TEXT
    return {name: value for name, value in given.items() if name in wanted}


def _parts(things: list[Any], size: int) -> list[list[Any]]:
    return [things[place : place + size] for place in range(0, len(things), size)]
