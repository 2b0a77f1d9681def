"""TwoTexts: a batch for a model of an encoder and a decoder, each with a text of its own.

Tensor letters: B batch, S sequence, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from itrain.inputs.batch import ModelInputs
from itrain.inputs.layout import SECOND
from itrain.inputs.positions import Acts, TokenIndices
from itrain.inputs.remembered import remembered
from itrain.inputs.texts import PositionError, Range
from itrain.sites import Site

DECODER = "decoder_"
"""How the arguments of the decoder's text begin."""
CROSSING = ("cross_key_output", "cross_value_output")
"""The decoder's components that are of the encoder's tokens."""


@dataclass(eq=False, kw_only=True)
class TwoTexts(ModelInputs):
    """A batch for a model of an encoder and a decoder; positions at a decoder's site count the decoder's tokens.

    The encoder may read images or sound instead; positions at its sites then count patches or frames.

    What ModelInputs says of the tokens, spans and texts is the encoder's. A module named by its path is the decoder's
    where its activation has as many tokens as the decoder's text, and the encoder's text has not.

    Args:
        arguments: as ``input_ids`` and ``attention_mask``, ``decoder_input_ids`` and ``decoder_attention_mask``.
        answer: the decoder's token whose logits answer, (B,), or several, (B, A).
        decoder_tokens: as ``tokens``, of the decoder's text.
        decoder_spans: as ``spans``, of the decoder's text.

    Raises:
        ValueError: there is no decoder's text, or a mask does not tell padding from text.
    """

    decoder_tokens: Int[Tensor, "batch 2"] | None = None
    decoder_spans: Mapping[str, Int[Tensor, "batch 2"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not any(name in self.arguments for name in SECOND):
            raise ValueError(f"the decoder's text is missing; give {' or '.join(SECOND)} beside the encoder's")
        # The encoder's first: the first argument tells how many tokens there are.
        self.arguments = dict(sorted(self.arguments.items(), key=lambda each: each[0].startswith(DECODER)))
        super().__post_init__()
        self.decoder_tokens = self.decoder.tokens

    @classmethod
    def of(cls, encoder: ModelInputs, decoder: ModelInputs) -> TwoTexts:
        """The inputs of both texts; the decoder's answer."""
        second = {f"{DECODER}{name}": value for name, value in decoder.arguments.items()}
        return cls(
            arguments={**encoder.arguments, **second},
            answer=decoder.answer,
            tokens=encoder.tokens,
            spans=encoder.spans,
            texts=encoder.texts,
            characters=encoder.characters,
            candidates=decoder.candidates,
            decoder_tokens=decoder.tokens,
            decoder_spans=decoder.spans,
        )

    @cached_property
    def encoder(self) -> ModelInputs:
        """The encoder's text."""
        first = {name: value for name, value in self.arguments.items() if not name.startswith(DECODER)}
        return ModelInputs(
            arguments=first, tokens=self.tokens, spans=self.spans, texts=self.texts, characters=self.characters
        )

    @cached_property
    def decoder(self) -> ModelInputs:
        """The decoder's text, under the names of a text's arguments, with the answer."""
        second = {
            name.removeprefix(DECODER): value for name, value in self.arguments.items() if name.startswith(DECODER)
        }
        return ModelInputs(
            arguments=second,
            answer=self.answer,
            tokens=self.decoder_tokens,
            spans=self.decoder_spans,
            candidates=self.candidates,
        )

    def text_at(self, site: Site, length: int | None = None) -> ModelInputs:
        """The text whose tokens the site's position counts; ``length`` tells how many the activation there has.

        Raises:
            PositionError: the module could be of either.
        """
        if site.layer is not None:
            crossing = site.component.rpartition(".")[2] in CROSSING
            return self.decoder if site.stack == "decoder" and not crossing else self.encoder
        if length == self.decoder.length == self.encoder.length and self.tokens is not None:
            raise PositionError(
                f"site '{site}': the encoder's and the decoder's texts both have {length} tokens here, so that it "
                "cannot be told in which of them the position counts; name a component, such as "
                "decoder.layer0.block_output, or pad one of them to another length"
            )
        return self.decoder if length == self.decoder.length else self.encoder

    def require(self, site: Site) -> None:
        """Refuse examples in which the site's position does not exist."""
        if site.layer is not None:
            self.text_at(site).require(site)
        else:
            super().require(site)

    @remembered
    def keys(self) -> Int[Tensor, " batch"]:
        """64-bit hashes that tell pairs of texts apart."""
        return self.encoder.keys * 3 + self.decoder.keys

    @remembered
    def unmasked(self) -> Bool[Tensor, " batch"]:
        """Whether the attention masks hide none of an example's own tokens."""
        return self.encoder.unmasked & self.decoder.unmasked

    @cached_property
    def padding(self) -> tuple[bool, bool]:
        """Whether some text has padding on its left, and some on its right."""
        (left, right), (second_left, second_right) = self.encoder.padding, self.decoder.padding
        return left or second_left, right or second_right

    @cached_property
    def all_own(self) -> bool:
        """Whether the rows hold nothing but the tokens that positions count."""
        return self.encoder.all_own and self.decoder.all_own

    def padded_right(self) -> TwoTexts:
        """The same texts, with padding on the right alone."""
        return TwoTexts.of(*(each if each.tokens is None else each.padded_right() for each in self._both))

    def take(self, rows: Int[Tensor, " rows"]) -> TwoTexts:
        """Some of the examples, without the padding that none of them needs."""
        return TwoTexts.of(*(each.take(rows) for each in self._both))

    def prompts(self) -> ModelInputs:
        """The encoder's texts, padded on the left."""
        return self.encoder.prompts()

    def indices(self, site: Site, length: int, acts: Acts = "prompt") -> TokenIndices:
        """The tokens that the site's position names in an activation of ``length`` tokens, on the inputs' device."""
        return self.text_at(site, length).indices(site, length, acts)

    def are_tokens(self, site: Site, activation: Tensor) -> bool:
        """Whether what was read at the site is an activation of each token that the position names."""
        length = activation.shape[1] if activation.ndim > 2 else None
        return self.text_at(site, length).are_tokens(site, activation)

    @property
    def _both(self) -> tuple[ModelInputs, ModelInputs]:
        return self.encoder, self.decoder

    def _find(self, site: Site, length: int | None = None) -> list[Range]:
        text = self.text_at(site)
        return text._find(site, text.length)


def with_decoder(inputs: ModelInputs, start: int) -> TwoTexts:
    """The inputs with a decoder's text of nothing but the token that it starts with, which answers.

    Raises:
        ValueError: responses follow the prompts, which would have to be the decoder's.
    """
    if inputs.stop is not None or (inputs.answer is not None and inputs.answer.ndim > 1):
        raise ValueError(
            "responses are no part of an encoder's text, and this model answers with its decoder; give both texts as "
            "itrain.inputs.TwoTexts, the response as decoder_input_ids"
        )
    first = torch.full((inputs.batch_size, 1), start, device=inputs.device)
    answer = None if inputs.answer is None else torch.zeros(inputs.batch_size, dtype=torch.long, device=inputs.device)
    return TwoTexts.of(replace(inputs, answer=None), ModelInputs(arguments={"input_ids": first}, answer=answer))
