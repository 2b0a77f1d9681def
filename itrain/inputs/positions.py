"""Positions: the token ranges that the terms of a position name, example by example, all on the CPU.

Tensor letters: B batch, P positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from itrain.inputs.texts import PositionError, Range, Written
from itrain.sites import POSITION_TERM, RESERVED, Site

Acts = Literal["prompt", "all", "generated"] | tuple[int, ...]
"""Tokens of a text that is continued: of the prompt, all, those that follow it, or these of the latter, from 0."""


class TokenIndices(NamedTuple):
    """The tokens that a position names, per example; ``valid`` is None where every example has all P of them."""

    index: Int[Tensor, "batch positions"]
    valid: Bool[Tensor, "batch positions"] | None


def token_ranges(
    site: Site,
    extent: Range,
    spans: Mapping[str, Int[Tensor, "batch 2"]],
    name: Callable[[int], str],
    written: Written | None = None,
) -> list[Range]:
    """The range of each term of the site's position; of a site without one, of all tokens.

    Args:
        site: the site.
        extent: the tokens that positions count.
        spans: named token spans as [start, stop).
        name: how messages speak of an example.
        written: the examples' texts; None: unknown.

    Raises:
        PositionError: a term does not exist in some example, has the name of a span besides its own meaning, or two
            terms name the same token.
    """
    first, end = extent
    ranges: list[Range] = []
    for term in site.terms or ("all",):
        match = POSITION_TERM.fullmatch(term)
        assert match is not None, "a site checks its terms"
        if match["text"]:
            start, stop = _edge(_text_range(match, extent, name, written, site), match["edge"])
        else:
            start, stop = _term_range(term, match, extent, spans, name, site)
        outside = ((start < first) | (stop > end) | (start >= stop)).nonzero()
        if len(outside):
            example = int(outside[0])
            has = f"{name(example)}, which has {int(end[example] - first[example])} tokens"
            raise PositionError(f"site '{site}': position '{term}' does not exist in {has}")
        for other, (begin, until) in zip(site.terms, ranges, strict=False):
            twice = (torch.maximum(start, begin) < torch.minimum(stop, until)).nonzero()
            if len(twice):
                raise PositionError(
                    f"site '{site}': '{other}' and '{term}' name the same token of {name(int(twice[0]))}, "
                    "which can be edited once only"
                )
        ranges.append((start, stop))
    return ranges


def generated_ranges(acts: Acts, follows: Range) -> list[Range]:
    """The ranges of tokens after the prompt that are meant; examples with fewer of them have empty ones.

    Args:
        acts: which tokens are meant.
        follows: the tokens after each prompt.
    """
    if acts == "prompt":
        return []
    if isinstance(acts, str):
        return [follows]
    first, end = follows
    return [(torch.minimum(first + step, end), torch.minimum(first + step + 1, end)) for step in acts]


def _text_range(
    match: re.Match[str], extent: Range, name: Callable[[int], str], written: Written | None, site: Site
) -> Range:
    place = f"site '{site}': position '{match[0]}'"
    if written is None:
        raise PositionError(
            f"{place} is a text, and the texts of these inputs are not known; name a span, first, last or an integer"
        )
    which = None if match["which"] is None else int(match["which"])
    return written.range(match["text"], which, extent, name, place)


def _edge(found: Range, edge: str | None) -> Range:
    start, stop = found
    return found if edge is None else (start, start + 1) if edge == "first" else (stop - 1, stop)


def _term_range(
    term: str,
    match: re.Match[str],
    extent: Range,
    spans: Mapping[str, Int[Tensor, "batch 2"]],
    name: Callable[[int], str],
    site: Site,
) -> Range:
    first, end = extent
    if term in spans and RESERVED.fullmatch(term) and site.terms:
        raise PositionError(
            f"site '{site}': the task names a span '{term}', which as a position means something else; rename the span"
        )
    if match["end"]:
        count = int(match["count"] or 1)
        return (first, first + count) if match["end"] == "first" else (end - count, end)
    if match["index"]:
        start = (first if int(term) >= 0 else end) + int(term)
        return start, start + 1
    if term == "all":
        return extent
    if match["span"] not in spans:
        span = match["span"]
        others = f"first, last, an integer, or a text of the prompt in double quotes: '\"{span}\"'"
        if not spans:
            who = name(0) if len(first) == 1 else "a text"
            raise PositionError(
                f"site '{site}': {who} names no span '{span}'; mark it in every typed text, '{{{span}=<its words>}}' "
                f"(what is attached is told with prompts=...), or use {others}"
            )
        raise PositionError(
            f"site '{site}': the task names no span '{span}' (it names: {', '.join(sorted(spans))}); or use {others}"
        )
    start, stop = spans[match["span"]].unbind(1)
    if match["edge"]:
        return (start, start + 1) if match["edge"] == "first" else (stop - 1, stop)
    return start, stop


def token_indices(ranges: Sequence[Range]) -> TokenIndices:
    """The tokens of the ranges, side by side; where an example has fewer than others, its first one stands in."""
    parts, masks = [], []
    for start, stop in ranges:
        offset = torch.arange(int((stop - start).max()))
        inside = offset < (stop - start)[:, None]
        parts.append(torch.where(inside, start[:, None] + offset, start[:, None]))
        masks.append(inside)
    index, valid = torch.cat(parts, 1), torch.cat(masks, 1)
    return TokenIndices(index, None if bool(valid.all()) else valid)


def token_slots(ranges: Sequence[Range]) -> tuple[Int[Tensor, "batch positions"], Int[Tensor, " batch"]]:
    """For each of ``token_indices``, which of the example's own tokens it is; and how many the example has."""
    count, slots = torch.zeros(len(ranges[0][0]), dtype=torch.long), []
    for start, stop in ranges:
        offset = torch.arange(int((stop - start).max()))
        slots.append(count[:, None] + offset * (offset < (stop - start)[:, None]))
        count = count + stop - start
    return torch.cat(slots, 1), count
