"""Texts as a tokenizer sees them: filled templates, special tokens, unknown words, and the tokens of each field."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations, groupby
from operator import itemgetter
from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple

from itrain.inputs import ModelInputs
from itrain.sites import POSITION_TERM
from itrain.tasks import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDS = 6
"""How many tokens are shown of the end of a text."""
Range = tuple[int, int]
"""The first character or token, and one past the last."""
SPACES = " \u2581\u0120"
"""How tokenizers write a space: as it is, as SentencePiece does, and as byte-level ones do."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte of a character that SentencePiece's vocabulary lacks."""
SHOWN = 8, 32
"""How many tokens of a long prompt are shown, from its start and from its end."""


class Encoded(NamedTuple):
    """The tokens of a text, and those that the tokenizer itself puts before and after it."""

    before: Sequence[int]
    tokens: Sequence[int]
    after: Sequence[int]
    offsets: Sequence[Range]
    """The characters of each token of the text."""


def fill(template: str, setting: Mapping[str, Any]) -> tuple[str, dict[str, Range]]:
    """The text of a template, as ``str.format`` makes it, and the range of each field in it, in characters.

    Raises:
        TaskError: a field is no variable, stands twice, or has the name of another position.
    """
    text, fields = "", {}
    for literal, field, spec, conversion in _parts(template):
        text += literal
        if field is not None:
            if field not in setting:
                raise TaskError(
                    f"template {template!r}: there is no variable '{field}'; there are {', '.join(setting)}"
                )
            value = Formatter().convert_field(setting[field], conversion)
            written = format(value, spec.format_map(setting))
            fields[field] = (len(text), len(text) + len(written))
            text += written
    return text, fields


@lru_cache(maxsize=1024)
def _parts(template: str) -> list[tuple[str, str | None, str, str | None]]:
    parts = [(literal, field, spec or "", conversion) for literal, field, spec, conversion in _parsed(template)]
    names = [field for _, field, _, _ in parts if field is not None]
    for name in names:
        position = POSITION_TERM.fullmatch(name)
        if name == "all" or (position and not position["span"]):
            raise TaskError(
                f"template {template!r}: '@{name}' already names tokens by their place; rename the variable '{name}'"
            )
        if names.count(name) > 1:
            raise TaskError(
                f"template {template!r} has {{{name}}} twice, so '@{name}' names no one place; write one of them as "
                f"another variable, with the mechanism lambda {name}: {name}"
            )
    return parts


def _parsed(template: Any) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(Formatter().parse(template))
    except (TypeError, ValueError) as error:
        raise TaskError(f"template {template!r} is no format string: {error}") from error


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    """The texts' tokens; special tokens are those that the tokenizer adds, none twice where the text has them already.

    Raises:
        TaskError: the tokenizer changes a text's own tokens where it adds special ones, or a text is none.
    """
    for text in texts:
        _require_unicode(text)
    own = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    found = []
    for text, whole, tokens, offsets in zip(
        texts, tokenizer(list(texts))["input_ids"], own["input_ids"], own["offset_mapping"], strict=True
    ):
        extra = len(whole) - len(tokens)
        start = next((at for at in range(extra, -1, -1) if whole[at : at + len(tokens)] == tokens), None)
        if start is None:
            raise TaskError(f"{type(tokenizer).__name__} splits {text!r} differently where it adds special tokens")
        before, after = whole[:start], whole[start + len(tokens) :]
        # As a chat template does, which writes them itself.
        before = [] if tokens[: len(before)] == before else before
        after = [] if after and tokens[-len(after) :] == after else after
        found.append(Encoded(before, tokens, after, _own_characters(tokenizer, text, tokens, offsets)))
    return found


