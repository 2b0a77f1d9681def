"""What a base model is given, and which of its tokens a position names.

Tensor letters: B batch, S sequence, P positions, A answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from itrain.sites import POSITION_TERM, Site


class TokenIndices(NamedTuple):
    """The tokens that a position names, per example; ``valid`` is None where every example has all P of them."""

    index: Int[Tensor, "batch positions"]
    valid: Bool[Tensor, "batch positions"] | None


class Facts(NamedTuple):
    """What replay has to know of the examples, on the CPU, for which it must not wait for an accelerator.

    ``keys`` tell examples apart: 64-bit hashes of arguments and spans, the same whatever the padding. ``answer`` is the
    earliest token that answers. ``unmasked`` says whether the attention mask hides none of an example's own tokens.
    """

    keys: Int[Tensor, " batch"]
    answer: Int[Tensor, " batch"] | None
    unmasked: Bool[Tensor, " batch"]


class PositionError(ValueError):
    """A position does not exist in an example."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelInputs:
    """A batch for the base model's forward, with the layout of its tokens.

    Args:
        arguments: the keyword arguments of the base model's forward, each with the batch first.
        answer: the token whose logits answer, (B,), or several, (B, A). None: the model's whole output is the answer.
        tokens: first token that is no padding and one past the last, (B, 2), on the CPU. None: inputs without tokens.
        stop: one past the last token of all, (B,), on the CPU, where the text goes on after ``tokens``: positions count
            the tokens of a prompt, whatever response follows it. None: nothing follows.
        spans: named token spans as [start, stop), (B, 2) each, on the CPU, counted as ``tokens`` is.
        texts: what the examples say, for messages.
        candidates: the tokens or classes whose logits are the answer's, ascending; None: all of them.
    """

    arguments: Mapping[str, Tensor]
    answer: Int[Tensor, "batch ..."] | None = None
    tokens: Int[Tensor, "batch 2"] | None = None
    stop: Int[Tensor, " batch"] | None = None
    spans: Mapping[str, Int[Tensor, "batch 2"]] = field(default_factory=dict)
    texts: Sequence[str] | None = None
    candidates: Int[Tensor, " candidates"] | None = None
    # Never handed on by replace(), whose result may have other spans or another device.
    _indices: dict[tuple[str | None, int], TokenIndices] = field(default_factory=dict, init=False, repr=False)
    _found: dict[tuple[str | None, int | None], list[tuple[Tensor, Tensor]]] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def batch_size(self) -> int:
        return len(next(iter(self.arguments.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.arguments.values())).device

    @property
    def length(self) -> int:
        """The number of tokens, padding included."""
        return next(iter(self.arguments.values())).shape[1]

    @property
    def extent(self) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
        """First token that is no padding and one past the last, on the CPU; all tokens of inputs without a layout."""
        if self.tokens is not None:
            return self.tokens[:, 0], self.tokens[:, 1] if self.stop is None else self.stop
        start = torch.zeros(self.batch_size, dtype=torch.long)
        return start, start + self.length

    @cached_property
    def facts(self) -> Facts:
        """Worked out once, best before the inputs are moved, and handed on by ``take`` and ``to``."""
        token, (first, end) = torch.arange(self.length), (each[:, None] for each in self.extent)
        inside = (token >= first) & (token < end)
        mask = self.arguments.get("attention_mask", inside).cpu().reshape(self.batch_size, self.length, -1)
        answer = None if self.answer is None else self.answer.cpu().view(self.batch_size, -1).amin(1)
        return Facts(self._hash(inside, token - first), answer, ((mask > 0).all(2) | ~inside).all(1))

    @cached_property
    def padding(self) -> tuple[bool, bool]:
        """Whether some example has padding on its left, and some on its right."""
        first, end = self.extent
        return bool((first > 0).any()), bool((end < self.length).any())

    @property
    def unpadded(self) -> bool:
        """Whether there is no padding and the attention mask hides nothing."""
        return not any(self.padding) and bool(self.facts.unmasked.all())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ModelInputs:
        """The batch on another device; the token layout stays on the CPU, where positions are worked out."""
        answer, candidates = (
            None if each is None else each.to(device, non_blocking=non_blocking)
            for each in (self.answer, self.candidates)
        )
        arguments = {key: value.to(device, non_blocking=non_blocking) for key, value in self.arguments.items()}
        moved = replace(self, arguments=arguments, answer=answer, candidates=candidates)
        return moved._with(self.__dict__.get("facts"))

    def among(self, candidates: Int[Tensor, " candidates"]) -> ModelInputs:
        """The inputs with the logits of these tokens or classes alone, ascending, as the answer."""
        return replace(self, candidates=candidates.to(self.device, non_blocking=True))._with(self.__dict__.get("facts"))

    def take(self, rows: Int[Tensor, " rows"]) -> ModelInputs:
        """Some of the examples, without the padding that none of them needs."""
        arguments = {key: value[rows] for key, value in self.arguments.items()}
        answer = None if self.answer is None else self.answer[rows]
        texts = None if self.texts is None else [self.texts[row] for row in cast(list[int], rows.tolist())]
        if self.tokens is None:
            return ModelInputs(arguments=arguments, answer=answer, texts=texts, candidates=self.candidates)
        tokens = self.tokens[rows]
        first, end = (each[rows] for each in self.extent)
        start, stop = int(first.min()), int(end.max())
        taken = ModelInputs(
            arguments={key: value[:, start:stop] for key, value in arguments.items()},
            answer=None if answer is None else answer - start,
            tokens=tokens - start,
            stop=None if self.stop is None else end - start,
            spans={name: span[rows] - start for name, span in self.spans.items()},
            texts=texts,
            candidates=self.candidates,
        )
        keys, first_answer, unmasked = self.facts
        first_answer = None if first_answer is None else first_answer[rows] - start
        return taken._with(Facts(keys[rows], first_answer, unmasked[rows]))

    def prompts(self) -> ModelInputs:
        """The prompts alone, padded on the left, so that text can be generated after them."""
        whole = torch.tensor([[0, self.length]]).expand(self.batch_size, 2)
        tokens = whole if self.tokens is None else self.tokens
        width = int((tokens[:, 1] - tokens[:, 0]).max())
        shift = width - tokens[:, 1:]
        place = torch.arange(width)
        index = (place - shift).clamp(min=0).to(self.device)
        inside = (place >= tokens[:, :1] + shift).long().to(self.device)
        arguments = {name: value.take_along_dim(index, 1) for name, value in self.arguments.items()}
        return ModelInputs(
            arguments={**arguments, "attention_mask": arguments.get("attention_mask", 1) * inside},
            answer=torch.full((self.batch_size,), width - 1, device=self.device),
            tokens=tokens + shift,
            spans={name: span + shift for name, span in self.spans.items()},
            texts=self.texts,
        )

    def pin_memory(self) -> ModelInputs:
        pinned = replace(
            self,
            arguments={key: value.pin_memory() for key, value in self.arguments.items()},
            answer=None if self.answer is None else self.answer.pin_memory(),
        )
        return pinned._with(self.__dict__.get("facts"))

    def _with(self, facts: Facts | None) -> ModelInputs:
        if facts is not None:
            self.__dict__["facts"] = facts
        return self

    def name(self, example: int) -> str:
        """How messages speak of an example."""
        return f"example {example}" + (f" ('{self.texts[example]}')" if self.texts else "")

    def indices(self, site: Site, length: int) -> TokenIndices:
        """The tokens that the site's position names in an activation of ``length`` tokens, on the inputs' device.

        Raises:
            PositionError: the position does not exist in some example, or the activation lacks tokens of the text.
        """
        if self.tokens is not None and int(self.extent[1].max()) > length:
            raise PositionError(f"site '{site}': the activation there has {length} tokens, fewer than the inputs")
        key = (site.position, length)
        if key not in self._indices:
            index, valid = self._resolve(site, length)
            # Not blocking: a blocking copy would wait for all that the accelerator has still to do.
            index, valid = (
                None if each is None else each.to(self.device, non_blocking=True) for each in (index, valid)
            )
            self._indices[key] = TokenIndices(index, valid)
        return self._indices[key]

    def earliest(self, site: Site) -> Int[Tensor, " batch"]:
        """The earliest token that the site's position names, on the CPU."""
        return torch.stack([start for start, _ in self._ranges(site, self.length)]).amin(0)

    def slots(self, site: Site) -> tuple[Int[Tensor, "batch positions"], Int[Tensor, " batch"]]:
        """Which of an example's own tokens at the position each of the P is, and how many it has, on the CPU.

        Those that an example lacks are the first of their term, as in ``indices``.
        """
        count, slots = torch.zeros(self.batch_size, dtype=torch.long), []
        for start, stop in self._ranges(site, self.length):
            offset = torch.arange(int((stop - start).max()))
            slots.append(count[:, None] + offset * (offset < (stop - start)[:, None]))
            count = count + stop - start
        return torch.cat(slots, 1), count

    def present(self, site: Site) -> Bool[Tensor, "batch positions"]:
        """Which of the P tokens at the position each example has, on the CPU; ragged spans leave some out."""
        counts = [stop - start for start, stop in self._ranges(site, self.length)]
        return torch.cat([torch.arange(int(count.max())) < count[:, None] for count in counts], 1)

    def require(self, site: Site) -> None:
        """Refuse examples in which the site's position does not exist.

        Raises:
            PositionError: naming the first such example.
        """
        if self.tokens is not None:
            self._ranges(site)

    def require_same_count(self, source: ModelInputs, site: Site) -> None:
        """Refuse pairs in which base and source have different numbers of tokens at the site's position.

        Raises:
            PositionError: naming the pair; paired by broadcasting it would give a number that means nothing.
        """
        if self.tokens is None or source.tokens is None or site.position is None:
            return
        counts = [[stop - start for start, stop in inputs._ranges(site)] for inputs in (self, source)]
        ours, theirs = (torch.stack(terms, 1) for terms in counts)
        unequal = (ours != theirs).any(1).nonzero()
        if len(unequal):
            pair = int(unequal[0])
            one = site.terms[0].split(".")[0]
            raise PositionError(
                f"site '{site}': base {self.name(pair)} and source {source.name(pair)} have {int(ours[pair].sum())} "
                f"and {int(theirs[pair].sum())} tokens there; name one token, for example '{one}.last'"
            )

    def _ranges(self, site: Site, length: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Start and stop token of each term of the position, (B,) each, checked against the tokens that exist."""
        # Inputs with tokens know their own length. A step asks several times.
        key = site.position, length if self.tokens is None else None
        if key not in self._found:
            self._found[key] = self._find_ranges(site, length)
        return self._found[key]

    def _find_ranges(self, site: Site, length: int | None) -> list[tuple[Tensor, Tensor]]:
        if self.tokens is None:
            assert length is not None, "only inputs with tokens know their own length"
            first, end = torch.zeros(self.batch_size, dtype=torch.long), torch.full((self.batch_size,), length)
        else:
            first, end = self.tokens.unbind(1)
        ranges = []
        for term in site.terms:
            start, stop = self._range(term, first, end, site)
            outside = ((start < first) | (stop > end) | (start >= stop)).nonzero()
            if len(outside):
                example = int(outside[0])
                has = f"{self.name(example)}, which has {int(end[example] - first[example])} tokens"
                raise PositionError(f"site '{site}': position '{term}' does not exist in {has}")
            for other, (begin, until) in zip(site.terms, ranges, strict=False):
                twice = (torch.maximum(start, begin) < torch.minimum(stop, until)).nonzero()
                if len(twice):
                    raise PositionError(
                        f"site '{site}': '{other}' and '{term}' name the same token of {self.name(int(twice[0]))}, "
                        "which can be edited once only"
                    )
            ranges.append((start, stop))
        return ranges

    def _range(self, term: str, first: Tensor, end: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        match = POSITION_TERM.fullmatch(term)
        assert match is not None, "a site checks its terms"
        if match["end"]:
            count = int(match["count"] or 1)
            return (first, first + count) if match["end"] == "first" else (end - count, end)
        if match["index"]:
            start = (first if int(term) >= 0 else end) + int(term)
            return start, start + 1
        if term == "all":
            return first, end
        if match["span"] not in self.spans:
            known = ", ".join(sorted(self.spans)) or "none"
            raise PositionError(
                f"site '{site}': the task names no span '{match['span']}' (it names: {known}); "
                "or use first, last, an integer"
            )
        start, stop = self.spans[match["span"]].unbind(1)
        if match["edge"]:
            return (start, start + 1) if match["edge"] == "first" else (stop - 1, stop)
        return start, stop

    def _resolve(self, site: Site, length: int) -> TokenIndices:
        parts, masks = [], []
        for start, stop in self._ranges(site, length):
            offset = torch.arange(int((stop - start).max()))
            inside = offset < (stop - start)[:, None]
            parts.append(torch.where(inside, start[:, None] + offset, start[:, None]))
            masks.append(inside)
        index, valid = torch.cat(parts, 1), torch.cat(masks, 1)
        return TokenIndices(index, None if bool(valid.all()) else valid)

    def _hash(self, inside: Tensor, place: Tensor) -> Tensor:
        total = torch.zeros(self.batch_size, dtype=torch.long)
        for name, values in self.arguments.items():
            values = values.detach().cpu().reshape(self.batch_size, self.length, -1)
            bits = values.double().view(torch.long) if values.is_floating_point() else values.long()
            where = place[:, :, None] * bits.shape[2] + torch.arange(bits.shape[2])
            total += (_mix(bits ^ _mix(where + _salt(name))) * inside[:, :, None]).sum((1, 2))
        # Positions count from the end of the prompt too, so that where it ends is part of what an example is.
        ends = {} if self.tokens is None or self.stop is None else {"": self.tokens}
        for name, span in {**self.spans, **ends}.items():
            relative = span - self.extent[0][:, None]
            total += _mix(relative ^ _mix(torch.arange(2) + _salt(f"span {name}"))).sum(1)
        return _mix(total)


def _salt(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") << 31


def _mix(bits: Tensor) -> Tensor:
    """A permutation of the 64-bit integers that looks random: splitmix64 (Steele et al. 2014)."""
    bits = bits + -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        # A signed shift copies the sign, which the mask takes away again.
        bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * factor
    return bits ^ (bits >> 31 & (1 << 33) - 1)
