"""Lane: one member's part of a run that several share, and what is picked and replaced in it.

Tensor letters: B batch, S sequence, P positions, A answers, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from itrain.architectures import Location
from itrain.inputs import ModelInputs, TokenIndices
from itrain.sites import Site

Edit = Callable[[Tensor], Tensor]
"""From the activation at a site, (B, P, D) or (B, D), to the one that takes its place."""

Edits = Sequence[tuple[Site, Edit]]
"""Act together, those of one activation in the order given, each on the result of those before it."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """Examples in rows of their own of a run, with the edits that act on them.

    Args:
        inputs: the examples.
        edits: what acts on them.
        first: the first of the rows.
        rows: how many the whole run has.
        shift: how much farther to the left the examples' tokens lie in the rows; None: the rows hold all of them.
    """

    inputs: ModelInputs
    edits: Edits = ()
    first: int = 0
    rows: int
    shift: int | None = None

    @classmethod
    def alone(cls, inputs: ModelInputs, edits: Edits = ()) -> Lane:
        """The lane that takes up all of a run."""
        return cls(inputs=inputs, edits=edits, rows=inputs.batch_size)

    def pick(self, activation: Tensor, site: Site, location: Location) -> Tensor:
        """The site's features at its tokens, at least fp32."""
        activation = activation[self._at(self._tokens(activation, site), activation)]
        if location.columns is not None:
            activation = activation[..., location.columns]
        return activation.to(torch.promote_types(activation.dtype, torch.float32))

    def replace(self, activation: Tensor, site: Site, location: Location, new: Tensor) -> Tensor:
        """The activation with these features replaced, out of place."""
        tokens = self._tokens(activation, site)
        at = self._at(tokens, activation)
        if location.columns is not None:
            whole = activation[at].clone()
            whole[..., location.columns] = new
            new = whole
        if tokens is None:
            # The edit may hand on the source itself, which a later module that works in place must not overwrite.
            new = new.clone(memory_format=torch.contiguous_format)
            return new if self._whole else activation.slice_scatter(new, 0, self.first, self.first + len(new))
        if tokens.valid is None:
            return activation.index_put(at, new)
        # Slots that an example lacks are written to a token past the end, which is cut off again.
        length = activation.shape[1]
        index = tokens.index.masked_fill(~tokens.valid, length)
        longer = torch.cat([activation, activation[:, :1]], 1).index_put((at[0], index), new)
        return longer[:, :length].contiguous()

    @property
    def _whole(self) -> bool:
        return self.rows == self.inputs.batch_size

    def _tokens(self, activation: Tensor, site: Site) -> TokenIndices | None:
        if site.position is None:
            if not self._whole and len(activation) != self.rows:
                raise ValueError(
                    f"site '{site}': the activation there has shape {tuple(activation.shape)} in a run of {self.rows} "
                    "examples, so that members cannot share the run; fit them apart"
                )
            return None
        if activation.ndim < 3 or len(activation) != self.rows:
            raise ValueError(
                f"site '{site}': the activation there has shape {tuple(activation.shape)}, so it has no positions in "
                f"({self.rows}, tokens, features); leave the position out"
            )
        if self.shift is None:
            return self.inputs.indices(site, activation.shape[1])
        index, valid = self.inputs.indices(site, self.inputs.length)
        return TokenIndices(index - self.shift, valid)

    def _at(self, tokens: TokenIndices | None, activation: Tensor) -> tuple[Any, ...]:
        """The index of the lane's tokens, all that it has or those given, in an activation."""
        rows = slice(self.first, self.first + self.inputs.batch_size)
        if tokens is None:
            return (...,) if self._whole else (rows,)
        return torch.arange(rows.start, rows.stop, device=activation.device)[:, None], tokens.index


def answers(lanes: Sequence[Lane]) -> tuple[Tensor, Tensor] | None:
    """The rows and tokens that answer in a run, (lanes * B, 1) and (lanes * B, A); None where all its output does."""
    found = [lane.inputs.answer for lane in lanes]
    if any(each is None for each in found):
        return None
    rows = [torch.arange(lane.first, lane.first + lane.inputs.batch_size) for lane in lanes]
    shifts = [lane.shift or 0 for lane in lanes]
    tokens = [each.view(len(each), -1) - shift for each, shift in zip(found, shifts, strict=True) if each is not None]
    return torch.cat(rows)[:, None].to(tokens[0].device, non_blocking=True), torch.cat(tokens)