def _own_characters(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: Sequence[int], offsets: Sequence[Range]
) -> list[Range]:
    """The characters of each token, where SentencePiece says others.

    A token that is nothing but the space which it puts before a text is by its offsets the text's first character, and
    each byte of neighbouring characters that the vocabulary lacks is all of them.
    """
    pieces, place = tokenizer.convert_ids_to_tokens(list(tokens)), 0
    found = [
        (start, start) if text[start:stop].strip(SPACES) and not piece.strip(SPACES) else (start, stop)
        for piece, (start, stop) in zip(pieces, offsets, strict=True)
    ]
    for (start, stop), run in groupby(zip(offsets, pieces, strict=True), key=itemgetter(0)):
        several = [BYTE.fullmatch(piece) for _, piece in run]
        if stop - start > 1 and all(several):
            characters = [start + at for at, each in enumerate(text[start:stop]) for _ in each.encode()]
            if bytes(int(each[1], 16) for each in several if each) == text[start:stop].encode():
                found[place : place + len(several)] = [(at, at + 1) for at in characters]
        place += len(several)
    return found


def _require_unicode(text: str) -> None:
    """Refuse what no tokenizer takes: half a character, as a byte that is no UTF-8 on a command line becomes.

    Raises:
        TaskError: naming the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TaskError(f"the text {text[:80]!r} is no Unicode: it has {text[error.start]!r}") from error


def continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that follows another, without the space that some tokenizers put before every text."""
    _require_unicode(text)
    lead, led, alone = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in ("\n", f"\n{text}", text))
    return led[len(lead) :] if led[: len(lead)] == lead else alone


def unknown_words(tokenizer: PreTrainedTokenizerBase, text: str, encoded: Encoded) -> Iterator[str]:
    """What of the text the vocabulary does not have: it becomes the unknown token, or is left out."""
    end = 0
    for token, (start, stop) in zip(encoded.tokens, encoded.offsets, strict=True):
        if _is_text(text[end:start]):
            yield text[end:start].strip()
        written = text[start:stop].strip() or text[start:stop]
        if token == tokenizer.unk_token_id and written != tokenizer.unk_token:
            yield written
        end = max(end, stop)
    if _is_text(text[end:]):
        yield text[end:].strip()


def _is_text(left_out: str) -> bool:
    """Whether letters, digits or symbols such as emoji are left out, not only what a tokenizer splits at."""
    return any(kind[0] in "LN" or kind == "So" for kind in map(unicodedata.category, left_out))


def answer_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, output: str, separator: str) -> list[int]:
    """The tokens that stand for an answer after a prompt that ends in no space, or in place of its mask.

    Raises:
        TaskError: the answer has unknown words, changes how the prompt is split, or is too long for a mask.
    """
    mask = tokenizer.mask_token
    masked = isinstance(mask, str) and mask in prompt
    parted = prompt if prompt[-1:].isspace() else f"{prompt}{separator}"
    text = prompt.replace(str(mask), output) if masked else f"{parted}{output}"
    before, after = encode(tokenizer, [prompt, text])
    place = before.tokens.index(tokenizer.mask_token_id) if masked else len(before.tokens)
    head, tail = before.tokens[:place], before.tokens[place + 1 :]
    tokens = list(after.tokens[place : len(after.tokens) - len(tail)])
    why = ""
    if unknown := next(unknown_words(tokenizer, text, after), ""):
        why = f"'{unknown}' is unknown" + ("" if unknown.strip() else "; set the task's separator to ''")
    elif not tokens or [*head, *tokens, *tail] != list(after.tokens):
        ends = [" | ".join(tokenizer.convert_ids_to_tokens(list(each.tokens[-ENDS:]))) for each in (before, after)]
        hint = "; let the prompt end without a space" * prompt.endswith(" ")
        why = f"together they are split in another way (it ends in {ends[0]}, they in {ends[1]}){hint}"
    elif masked and len(tokens) > 1:
        why = f"it is {len(tokens)} tokens, and a mask stands for one"
    if why:
        raise TaskError(f"the answer {output!r} is no continuation of {prompt!r} in the model's vocabulary: {why}")
    return tokens


