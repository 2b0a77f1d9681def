"""A tokenizer in place of one that is not at hand: it splits texts into words, which is about what others do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from itrain.models.loading import TOKENIZER_FILES, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST = 16384
"""Tokens of a stand-in."""


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer whose files lie beside a model's config.json; None where there are none."""
    found = any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)
    return load_tokenizer(str(folder), "main") if found else None


def stand_in_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A tokenizer for which each word of the texts is one token, and others are several; no text is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in text.split()})
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LARGEST,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*(f" {word}" for word in words), *words], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
