"""Edits, and the lane of a run in which they act: what is picked of an activation, and what is replaced in it.

Tensor letters: B batch, S sequence, P positions, G generated tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.architectures import Location
from itrain.inputs import Acts, ModelInputs, TokenIndices
from itrain.inputs.layout import text_lengths
from itrain.layouts import REMEDY
from itrain.sites import Site

Edit = Callable[[Tensor], Tensor]
"""From the activation at a site, (B, P, D) or (B, D), to the one that takes its place."""

EditGenerated = Callable[[Float[Tensor, "batch generated hidden"], Sequence[int]], Tensor]
"""The same for generated tokens, (B, G, D), given which steps they are."""


class EditAt(NamedTuple):
    """An edit at a site, and when it acts.

    ``prompt``: on the tokens of the prompt that the site's position names. ``generated``: on every generated token,
    whatever the position; a response that follows a prompt counts as generated. ``all``: on both. Several numbers: on
    these generated tokens, counted from 0. What is generated before a token is never changed by an edit of it.
    """

    site: Site
    edit: Edit
    acts: Acts = "prompt"
    generated: EditGenerated | None = None
    """What edits generated tokens; None: ``edit``, which is then given them beside those of the prompt."""

    @property
    def parts(self) -> tuple[EditAt, ...]:
        """Itself, or an edit of the prompt and one of generated tokens where different functions make them."""
        generated = self.generated
        if generated is None or self.acts == "prompt":
            return (self,)
        prompt = (EditAt(self.site, self.edit),) if self.acts == "all" else ()
        acts = "generated" if self.acts == "all" else self.acts

        def edit(base: Tensor) -> Tensor:
            steps = range(base.shape[1]) if isinstance(acts, str) else sorted(acts)[: base.shape[1]]
            return generated(base, steps)

        return (*prompt, EditAt(self.site, edit, acts))


Edits: TypeAlias = Sequence[EditAt | tuple[Site, Edit]]
"""Act together, those of one activation in the order given, each on the result of those before it."""


def require_acts(acts: object) -> Acts:
    """When an edit acts, with steps as a tuple.

    Raises:
        ValueError: it is no such word, and no list of steps.
    """
    if isinstance(acts, str) and acts in ("prompt", "all", "generated"):
        return acts  # type: ignore[return-value]
    steps: list[Any] = [acts] if isinstance(acts, int) else list(acts) if isinstance(acts, Sequence) else []
    if isinstance(acts, str) or not steps or not all(type(step) is int and step >= 0 for step in steps):
        raise ValueError(
            f"acts={acts!r}: use 'prompt', 'all', 'generated', or the generated tokens, counted from 0, as in [0, 2]"
        )
    return tuple(sorted(set(steps)))


def in_words(acts: Acts) -> str:
    """When an edit acts, for a line on the screen."""
    return acts if isinstance(acts, str) else f"steps {', '.join(map(str, acts))}"


def require_strength(strength: object) -> float:
    """How much of an edit's effect is applied, as a number.

    Raises:
        ValueError: it is none, or not finite.
    """
    if not isinstance(strength, int | float) or isinstance(strength, bool) or not math.isfinite(strength):
        raise ValueError(f"strength={strength!r}: give a number; 1 is the edit as it is, and 0 none")
    return float(strength)


def scaled(edit: Edit, strength: float) -> Edit:
    """The edit with so much of its effect: base + strength * (edit(base) - base)."""
    return edit if strength == 1 else lambda base: base + strength * (edit(base) - base)


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

    def pick(self, activation: Tensor, site: Site, location: Location, acts: Acts = "prompt") -> tuple[Tensor, Cells]:
        """The features at the site, at least fp32, and where they lie.

        Raises:
            ValueError: the activation has no rows of examples, or no positions.
        """
        size, tokens = self.inputs.batch_size, None
        index: tuple[Any, ...] = (...,)
        whole = acts == "prompt" and site.position is None and (self.inputs.all_own or self._is_whole(activation))
        if not whole:
            if activation.ndim != 3 or len(activation) != self.rows:
                raise self._unplaced(activation, site)
            length = activation.shape[1] if self.shift is None else self.inputs.length
            tokens = self.inputs.indices(site, length, acts)
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
        lengths = {self.inputs.length, *text_lengths(self.inputs.arguments)}
        one = activation.ndim == 2 or (activation.ndim == 3 and activation.shape[1] == answers not in lengths)
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


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Generated tokens in a run of some of a text's last tokens; they lie in the same columns in every row.

    Args:
        columns: where they lie in the run.
        count: how many tokens the run has.
        rows: how many rows it has.
    """

    columns: tuple[int, ...]
    count: int
    rows: int

    def pick(
        self, activation: Tensor, site: Site, location: Location, acts: Acts = "generated"
    ) -> tuple[Tensor, Cells]:
        """The features at the tokens, at least fp32, and where they lie.

        Raises:
            ValueError: the activation has not the run's tokens.
        """
        if activation.ndim != 3 or activation.shape[1] != self.count:
            raise ValueError(
                f"site '{site}': the activation there has shape {tuple(activation.shape)} in a run of {self.count} "
                "tokens, so that a generated token cannot be told in it; name a site in the residual stream, such as "
                "layer0.block_output, or edit the prompt alone (acts='prompt')"
            )
        index = (...,) if len(self.columns) == self.count else (slice(None), list(self.columns))
        picked = activation[index]
        if location.columns is not None:
            picked = picked[..., location.columns]
        return picked.to(torch.promote_types(picked.dtype, torch.float32)), Cells(index, None)

    def replace(self, activation: Tensor, cells: Cells, location: Location, new: Tensor) -> Tensor:
        """The activation with the features at the tokens replaced, out of place."""
        if location.columns is not None:
            whole = activation[cells.index].clone()
            whole[..., location.columns] = new
            new = whole
        if cells.index == (...,):
            return new.clone(memory_format=torch.contiguous_format)
        replaced = activation.clone()
        replaced[cells.index] = new
        return replaced
