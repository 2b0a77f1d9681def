"""Lane: one member's part of a run that several share, and what is picked and replaced in it.

Tensor letters: B batch, S sequence, P positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from itrain.architectures import Location
from itrain.inputs import ModelInputs, TokenIndices
from itrain.layouts import REMEDY
from itrain.sites import Site

Edit = Callable[[Tensor], Tensor]
"""From the activation at a site, (B, P, D) or (B, D), to the one that takes its place."""

Edits = Sequence[tuple[Site, Edit]]
"""Act together, those of one activation in the order given, each on the result of those before it."""


class Cells(NamedTuple):
    """The index of a lane's features in an activation; ``tokens`` is None where all of its tokens are meant."""

    index: tuple[Any, ...]
    tokens: TokenIndices | None


@dataclass(frozen=True, kw_only=True)
class Lane:
    """Examples in rows of their own of a run, with the edits that act on them.

    Args:
        inputs: the examples.
        rows: how many the whole run has.
        edits: what acts on the examples.
        first: the first of their rows.
        shift: how much farther to the left the examples' tokens lie in the rows; None: the rows hold all of them.
    """

    inputs: ModelInputs
    rows: int
    edits: Edits = ()
    first: int = 0
    shift: int | None = None

    def pick(self, activation: Tensor, site: Site, location: Location) -> tuple[Tensor, Cells]:
        """The features at the site, at least fp32, and where they lie.

        Raises:
            ValueError: the activation has no rows of examples, or no positions.
        """
        size, tokens = self.inputs.batch_size, None
        index: tuple[Any, ...] = (...,)
        if site.position is not None or not (self.inputs.all_own or self._is_whole(activation)):
            if activation.ndim != 3 or len(activation) != self.rows:
                raise self._unplaced(activation, site)
            tokens = self.inputs.indices(site, activation.shape[1] if self.shift is None else self.inputs.length)
            if self.shift is not None:
                tokens = TokenIndices(tokens.index - self.shift, tokens.valid)
            index = torch.arange(self.first, self.first + size, device=activation.device)[:, None], tokens.index
        elif self.rows != size:
            if len(activation) != self.rows:
                raise ValueError(
                    f"site '{site}': the activation there has shape {tuple(activation.shape)} in a run of {self.rows} "
                    "examples, so that members cannot share the run; fit them apart"
                )
            index = (slice(self.first, self.first + size),)
        picked = activation[index]
        if location.columns is not None:
            picked = picked[..., location.columns]
        return picked.to(torch.promote_types(picked.dtype, torch.float32)), Cells(index, tokens)

    def _is_whole(self, activation: Tensor) -> bool:
        """Whether an activation of padded texts has no padding: it is one of each example, or of the answers alone."""
        answer = self.inputs.answer
        answers = 0 if answer is None else answer.shape[1] if answer.ndim > 1 else 1
        one = activation.ndim == 2 or (activation.ndim == 3 and activation.shape[1] == answers != self.inputs.length)
        return one and len(activation) == self.rows

    def _unplaced(self, activation: Tensor, site: Site) -> ValueError:
        """The error of an activation in which no token can be found."""
        seen = f"site '{site}': the activation there has shape {tuple(activation.shape)}"
        if site.position is None:
            return ValueError(
                f"{seen}, in which padding cannot be told from text; take texts of equal length, or name a module "
                f"whose activation is ({self.rows}, tokens, features)"
            )
        remedy = "leave the position out" + (f", or {REMEDY}" if activation.ndim > 3 else "")
        return ValueError(f"{seen}, so it has no positions in ({self.rows}, tokens, features); {remedy}")

    def replace(self, activation: Tensor, cells: Cells, location: Location, new: Tensor) -> Tensor:
        """The activation with the features in these cells replaced, out of place."""
        tokens = cells.tokens
        if location.columns is not None:
            whole = activation[cells.index].clone()
            whole[..., location.columns] = new
            new = whole
        if tokens is None:
            # The edit may hand on the source itself, which a later module that works in place must not overwrite.
            new = new.clone(memory_format=torch.contiguous_format)
            return new if cells.index == (...,) else activation.slice_scatter(new, 0, self.first, self.first + len(new))
        if tokens.valid is None:
            return activation.index_put(cells.index, new)
        # Slots that an example lacks are written to a token past the end, which is cut off again.
        length = activation.shape[1]
        index = tokens.index.masked_fill(~tokens.valid, length)
        longer = torch.cat([activation, activation[:, :1]], 1).index_put((cells.index[0], index), new)
        return longer[:, :length].contiguous()
