"""ModelInputs: a batch for the base model's forward, with the layout of its tokens.

Tensor letters: B batch, S sequence, P positions, A answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from itrain.inputs.keys import example_keys
from itrain.inputs.layout import MASK, SECOND, moved, require_mask, tokens_of_mask
from itrain.inputs.positions import Acts, TokenIndices, generated_ranges, token_indices, token_ranges, token_slots
from itrain.inputs.remembered import remembered
from itrain.inputs.texts import PositionError, Range, Written
from itrain.sites import Site


def needs_no_wait(device: torch.device | str) -> bool:
    """Whether a copy to the device may go on while the program does."""
    # To the CPU, the copy would be read before it is there; and torch's queue on MPS overtakes such copies.
    return torch.device(device).type not in ("cpu", "mps")


# Not frozen, because Lightning casts floating-point arguments to the trainer's precision field by field.
@dataclass(eq=False, kw_only=True)
class ModelInputs:
    """A batch for the base model's forward, with the layout of its tokens.

    ``keys``, ``earliest_answer`` and ``unmasked`` lie on the CPU, so that asking for them never waits for an
    accelerator. ``take`` and ``to`` hand them on: a step does not work them out again.

    Args:
        arguments: the keyword arguments of the base model's forward, each with the batch first.
        answer: the token whose logits answer, (B,), or several, (B, A). None: the model's whole output is the answer.
        tokens: first token that is no padding and one past the last, (B, 2), on the CPU. None: what the attention mask
            of a text says, else all tokens of a text, or inputs without tokens.
        start: first token of all, (B,), on the CPU, where the text begins before ``tokens``. None: nothing precedes.
        stop: one past the last token of all, (B,), on the CPU, where the text goes on after ``tokens``: positions count
            the tokens of a prompt, whatever response follows it. None: nothing follows.
        spans: named token spans as [start, stop), (B, 2) each, on the CPU, counted as ``tokens`` is.
        texts: what the examples say, for messages and positions such as ``"Spain"``.
        characters: the characters of ``texts`` that each token covers, [start, stop), (B, S, 2), on the CPU; an empty
            range for tokens of no text. None: unknown.
        candidates: the tokens or classes whose logits are the answer's, ascending; None: all of them.

    Raises:
        ValueError: the attention mask of a text does not tell padding from text.
    """

    arguments: Mapping[str, Tensor]
    answer: Int[Tensor, "batch ..."] | None = None
    tokens: Int[Tensor, "batch 2"] | None = None
    start: Int[Tensor, " batch"] | None = None
    stop: Int[Tensor, " batch"] | None = None
    spans: Mapping[str, Int[Tensor, "batch 2"]] = field(default_factory=dict)
    texts: Sequence[str] | None = None
    characters: Int[Tensor, "batch sequence 2"] | None = None
    candidates: Int[Tensor, " candidates"] | None = None
    # Never handed on by replace(), whose result may have other spans or another device.
    _indices: dict[tuple[str | None, int, Acts], TokenIndices] = field(default_factory=dict, init=False, repr=False)
    _ranges: dict[tuple[str | None, int | None], list[Range]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if MASK in self.arguments:
            require_mask(self.arguments, self.length)
            if self.tokens is None:
                self.tokens = tokens_of_mask(self.arguments, self.length, self.name)

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
    def extent(self) -> Range:
        """First token that is no padding and one past the last, on the CPU; all tokens of inputs without a layout."""
        if self.tokens is not None:
            first, end = self.tokens.unbind(1)
            return first if self.start is None else self.start, end if self.stop is None else self.stop
        start = torch.zeros(self.batch_size, dtype=torch.long)
        return start, start + self.length

    @remembered
    def keys(self) -> Int[Tensor, " batch"]:
        """64-bit hashes of arguments and spans that tell examples apart, the same whatever the padding."""
        place, inside = self._own_tokens()
        # Positions count from either end of the prompt, so that where these are is part of what an example is.
        ends = {} if self.tokens is None or (self.start is None and self.stop is None) else {"": self.tokens}
        first = self.extent[0][:, None]
        spans = {name: span - first for name, span in {**self.spans, **ends}.items()}
        return example_keys(self.arguments, spans, place, inside)

    @remembered
    def earliest_answer(self) -> Int[Tensor, " batch"] | None:
        """The earliest token that answers; None where the model's whole output is the answer."""
        return None if self.answer is None else self.answer.cpu().view(self.batch_size, -1).amin(1)

    @remembered
    def unmasked(self) -> Bool[Tensor, " batch"]:
        """Whether the attention mask hides none of an example's own tokens."""
        _, inside = self._own_tokens()
        mask = self.arguments.get("attention_mask", inside).cpu().reshape(self.batch_size, self.length, -1)
        return ((mask > 0).all(2) | ~inside).all(1)

    @cached_property
    def padding(self) -> tuple[bool, bool]:
        """Whether some example has padding on its left, and some on its right."""
        first, end = self.extent
        return bool((first > 0).any()), bool((end < self.length).any())

    @property
    def unpadded(self) -> bool:
        """Whether there is no padding and the attention mask hides nothing."""
        return not any(self.padding) and bool(self.unmasked.all())

    @cached_property
    def all_own(self) -> bool:
        """Whether the rows hold nothing but the tokens that positions count: no padding and no response."""
        return self.tokens is None or not (self.start is not None or self.stop is not None or any(self.padding))

    def padded_right(self) -> ModelInputs:
        """The same text, with padding on the right alone."""
        assert self.tokens is not None, "inputs without tokens have no padding"
        shift, end = self.extent
        arguments, characters = moved(self.arguments, -shift, self.length), self._moved_characters(-shift, self.length)
        if MASK in arguments:
            own = torch.arange(self.length) < (end - shift)[:, None]
            arguments[MASK] = arguments[MASK] * own.to(arguments[MASK])
        answer = self.answer
        if answer is not None:
            back = shift.to(self.device)
            answer = answer - back.view(-1, *[1] * (answer.ndim - 1))
        return replace(
            self,
            arguments=arguments,
            answer=answer,
            tokens=self.tokens - shift[:, None],
            start=None if self.start is None else self.start - shift,
            stop=None if self.stop is None else self.stop - shift,
            spans={name: span - shift[:, None] for name, span in self.spans.items()},
            characters=characters,
        )

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> ModelInputs:
        """The batch on another device; the token layout stays on the CPU, where positions are worked out.

        ``non_blocking`` None: without waiting wherever that is safe, which Lightning does not ask for.
        """
        non_blocking = needs_no_wait(device) if non_blocking is None else non_blocking
        answer, candidates = (
            None if each is None else each.to(device, non_blocking=non_blocking)
            for each in (self.answer, self.candidates)
        )
        arguments = {key: value.to(device, non_blocking=non_blocking) for key, value in self.arguments.items()}
        return replace(self, arguments=arguments, answer=answer, candidates=candidates)._with(**self._known())

    def among(self, candidates: Int[Tensor, " candidates"]) -> ModelInputs:
        """The inputs with the logits of these tokens or classes alone, ascending, as the answer."""
        return replace(self, candidates=candidates.to(self.device, non_blocking=True))._with(**self._known())

    def take(self, rows: Int[Tensor, " rows"]) -> ModelInputs:
        """Some of the examples, without the padding that none of them needs."""
        at = rows.to(self.device, non_blocking=True)
        arguments = {key: value[at] for key, value in self.arguments.items()}
        answer = None if self.answer is None else self.answer[at]
        texts = None if self.texts is None else [self.texts[row] for row in cast(list[int], rows.tolist())]
        if self.tokens is None:
            taken = ModelInputs(arguments=arguments, answer=answer, texts=texts, candidates=self.candidates)
            return taken._with(**{name: value[rows] for name, value in self._known().items()})
        tokens = self.tokens[rows]
        first, end = (each[rows] for each in self.extent)
        start, stop = int(first.min()), int(end.max())
        taken = ModelInputs(
            arguments={key: value[:, start:stop] for key, value in arguments.items()},
            answer=None if answer is None else answer - start,
            tokens=tokens - start,
            start=None if self.start is None else first - start,
            stop=None if self.stop is None else end - start,
            spans={name: span[rows] - start for name, span in self.spans.items()},
            texts=texts,
            characters=None if self.characters is None else self.characters[rows.cpu(), start:stop],
            candidates=self.candidates,
        )
        # Worked out here for all examples at once, which is far cheaper than batch by batch.
        earliest = None if self.earliest_answer is None else self.earliest_answer[rows] - start
        return taken._with(keys=self.keys[rows], earliest_answer=earliest, unmasked=self.unmasked[rows])

    def prompts(self) -> ModelInputs:
        """The prompts alone, padded on the left, so that text can be generated after them."""
        whole = torch.tensor([[0, self.length]]).expand(self.batch_size, 2)
        tokens, first = whole if self.tokens is None else self.tokens, self.extent[0][:, None]
        width = int((tokens[:, 1:] - first).max())
        shift = width - tokens[:, 1:]
        inside = (torch.arange(width) >= first + shift).long().to(self.device)
        arguments = moved(self.arguments, shift[:, 0], width)
        return ModelInputs(
            arguments={**arguments, MASK: arguments.get(MASK, 1) * inside},
            answer=torch.full((self.batch_size,), width - 1, device=self.device),
            tokens=tokens + shift,
            start=None if self.start is None else self.start + shift[:, 0],
            spans={name: span + shift for name, span in self.spans.items()},
            texts=self.texts,
            characters=self._moved_characters(shift[:, 0], width),
        )

    def pin_memory(self) -> ModelInputs:
        """The batch in memory from which an accelerator copies without waiting."""
        arguments = {key: value.pin_memory() for key, value in self.arguments.items()}
        answer = None if self.answer is None else self.answer.pin_memory()
        return replace(self, arguments=arguments, answer=answer)._with(**self._known())

    def name(self, example: int) -> str:
        """How messages speak of an example."""
        return f"example {example}" + (f" ('{self.texts[example]}')" if self.texts else "")

    def indices(self, site: Site, length: int, acts: Acts = "prompt") -> TokenIndices:
        """The tokens that the site's position names in an activation of ``length`` tokens, on the inputs' device.

        ``acts`` says whether the prompt's tokens are meant, those of what follows it, or both.

        Raises:
            PositionError: the position does not exist in some example, or the activation has not the text's tokens, or
                as many as a second text.
        """
        if self.tokens is not None and length != self.length:
            than = "fewer" if length < self.length else "more"
            raise PositionError(
                f"site '{site}': the activation there has {length} tokens, {than} than the inputs, which have "
                f"{self.length}, so that positions in it cannot be told"
            )
        key = (site.position, length, acts)
        if key not in self._indices:
            mask = self.arguments.get(MASK)
            if self.tokens is None and mask is not None and mask.shape[1] != length and not bool(mask.all()):
                raise PositionError(
                    f"site '{site}': the {MASK} hides padding of inputs that are no text, which cannot be told among "
                    f"the {length} places of the activation there; take inputs of equal length"
                )
            second = [value for name, value in self.arguments.items() if name in SECOND]
            if self.tokens is not None and any(value.shape[1] == length for value in second):
                raise PositionError(
                    f"site '{site}': the encoder's and the decoder's texts both have {length} tokens here, so that it "
                    "cannot be told in which of them the position counts; pad one of them to another length"
                )
            # Kept for steps with gradients, which tensors of inference mode do not serve.
            with torch.inference_mode(False):
                ranges = self._find(site, length) if acts in ("prompt", "all") else []
                if acts != "prompt":
                    ranges = [*ranges, *generated_ranges(acts, self._follows(length))]
                index, valid = token_indices([(start.clone(), stop.clone()) for start, stop in ranges])
                if acts != "prompt":
                    # The prompt's last token stands in for those that an example lacks: it runs wherever edits act.
                    begin, end = self._follows(length)
                    index = torch.where(index < end[:, None], index, begin[:, None] - 1)
                # Not blocking: a blocking copy would wait for all that the accelerator has still to do.
                index = index.to(self.device, non_blocking=True)
                valid = None if valid is None else valid.to(self.device, non_blocking=True)
                self._indices[key] = TokenIndices(index, valid)
        return self._indices[key]

    def earliest(self, site: Site) -> Int[Tensor, " batch"]:
        """The earliest token that the site's position names, on the CPU."""
        return torch.stack([start for start, _ in self._find(site, self.length)]).amin(0)

    def are_tokens(self, site: Site, activation: Tensor) -> bool:
        """Whether what was read at the site is an activation of each token that the position names.

        Without a position it need not be: the site may hold one activation an example, or one of no text.
        """
        if site.position is not None:
            return True
        if self.tokens is None or activation.ndim < 3:
            return False
        return activation.shape[1] == int((self.tokens[:, 1] - self.tokens[:, 0]).max())

    def slots(self, site: Site) -> tuple[Int[Tensor, "batch positions"], Int[Tensor, " batch"]]:
        """Which of an example's own tokens at the position each of the P is, and how many it has, on the CPU.

        Those that an example lacks are the first of their term, as in ``indices``.
        """
        return token_slots(self._find(site, self.length))

    def present(self, site: Site) -> Bool[Tensor, "batch positions"]:
        """Which of the P tokens at the position each example has, on the CPU; ragged spans leave some out.

        It is asked of inputs with tokens: in others every example has the same places.
        """
        counts = [stop - start for start, stop in self._find(site)]
        return torch.cat([torch.arange(int(count.max())) < count[:, None] for count in counts], 1)

    def require(self, site: Site) -> None:
        """Refuse examples in which the site's position does not exist.

        Raises:
            PositionError: naming the first such example.
        """
        if self.tokens is not None:
            self._find(site)

    def require_same_count(
        self, source: ModelInputs, site: Site, read: Site | None = None, rows: Int[Tensor, " rows"] | None = None
    ) -> None:
        """Refuse pairs in which base and source have different numbers of tokens at the site's position.

        Args:
            source: the inputs that are read.
            site: what is edited in these.
            read: what is read in the sources; None: the same site.
            rows: the pairs that count; None: all.

        Raises:
            PositionError: naming the pair; paired by broadcasting it would give a number that means nothing.
        """
        if self.tokens is None or source.tokens is None:
            return
        read = site if read is None else read
        if (site.is_weights or read.is_weights) and (
            self.length != source.length or not torch.equal(self.tokens, source.tokens)
        ):
            raise PositionError(
                f"site '{site}': attention weights go over all tokens of a text, so that base and source need as many; "
                f"{self.name(0)} and {source.name(0)} are in texts of {self.length} and {source.length}"
            )
        chosen = torch.arange(self.batch_size) if rows is None else rows
        counts = [[stop - start for start, stop in inputs._find(at)] for inputs, at in ((self, site), (source, read))]
        ours, theirs = (torch.stack(terms, 1)[chosen] for terms in counts)
        alike = (ours == theirs).all(1) if ours.shape == theirs.shape else torch.zeros(len(ours), dtype=torch.bool)
        if site.position != read.position and all(bool((each == each[:1]).all()) for each in (ours, theirs)):
            alike = ours.sum(1) == theirs.sum(1)  # no term leaves out slots, so that those of several may meet
        if len(unlike := (~alike).nonzero()):
            row = int(unlike[0])
            pair, name = int(chosen[row]), str(site) if site == read else f"{site} <- {read}"
            raise PositionError(
                f"site '{name}': base {self.name(pair)} and source {source.name(pair)} have {int(ours[row].sum())} "
                f"and {int(theirs[row].sum())} tokens there"
                f"{' in parts of other lengths' * bool(ours[row].sum() == theirs[row].sum())}; "
                f"name one token, for example '{site.one_token}'"
            )

    def _find(self, site: Site, length: int | None = None) -> list[Range]:
        """The range of each term of the position; ``length`` counts for inputs that do not know their tokens."""
        # A step asks several times.
        key = site.position, length if self.tokens is None else None
        if key not in self._ranges:
            if self.tokens is not None:
                # Positions count the tokens of the prompt, whatever follows it.
                counted = self.tokens[:, 0], self.tokens[:, 1]
            else:
                assert length is not None, "only inputs with tokens know their own length"
                start = torch.zeros(self.batch_size, dtype=torch.long)
                counted = start, start + length
            texts, characters = self.texts, self.characters
            written = None if texts is None or characters is None else Written(texts, characters)
            self._ranges[key] = token_ranges(site, counted, self.spans, self.name, written)
        return self._ranges[key]

    def _follows(self, length: int) -> Range:
        """First token after the prompt, and one past the last."""
        if self.tokens is None:
            end = torch.full((self.batch_size,), length)
            return end, end
        return self.tokens[:, 1], self.tokens[:, 1] if self.stop is None else self.stop

    def _moved_characters(self, shift: Int[Tensor, " batch"], width: int) -> Int[Tensor, "batch width 2"] | None:
        return None if self.characters is None else moved({"": self.characters}, shift, width)[""]

    def _own_tokens(self) -> tuple[Int[Tensor, "batch sequence"], Bool[Tensor, "batch sequence"]]:
        """Where each token stands from the example's first own one, and whether it is no padding."""
        token, (first, end) = torch.arange(self.length), (each[:, None] for each in self.extent)
        return token - first, (token >= first) & (token < end)

    def _known(self) -> dict[str, Tensor]:
        """What is already worked out of ``keys``, ``earliest_answer`` and ``unmasked``."""
        names = ("keys", "earliest_answer", "unmasked")
        return {name: self.__dict__[name] for name in names if self.__dict__.get(name) is not None}

    def _with(self, **known: Tensor | None) -> ModelInputs:
        self.__dict__.update(known)
        return self
