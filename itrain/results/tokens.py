"""The tokens at a sweep's positions in one example, as labels for its pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from itrain.files import write_json
from itrain.inputs import ModelInputs
from itrain.sites import Site
from itrain.trust import read_json

TOKENS = "tokens.json"


class Tokenizer(Protocol):
    """What transformers' tokenizers do."""

    def decode(self, token_ids: list[int]) -> Any:
        """The text of some tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class Example:
    """A text and its tokens at each position, quoted; empty where a sweep has left none."""

    text: str = ""
    tokens: Mapping[str, str] = field(default_factory=dict)


def save_tokens(inputs: ModelInputs, sites: Sequence[Site], tokenizer: Tokenizer | None, folder: Path) -> None:
    """Write the first example's tokens at the sites' positions to ``tokens.json``; nothing for a model without text."""
    if tokenizer is None or inputs.texts is None:
        return
    row = inputs.arguments["input_ids"][0].cpu()
    tokens: dict[str, str] = {}
    for site in sites:
        # All tokens are the text itself, which stands beside them.
        if site.position not in (None, "all") and site.position not in tokens:
            index, valid = (None if each is None else each[0].cpu() for each in inputs.indices(site, inputs.length))
            assert index is not None, "a site with a position has tokens"
            tokens[site.position] = str(tokenizer.decode(row[index if valid is None else index[valid]].tolist()))
    found = {"text": inputs.texts[0], "tokens": tokens}
    write_json(folder / TOKENS, found)


def read_tokens(folder: Path) -> Example:
    """The example that a sweep has left in its folder.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / TOKENS
    if not file.is_file():
        return Example()
    found = read_json(file)
    named = found.get("tokens") if isinstance(found, dict) else None
    if not isinstance(named, dict) or not all(isinstance(each, str) for each in (found.get("text"), *named.values())):
        raise ValueError(f"'{file}' is damaged: it holds no text with its tokens")
    # Spaces around a word are left out; a token of spaces alone is shown as it is.
    quoted = {position: json.dumps(token.strip() or token, ensure_ascii=False) for position, token in named.items()}
    return Example(text=found["text"], tokens=quoted)
