"""TextsAndImages: a batch for a model of two towers, one of texts and one of images.

Tensor letters: B batch, S sequence, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from itrain.inputs.batch import ModelInputs
from itrain.inputs.layout import MEDIA
from itrain.inputs.positions import Acts, TokenIndices
from itrain.inputs.remembered import remembered
from itrain.inputs.texts import Range
from itrain.sites import Site

IMAGES = "vision"
"""The stack of the tower of images, and what the paths of its modules hold."""


@dataclass(eq=False, kw_only=True)
class TextsAndImages(ModelInputs):
    """As many texts as images; positions count the texts' tokens, and at sites of the tower of images its patches.

    What ModelInputs says of tokens, spans and texts is of the texts. The model's whole output is the answer.

    Args:
        arguments: as ``input_ids``, ``attention_mask`` and ``pixel_values``.

    Raises:
        ValueError: there are not as many texts as images, or one of the two is missing.
    """

    def __post_init__(self) -> None:
        # The texts first: the first argument tells how many tokens there are.
        self.arguments = dict(sorted(self.arguments.items(), key=lambda each: each[0] in MEDIA))
        counts = {name: len(value) for name, value in self.arguments.items()}
        if not any(name in MEDIA for name in counts) or all(name in MEDIA for name in counts):
            raise ValueError(f"texts and images are needed, and there are {', '.join(counts)} alone")
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise ValueError(f"texts and images make pairs, so give as many of one as of the other: there are {found}")
        super().__post_init__()

    @cached_property
    def of_texts(self) -> ModelInputs:
        """The texts alone."""
        return ModelInputs(
            arguments={name: value for name, value in self.arguments.items() if name not in MEDIA},
            tokens=self.tokens,
            spans=self.spans,
            texts=self.texts,
            characters=self.characters,
        )

    @cached_property
    def of_images(self) -> ModelInputs:
        """The images alone, whose places an activation tells."""
        return ModelInputs(arguments={name: value for name, value in self.arguments.items() if name in MEDIA})

    def part_at(self, site: Site) -> ModelInputs:
        """The texts or the images, whichever the site's position counts in."""
        return self.of_images if IMAGES in site.component else self.of_texts

    @remembered
    def keys(self) -> Int[Tensor, " batch"]:
        """64-bit hashes that tell pairs of a text and an image apart."""
        return self.of_texts.keys * 3 + self.of_images.keys

    @remembered
    def unmasked(self) -> Bool[Tensor, " batch"]:
        """Whether the attention mask hides none of a text's own tokens."""
        return self.of_texts.unmasked

    def padded_right(self) -> TextsAndImages:
        """The same, the texts with padding on the right alone."""
        return self if self.tokens is None else self._pair(self.of_texts.padded_right(), self.of_images)

    def take(self, rows: Int[Tensor, " rows"]) -> TextsAndImages:
        """Some of the pairs, without the padding that none of their texts needs."""
        return self._pair(self.of_texts.take(rows), self.of_images.take(rows))

    def prompts(self) -> ModelInputs:
        """The texts, padded on the left."""
        return self.of_texts.prompts()

    def indices(self, site: Site, length: int, acts: Acts = "prompt") -> TokenIndices:
        """The tokens or patches that the site's position names in an activation of ``length`` of them."""
        return self.part_at(site).indices(site, length, acts)

    def are_tokens(self, site: Site, activation: Tensor) -> bool:
        """Whether what was read at the site is an activation of each token that the position names."""
        part = self.part_at(site)
        return part.tokens is not None and part.are_tokens(site, activation)

    def present(self, site: Site) -> Bool[Tensor, "batch positions"]:
        """Which of the tokens at the position each example has; all have as many patches."""
        part = self.part_at(site)
        return torch.ones(self.batch_size, 1, dtype=torch.bool) if part.tokens is None else part.present(site)

    def require(self, site: Site) -> None:
        """Refuse texts in which the site's position does not exist."""
        self.part_at(site).require(site)

    def require_same_count(
        self, source: ModelInputs, site: Site, read: Site | None = None, rows: Int[Tensor, " rows"] | None = None
    ) -> None:
        """Refuse pairs in which base and source have different numbers of tokens at the site's position."""
        theirs = source.part_at(site if read is None else read) if isinstance(source, TextsAndImages) else source
        self.part_at(site).require_same_count(theirs, site, read, rows)

    def _pair(self, texts: ModelInputs, images: ModelInputs) -> TextsAndImages:
        return TextsAndImages(
            arguments={**texts.arguments, **images.arguments},
            tokens=texts.tokens,
            spans=texts.spans,
            texts=texts.texts,
            characters=texts.characters,
            candidates=self.candidates,
        )

    def _find(self, site: Site, length: int | None = None) -> list[Range]:
        return self.part_at(site)._find(site, length)
