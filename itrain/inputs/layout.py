"""Layout: where the text of examples lies in their rows, and how rows are moved to pad them on another side.

Tensor letters: B batch, S sequence, W width of the moved rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

TEXTS = frozenset({"input_ids", "inputs_embeds"})
"""Arguments of a model's forward of which each row is a text, token by token."""
SECOND = ("decoder_input_ids", "decoder_inputs_embeds")
"""Arguments that hold a second text, whose layout is not known."""
MEDIA = ("pixel_values", "input_features", "input_values")
"""Arguments that hold images or sound."""
MASK = "attention_mask"


def text_lengths(arguments: Mapping[str, Tensor]) -> set[int]:
    """How many tokens the texts among the arguments have, padding included."""
    return {value.shape[1] for name, value in arguments.items() if name in TEXTS or name in SECOND}


def require_mask(arguments: Mapping[str, Tensor], length: int) -> None:
    """Refuse a text's mask that does not say of each token by itself whether it is padding.

    Raises:
        ValueError: the mask has another shape than (B, S).
    """
    mask = arguments.get(MASK)
    if mask is not None and mask.ndim != 2 and not TEXTS.isdisjoint(arguments):
        raise ValueError(
            f"{MASK}: its shape is {tuple(mask.shape)}; give one of (batch, tokens) = (.., {length}), which says what "
            "is padding: which token sees which is left to the model"
        )


def tokens_of_mask(
    arguments: Mapping[str, Tensor], length: int, name: Callable[[int], str]
) -> Int[Tensor, "batch 2"] | None:
    """First token that is no padding and one past the last, (B, 2), by a text's mask; None for inputs without one.

    Raises:
        ValueError: an example's tokens are no single run of the mask, or the mask is none of 0 and 1.
    """
    mask = arguments.get(MASK)
    if mask is None or TEXTS.isdisjoint(arguments):
        return None
    mask = mask.detach().cpu()
    remedy = "give the layout: ModelInputs(tokens=...), first token and one past the last of each example"
    if mask.shape[1] != length:
        raise ValueError(f"{MASK}: it has {mask.shape[1]} tokens and the text {length}; {remedy}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{MASK}: it holds other values than 0, for padding, and 1; {remedy}")
    seen = mask.bool()
    first, count = seen.long().argmax(1), seen.sum(1)
    place = torch.arange(length)
    run = (place >= first[:, None]) & (place < (first + count)[:, None])
    if wrong := ((run != seen).any(1) | (count == 0)).nonzero()[:, 0].tolist():
        raise ValueError(f"{MASK}: the tokens of {name(wrong[0])} are no single run of ones; {remedy}")
    return torch.stack([first, first + count], 1)


def moved(
    arguments: Mapping[str, Tensor], shift: Int[Tensor, " batch"], width: int
) -> dict[str, Shaped[Tensor, "batch width ..."]]:
    """The arguments, each row's tokens ``shift`` places farther to the right, in rows of ``width``.

    What is moved in from outside of a row repeats its nearest token.
    """
    index = torch.arange(width) - shift[:, None]
    found = {}
    for name, value in arguments.items():
        at = index.clamp(min=0, max=value.shape[1] - 1).to(value.device)
        found[name] = value.take_along_dim(at.view(*at.shape, *[1] * (value.ndim - 2)), 1)
    return found
