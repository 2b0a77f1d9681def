"""What a user gives a model: prompts, chats or tensors, as inputs of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from itrain.architectures import architecture, unwrap
from itrain.inputs import ModelInputs, TextsAndImages, TwoTexts
from itrain.inputs.layout import MASK, MEDIA, SECOND
from itrain.tasks.responses import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages with the keys role and content, which the tokenizer's chat template makes one prompt of."""
Given: TypeAlias = str | Sequence[str] | Chat | Tensor | Mapping[str, Tensor] | ModelInputs
"""A prompt, several, a chat, the model's first argument, its arguments by name, or inputs that say it all."""


def inputs_of(given: Given, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> ModelInputs:
    """What is given as inputs on the model's device; the last token of a text answers.

    Raises:
        ValueError: it cannot be read, or it is a text and the model has no tokenizer.
    """
    if isinstance(given, ModelInputs):
        inputs = given
    elif isinstance(given, Tensor):
        name = next(iter(signature(unwrap(model).forward).parameters))
        inputs = _of_arguments({name: given}, model)
    elif isinstance(given, Mapping):
        inputs = _of_arguments(given, model)
    else:
        inputs = _of_texts(_texts(given, tokenizer), model, tokenizer)
    weight = next(model.parameters(), None)
    return inputs if weight is None or weight.is_meta else inputs.to(weight.device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; afterwards each module is in the mode that it was in."""
    trained = [module for module in model.modules() if module.training]
    try:
        for module in trained:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in trained:
            module.training = True


def matched(inputs: ModelInputs, base: ModelInputs, *, name: str) -> ModelInputs:
    """The inputs, one for each of the base's; a single one stands for all.

    Raises:
        ValueError: there are several, and not as many.
    """
    if inputs.batch_size == base.batch_size:
        return inputs
    if inputs.batch_size == 1:
        return inputs.take(torch.zeros(base.batch_size, dtype=torch.long))
    raise ValueError(
        f"{name}: there are {inputs.batch_size} for {base.batch_size} prompts; give one for each, or one for all"
    )


def _texts(given: str | Sequence[str] | Chat, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or not given:
        kind = "an empty list" if isinstance(given, Sequence) else f"a {type(given).__name__}"
        raise ValueError(
            f"{kind} is no prompt; give a text, a list of texts, a chat, or the model's arguments as tensors"
        )
    if all(isinstance(each, Mapping) for each in given):
        return [_rendered([dict(each) for each in given if isinstance(each, Mapping)], tokenizer)]
    texts = [each for each in given if isinstance(each, str)]
    if len(texts) < len(given):
        other = next(each for each in given if not isinstance(each, str))
        raise ValueError(f"the list of prompts holds a {type(other).__name__}: {other!r}; give texts")
    return texts


def _rendered(chat: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A chat as one prompt, ready for the model's turn."""
    if lacking := [each for each in chat if not {"role", "content"} <= set(each)]:
        raise ValueError(f"a chat is a list of messages with role and content, and one has {', '.join(lacking[0])}")
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ValueError("a chat is given, and the model's tokenizer has no chat template; give the prompt as text")
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def _of_texts(texts: list[str], model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> ModelInputs:
    if tokenizer is None:
        raise ValueError(
            f"{texts[0]!r} is a text, and the model has no tokenizer; give one, "
            "itrain.BaseModel(model=..., tokenizer=...), or the model's arguments as tensors"
        )
    task = Prompts(texts=texts)
    task.bind(tokenizer)
    inputs = task.inputs(task.settings("test"))
    return inputs if _has_head(model) else replace(inputs, answer=None)


def _of_arguments(given: Mapping[str, Any], model: nn.Module) -> ModelInputs:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            remedy = (
                "; let the tokenizer make tensors: tokenizer(..., return_tensors='pt')" if name == "input_ids" else ""
            )
            raise ValueError(f"the argument '{name}' of the model is a {type(value).__name__}, and no tensor{remedy}")
    ids = given.get("input_ids")
    media = next((name for name in MEDIA if name in given), None)
    if (ids is not None or media is not None) and any(name in given for name in SECOND):
        first = {} if ids is None else {"input_ids": ids, MASK: torch.ones_like(ids)}
        inputs = TwoTexts(arguments={**first, **given})
        _, end = inputs.decoder.extent
        return replace(inputs, answer=end.to(inputs.device) - 1) if _has_head(model) else inputs
    if ids is not None and media is not None and _has_towers(model):
        return TextsAndImages(arguments={"input_ids": ids, MASK: torch.ones_like(ids), **given})
    if ids is None or not _has_head(model):
        return ModelInputs(arguments=dict(given))
    if ids.ndim != 2:
        raise ValueError(f"input_ids has the shape {tuple(ids.shape)}; give (batch, tokens)")
    inputs = ModelInputs(arguments={"input_ids": ids, MASK: torch.ones_like(ids), **given})
    assert inputs.tokens is not None, "a text with a mask has tokens"
    return replace(inputs, answer=inputs.tokens[:, 1] - 1)


def _has_towers(model: nn.Module) -> bool:
    """Whether texts and images each have a tower of their own, so that positions count tokens or patches."""
    row = architecture(model)
    return row is not None and row.media is not None and set(row.stacks) == {"text", "vision"}


def _has_head(model: nn.Module) -> bool:
    """Whether the model has a language-model head, so that one token answers."""
    inner: Any = unwrap(model)
    return hasattr(inner, "get_output_embeddings") and inner.get_output_embeddings() is not None
