"""ComparedTexts: a batch for a model of two towers that says which of two texts fits each image better.

Tensor letters: B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Bool, Int
from torch import Tensor

from itrain.inputs.batch import ModelInputs
from itrain.inputs.layout import MEDIA
from itrain.inputs.remembered import remembered
from itrain.inputs.texts_and_images import IMAGES, TextsAndImages
from itrain.sites import Site

OTHER = "other_"
"""How the arguments of the second text begin."""


@dataclass(eq=False, kw_only=True)
class ComparedTexts(TextsAndImages):
    """Two texts for each image; positions at ``.step1`` of the tower of texts count the second text's tokens.

    What ModelInputs says of tokens, spans and texts is of the first. The model's whole output is the answer.

    Args:
        arguments: as ``input_ids`` and ``attention_mask``, ``other_input_ids`` and ``other_attention_mask``, and
            ``pixel_values``.
        other_tokens: as ``tokens``, of the second text.

    Raises:
        ValueError: a text or the images are missing, or there are not as many of each.
    """

    other_tokens: Int[Tensor, "batch 2"] | None = None

    def __post_init__(self) -> None:
        if not any(name.startswith(OTHER) for name in self.arguments):
            raise ValueError(f"the second text is missing; give {OTHER}input_ids beside input_ids")
        # The first text first: the first argument tells how many tokens there are.
        self.arguments = dict(sorted(self.arguments.items(), key=lambda each: each[0].startswith(OTHER)))
        super().__post_init__()
        self.other_tokens = self.of_others.tokens

    @classmethod
    def of(cls, first: ModelInputs, second: ModelInputs, images: ModelInputs) -> ComparedTexts:
        """The inputs of both texts and of the images."""
        others = {f"{OTHER}{name}": value for name, value in second.arguments.items()}
        return cls(
            arguments={**first.arguments, **others, **images.arguments},
            tokens=first.tokens,
            spans=first.spans,
            texts=first.texts,
            characters=first.characters,
            candidates=first.candidates,
            other_tokens=second.tokens,
        )

    @cached_property
    def of_texts(self) -> ModelInputs:
        """The first texts alone."""
        own = {name: each for name, each in self.arguments.items() if not name.startswith(OTHER) and name not in MEDIA}
        return ModelInputs(
            arguments=own,
            tokens=self.tokens,
            spans=self.spans,
            texts=self.texts,
            characters=self.characters,
            candidates=self.candidates,
        )

    @cached_property
    def of_others(self) -> ModelInputs:
        """The second texts alone, under the names of a text's arguments."""
        own = {name.removeprefix(OTHER): each for name, each in self.arguments.items() if name.startswith(OTHER)}
        return ModelInputs(arguments=own, tokens=self.other_tokens)

    def part_at(self, site: Site) -> ModelInputs:
        """The first or the second texts, or the images, whichever the site's position counts in."""
        return self.of_others if site.step == 1 and IMAGES not in site.component else super().part_at(site)

    @remembered
    def keys(self) -> Int[Tensor, " batch"]:
        """64-bit hashes that tell images with two texts apart."""
        return (self.of_texts.keys * 3 + self.of_others.keys) * 3 + self.of_images.keys

    @remembered
    def unmasked(self) -> Bool[Tensor, " batch"]:
        """Whether the attention masks hide none of the texts' own tokens."""
        return self.of_texts.unmasked & self.of_others.unmasked

    @cached_property
    def padding(self) -> tuple[bool, bool]:
        """Whether some text has padding on its left, and some on its right."""
        (left, right), (other_left, other_right) = self.of_texts.padding, self.of_others.padding
        return left or other_left, right or other_right

    @cached_property
    def all_own(self) -> bool:
        """Whether the rows of texts hold nothing but the tokens that positions count."""
        return self.of_texts.all_own and self.of_others.all_own

    def padded_right(self) -> ComparedTexts:
        """The same, the texts with padding on the right alone."""
        first, second = (each if each.tokens is None else each.padded_right() for each in self._both)
        return ComparedTexts.of(first, second, self.of_images)

    def take(self, rows: Int[Tensor, " rows"]) -> ComparedTexts:
        """Some of the examples, without the padding that none of their texts needs."""
        first, second = (each.take(rows) for each in self._both)
        return ComparedTexts.of(first, second, self.of_images.take(rows))

    @property
    def _both(self) -> tuple[ModelInputs, ModelInputs]:
        return self.of_texts, self.of_others
