"""Where a text stands among an example's tokens.

Tensor letters: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

Range = tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]
"""First token and one past the last, per example."""
SHOWN = 40
"""How many tokens a message shows of an example."""


class PositionError(ValueError):
    """A position does not exist in an example."""


class Written(NamedTuple):
    """The texts of examples, and the characters of them that each token covers, on the CPU; of none an empty range."""

    texts: Sequence[str]
    characters: Int[Tensor, "batch sequence 2"]

    def range(self, text: str, which: int | None, extent: Range, name: Callable[[int], str], place: str) -> Range:
        """The tokens that spell a text within the extent, in each example.

        Args:
            text: what is looked for. It begins and ends where tokens do, spaces aside.
            which: which of several occurrences, counted from either end; None: there is one.
            extent: the tokens that are searched.
            name: how messages speak of an example.
            place: what messages begin with: the site and the position.

        Raises:
            PositionError: an example does not have the text, or has it several times and none is chosen.
        """
        found = []
        for example, (start, stop) in enumerate(zip(*(each.tolist() for each in extent), strict=True)):
            tokens = self._tokens(example, start, stop)
            ranges = [(start + first, start + end) for first, end in _spelling(text, self.texts[example], tokens)]
            if not ranges:
                raise PositionError(f"{place} is not in {name(example)}; {self._split(example, tokens)}")
            if which is None and len(ranges) > 1:
                places = ", ".join(str(first - start) for first, _ in ranges)
                raise PositionError(
                    f"{place} stands {len(ranges)} times in {name(example)}, at tokens {places}; choose one, for "
                    f"example '\"{text}\"[0]' or '\"{text}\"[-1]'"
                )
            if not -len(ranges) <= (which or 0) < len(ranges):
                times = "once" if len(ranges) == 1 else f"{len(ranges)} times"
                raise PositionError(f"{place} does not exist: the text stands {times} in {name(example)}")
            found.append(ranges[which or 0])
        starts, stops = torch.tensor(found).unbind(1)
        return starts, stops

    def _tokens(self, example: int, start: int, stop: int) -> list[tuple[int, int]]:
        """The characters of each token, without spaces at their ends."""
        text, found = self.texts[example], []
        for begin, end in self.characters[example, start:stop].tolist():
            inside = text[begin:end]
            if inside.strip():
                begin, end = begin + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())
            found.append((begin, end))
        return found

    def _split(self, example: int, tokens: Sequence[tuple[int, int]]) -> str:
        text = self.texts[example]
        shown = [text[begin:end] for begin, end in tokens if begin < end]
        rest = " ..." if len(shown) > SHOWN else ""
        return f"its tokens are {' | '.join(shown[:SHOWN])}{rest}"


def _spelling(text: str, whole: str, tokens: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The token ranges that spell the text, each from the token with its first character to that with its last."""
    wanted, found = text.strip() or text, []
    begins: dict[int, int] = {}
    for token, (begin, end) in enumerate(tokens):
        # Tokens share a character of several bytes. One of a single byte is claimed, too, by a token of nothing but the
        # space that some tokenizers put before every text.
        if begin < end and (begin not in begins or whole[begin].isascii()):
            begins[begin] = token
    ends = {end: token + 1 for token, (begin, end) in enumerate(tokens) if begin < end}
    at = whole.find(wanted)
    while at >= 0:
        if at in begins and at + len(wanted) in ends:
            found.append((begins[at], ends[at + len(wanted)]))
        at = whole.find(wanted, at + 1)
    return found
