"""The keys of a run: each argument of each part that some words compose, with its value and what it is."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from itrain.owned import WRITTEN
from itrain.sources import Source, plain, source_of

USUAL: Mapping[str, str] = {"hidden_size": "features of the activation.", "rank": "dimensions of the subspace."}
"""What arguments are wherever a docstring does not say it."""
_COLUMNS, _KEYS = 80, 34
_TARGET, _PARTIAL = "_target_", "_partial_"
_SENTENCE = re.compile(r"(?<=[.;])\s+(?=[A-Z])")


def key_lines(words: Sequence[str], *, sweeps: bool) -> Iterator[str]:
    """A line for each part of the run that the words compose, and below it one for each of its keys.

    Raises:
        ConfigError: the words compose no run.
    """
    from omegaconf import OmegaConf

    from itrain import config

    composed = OmegaConf.to_container(config.request(words, sweeps=sweeps))
    assert isinstance(composed, dict)
    yield f"keys of {' '.join(words)}"
    for part, node in composed.items():
        if isinstance(node, Mapping) and (_TARGET in node or part == "sweep"):
            yield ""
            yield from _part(str(part), node)
    yield ""
    yield "itrain explain <class> says more of each key; itrain list <part> the choices."


def _part(key: str, node: Mapping[str, Any]) -> Iterator[str]:
    """A part or an argument that is built itself, and its keys."""
    target = str(node.get(_TARGET, ""))
    source = source_of(target) if target else None
    title = f"{key} ({target.rpartition('.')[2]})" if target else key
    about = f"{title}: {source.sentence}" if source and source.doc else title
    yield from textwrap.wrap(about, _COLUMNS, subsequent_indent="  ")
    for name, value in node.items():
        if name in (_TARGET, _PARTIAL) or name in WRITTEN.get(key, ()):
            continue
        if isinstance(value, Mapping) and value:
            yield from _part(f"{key}.{name}", value)
        else:
            yield from _key(f"  {key}.{name}={_as_word(value)}", _said(source, str(name)))


def _key(word: str, says: str) -> Iterator[str]:
    """The word, and what it says in a column of its own: beside it, or below where it is long."""
    lines = textwrap.wrap(says, _COLUMNS - _KEYS) or [""]
    if len(word) >= _KEYS and says:
        yield word
    else:
        yield f"{word:{_KEYS}}{lines.pop(0)}".rstrip()
    yield from (" " * _KEYS + line for line in lines)


def _said(source: Source | None, name: str) -> str:
    found = next((each.says for each in source.arguments if each.name == name), "") if source else ""
    return _SENTENCE.split(plain(found or USUAL.get(name, "")))[0]


def _as_word(value: object) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str).replace('"', "")