def answer_place(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> int:
    """The token at which the answer is read: the mask, or the last one of the prompt."""
    mask = tokenizer.mask_token_id
    masks = [] if mask is None else [place for place, token in enumerate(encoded.tokens) if token == mask]
    if len(masks) > 1:
        raise TaskError(f"a prompt has {len(masks)} masks ({tokenizer.mask_token}); an answer stands for one")
    place = len(encoded.before) + (masks[0] if masks else len(encoded.tokens) - 1)
    if place < 0:
        raise TaskError("a prompt is empty, so there is no token to answer at; write one, or leave its row out")
    return place


def spans(
    tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Range], encoded: Encoded, text: str
) -> dict[str, Range]:
    """The tokens of each field of a text, as [start, stop) among the text's own.

    Raises:
        TaskError: no token covers a field, one covers two of them, or the tokens there spell something else.
    """
    offsets = encoded.offsets
    found = {name: _tokens_of(characters, offsets, text) for name, characters in fields.items()}
    for (one, (start, stop)), (other, (begin, until)) in combinations(found.items(), 2):
        first = max(start, begin)
        if first < min(stop, until):
            token = text[slice(*offsets[first])].strip()
            raise TaskError(
                f"'@{one}' and '@{other}' are the same token, '{token}' of {text!r}; part them with a space in the "
                "template, or make them one variable"
            )
    for name, (start, stop) in found.items():
        _require_spelled(tokenizer, name, text[slice(*fields[name])], tuple(encoded.tokens[start:stop]))
    return found


def _words(text: str) -> str:
    """The letters and digits of a text; all of one that has none."""
    return "".join(filter(str.isalnum, text)) or text


@lru_cache(maxsize=4096)
def _require_spelled(tokenizer: PreTrainedTokenizerBase, name: str, written: str, tokens: tuple[int, ...]) -> None:
    """Refuse tokens that do not spell a field: offsets are off where a normaliser says wrongly what it has replaced.

    A first or last token may hold more than the field, but none may hold nothing of it.
    """
    if getattr(tokenizer.backend_tokenizer, "decoder", None) is None:
        return
    wanted = _letters(written)
    whole, *less = (_letters(_decoded(tokenizer, part)) for part in (tokens, tokens[1:], tokens[:-1]))
    # Quotation marks and dashes may be replaced by others.
    known = _words(wanted) in _words(whole)
    if not known or (len(tokens) > 1 and wanted and any(wanted in part for part in less)):
        pieces, spelt = " | ".join(tokenizer.convert_ids_to_tokens(list(tokens))), _decoded(tokenizer, tokens)
        raise TaskError(
            f"'@{name}' is {written!r}, and {type(tokenizer).__name__} says that its tokens are {pieces}, which spell "
            f"{spelt!r}; write it in another way, or name the tokens by their places"
        )


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    # WordPiece marks a part of a word where nothing stands before it.
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)).removeprefix("##")


def _letters(text: str) -> str:
    """A text as it may be told from others by any tokenizer: without accents, capitals and spaces."""
    plain = "".join(each for each in unicodedata.normalize("NFKD", text) if unicodedata.category(each) != "Mn")
    return "".join(unicodedata.normalize("NFKD", plain.casefold()).split())


def _tokens_of(characters: Range, offsets: Sequence[Range], text: str) -> Range:
    """The first token that overlaps the characters, spaces at their ends left out, and one past the last."""
    start, stop = characters
    written = text[start:stop]
    if written.strip():
        start, stop = start + len(written) - len(written.lstrip()), stop - len(written) + len(written.rstrip())
    inside = [token for token, (begin, end) in enumerate(offsets) if begin < stop and end > start]
    if not inside:
        raise TaskError(f"no token covers {written!r} in {text!r}")
    return inside[0], inside[-1] + 1


def shown(tokenizer: PreTrainedTokenizerBase, inputs: ModelInputs, answer: str | None = None) -> dict[str, str]:
    """How the first of the inputs is split into tokens, with its answer and its spans, as lines by name."""
    assert inputs.tokens is not None, "texts have tokens"
    ids = inputs.arguments["input_ids"][0].tolist()
    start, stop = inputs.tokens[0].tolist()
    head, tail = SHOWN
    tokens = tokenizer.convert_ids_to_tokens(ids[start:stop])
    if len(tokens) > head + tail:
        tokens = [*tokens[:head], "...", *tokens[-tail:]]
    text = " | ".join(tokens)
    lines = {"prompt": text if answer is None else f"{text} -> {answer}"}
    names = [
        f"@{name} {' | '.join(tokenizer.convert_ids_to_tokens(ids[slice(*span[0].tolist())]))}"
        for name, span in inputs.spans.items()
    ]
    return lines | ({"spans": ", ".join(names)} if names else {})
