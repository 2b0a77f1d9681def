"""The answer of a run: the logits at the answer tokens alone, and each member's share of them.

Tensor letters: B batch, A answers, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import linear

from itrain.networks.lane import Lane

READ = ("decoder_input_ids", "input_ids", "inputs_embeds")
"""The arguments of which a model's head sees each token, the nearest to it first."""

Answers = tuple[Int[Tensor, "rows 1"], Int[Tensor, "rows answers"]]
"""The rows and tokens that answer in a run, (lanes * B, 1) and (lanes * B, A)."""


def answers(lanes: Sequence[Lane]) -> Answers | None:
    """Where a run's answers lie; None where all its output answers."""
    rows, tokens = [], []
    for lane in lanes:
        answer = lane.inputs.answer
        if answer is None:
            return None
        rows.append(torch.arange(lane.first, lane.first + len(answer)))
        tokens.append(answer.view(len(answer), -1) - (lane.shift or 0))
    return torch.cat(rows)[:, None].to(tokens[0].device, non_blocking=True), torch.cat(tokens)


def answer_only(
    model: Any,
    at: Answers,
    candidates: Int[Tensor, " candidates"] | None,
    arguments: Mapping[str, Any],
    stack: ExitStack,
    *,
    asked: bool = True,
) -> None:
    """Have the model's head compute nothing but the logits at the answer tokens, or the candidates' among them.

    ``arguments`` are those of the run, whose text has as many tokens as the head must be given. A model without a head
    is run as it is where no answer is ``asked`` for, but activations alone.

    Raises:
        ValueError: the model has no language-model head.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None and not asked:
        return
    if head is None:
        name = type(model).__name__
        raise ValueError(f"{name} has no language-model head, so it has no logits at answer tokens; load it with one")
    tokens = next((arguments[name].shape[1] for name in READ if name in arguments), None)
    stack.callback(head.register_forward_pre_hook(partial(keep_rows, at, tokens)).remove)
    if candidates is None:
        return
    candidates = candidates.clone() if candidates.is_inference() else candidates
    if type(head) is nn.Linear and not head._forward_hooks and "forward" not in head.__dict__:
        head.__dict__["forward"] = partial(_some_logits, head, candidates)
        stack.callback(head.__dict__.pop, "forward")
    else:
        # After the hooks of others and of sites, which see all.
        stack.callback(head.register_forward_hook(lambda head, args, logits: logits[..., candidates]).remove)


def each_answer(output: Any, lanes: Sequence[Lane]) -> list[Tensor]:
    """The answer of each lane, from the output of the run that they share.

    Raises:
        ValueError: the output has not the run's rows, so that it cannot be shared out.
    """
    inputs = lanes[0].inputs
    answer = output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]
    if inputs.answer is None and inputs.candidates is not None:
        answer = answer[..., inputs.candidates]
    elif inputs.answer is not None and inputs.answer.ndim == 1:
        answer = answer[:, 0]
    if len(lanes) == 1:
        return [answer]
    if hasattr(output, "logits_per_image"):
        raise ValueError(
            "the model compares each image of a run with all its texts, so that members cannot share the run; fit them "
            "apart"
        )
    if len(answer) != lanes[0].rows and inputs.answer is None:
        raise ValueError(
            f"the model's output has shape {tuple(answer.shape)} in a run of {lanes[0].rows} examples, so that "
            "members cannot share the run; fit them apart"
        )
    return list(answer.split(inputs.batch_size))


def keep_rows(at: Answers, tokens: int | None, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Only what the head makes of the answer tokens: the vocabulary is a small model's widest layer."""
    if tokens is not None and args[0].shape[1] != tokens:
        raise ValueError(
            f"the head is given {args[0].shape[1]} tokens where the text has {tokens}, so that the token that answers "
            "cannot be told; take a model that puts no tokens of its own before or after the text"
        )
    return (args[0][at], *args[1:])


def _some_logits(head: nn.Linear, candidates: Tensor, hidden: Tensor) -> Tensor:
    return linear(hidden, head.weight[candidates], None if head.bias is None else head.bias[candidates])
