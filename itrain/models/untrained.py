"""An untrained language model with words of one's own, to be trained from nothing."""

from __future__ import annotations

from collections.abc import Sequence

from itrain.bounds import require_at_least
from itrain.models.base import BaseModel, ModelError

UNKNOWN, PADDING = "<unk>", "<pad>"


def language_model(
    *, words: str | Sequence[str], hidden_size: int = 64, num_layers: int = 2, num_heads: int = 4, tokens: int = 64
) -> BaseModel:
    """A GPT-NeoX with random weights, for which each of the words is one token; words are parted by spaces.

    The weights follow torch's global seed, as a run's seed sets it.

    Args:
        words: all that prompts and answers are made of: a list, or a text with spaces between them.
        hidden_size, num_layers, num_heads: the model's sizes.
        tokens: of the longest text.

    Raises:
        ModelError: there are no words, one has a space, or the heads do not divide the hidden size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    require_at_least(1, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads, tokens=tokens)
    listed = words.split() if isinstance(words, str) else list(words)
    if not listed or any(each.split() != [each] for each in listed):
        raise ModelError(f"words: {words!r}: give words, none of them empty or with a space")
    if hidden_size % (2 * num_heads):
        raise ModelError(f"num_heads={num_heads}: each of them has an even share of hidden_size={hidden_size}")
    ids = {word: number for number, word in enumerate(dict.fromkeys([PADDING, UNKNOWN, *listed]))}
    made = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Fuse()
    config = GPTNeoXConfig(
        vocab_size=len(ids),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=tokens,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=ids[PADDING],
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token=UNKNOWN, pad_token=PADDING)
    return BaseModel(model=GPTNeoXForCausalLM(config).eval(), tokenizer=tokenizer)
