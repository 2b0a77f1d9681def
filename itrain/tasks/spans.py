"""Spans of a text that somebody else has written: said by their text, or by their characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from itrain.sites import POSITION_TERM
from itrain.tasks import TaskError
from itrain.tasks.tokens import Range
from itrain.trust import shown

FORMS = 'a text that stands in it once, ["text", which one, from 1], or [first character from 0, one past the last]'


def characters(text: str, said: Any) -> Range:
    """The first character of a span and one past its last, where ``said`` is one of ``FORMS``.

    Raises:
        TaskError: the text has no such span, or has it several times.
    """
    if isinstance(said, str):
        return _found(text, said, None)
    parts = list(said) if isinstance(said, Sequence) else []
    if len(parts) == 2 and type(parts[1]) is int:
        if isinstance(parts[0], str):
            return _found(text, parts[0], parts[1])
        if type(parts[0]) is int:
            return _between(text, parts[0], parts[1])
    raise TaskError(f"a span is {FORMS}, not {shown(said)}")


def all_characters(text: str, said: Mapping[str, Any]) -> dict[str, Range]:
    """The characters of each span by name.

    Raises:
        TaskError: a name means something else in a site, or the text has no such span; naming it.
    """
    found = {}
    for name, each in said.items():
        position = POSITION_TERM.fullmatch(name)
        if name == "all" or not position or not position["span"] or position["edge"]:
            why = "already names tokens by their place" if position else "is no name of a position"
            raise TaskError(
                f"the span '{name}': '@{name}' {why}; use lower-case letters, digits and _, as in 'subject'"
            )
        try:
            found[name] = characters(text, each)
        except TaskError as error:
            raise TaskError(f"the span '{name}': {error}") from error
    return found


def _found(text: str, part: str, which: int | None) -> Range:
    places = _places(text, part)
    if not places:
        raise TaskError(f"there is no {shown(part)} in {shown(text)}")
    if which is None and len(places) > 1:
        raise TaskError(f'{shown(part)} stands {len(places)} times in {shown(text)}; write ["{part}", 1] for the first')
    if which is not None and not 1 <= which <= len(places):
        raise TaskError(f"there is no {shown(part)} number {which} in {shown(text)}, which has it {len(places)} times")
    start = places[(which or 1) - 1]
    return start, start + len(part)


def _places(text: str, part: str) -> list[int]:
    if not part.strip():
        raise TaskError("its text is empty; leave it out, or name a part of the text")
    return [place for place in range(len(text)) if text.startswith(part, place)]


def _between(text: str, start: int, stop: int) -> Range:
    if not 0 <= start < stop <= len(text):
        raise TaskError(f"[{start}, {stop}] is no part of {shown(text)}, which has {len(text)} characters")
    if not text[start:stop].strip():
        raise TaskError(f"[{start}, {stop}] of {shown(text)} is only space")
    return start, stop
