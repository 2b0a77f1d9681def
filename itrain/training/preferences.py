"""Preferences: of two responses to a prompt, steering is to make the one with the concept likelier."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid

from itrain.bounds import require_some
from itrain.data.responses import ResponseBatch, ResponseDataModule
from itrain.data.splits import SplitDataModule
from itrain.inputs import ModelInputs
from itrain.metrics import UNUSED
from itrain.networks.lane import EditAt, scaled
from itrain.training.magnitudes import vector_of

if TYPE_CHECKING:
    from itrain.training.steering import Steering

FACTORS = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0)
"""The strengths of training steps, where nothing else is said."""
Length = Literal["response", "text", "none"]


class Preference(nn.Module):
    """Reference-free preference steering: towards y_c, with the concept, under the vector, and away from it without.

    loss = -log sigma(D+) - log sigma(D-), with log p+ under h + a w, the strength a one of ``factors`` drawn for each
    batch, log p- under h - relu(h . w) / |w|^2 w, which takes the concept out, and log p of the model as it is:

    D+ = b+ / n(y_c) log p+(y_c | x) - 1 / n(y) log p+(y | x), b+ = max(log p(y | x) - log p(y_c | x), 1)

    D- = b- / n(y) log p-(y | x) - 1 / n(y_c) log p-(y_c | x), b- = max(log p(y_c | x) - log p(y | x), 1)

    Wu et al. 2025, "Improved Representation Steering for Language Models" (arXiv 2505.20809), RePS. There n(y) = |y|,
    the tokens of the response. Its code, of AxBench, divides by those of prompt and response together, draws a strength
    for each response, and learns a number that is added to the strength.

    Args:
        factors: the strengths that are drawn from.
        length: what n counts: the tokens of the ``response``, as in the paper; those of the ``text``, prompt and
            response, as in its code; or ``none``, n = 1, so that whole log probabilities are compared.
        suppress: train to take the concept out too, the second term.

    Raises:
        ValueError: no factor is given, or the length is none of these.
    """

    def __init__(
        self, *, factors: Sequence[float] = FACTORS, length: Length = "response", suppress: bool = True
    ) -> None:
        super().__init__()
        require_some(factors=factors)
        if length not in get_args(Length):
            raise ValueError(f"length={length!r}: use {', '.join(get_args(Length))}")
        self.factors, self.length, self.suppress = tuple(factors), length, suppress
        self.factor = self.factors[0]

    def anneal(self, progress: float) -> None:
        """Draw the strength of a step, from the progress of the fit: the same in every process and in a resumed fit."""
        self.factor = Random(round(progress * 2**40)).choice(self.factors)

    def require(self, data: SplitDataModule) -> None:
        """Have the data give responses to reject; refuse data that have none.

        Raises:
            ValueError: saying so.
        """
        if not (isinstance(data, ResponseDataModule) and data.add_rejected()):
            raise ValueError(
                "preference compares two responses to each prompt, and the task gives one; let its rejected() give the "
                "other, as task=stories does"
            )

    def forward(self, training: Steering, batch: ResponseBatch) -> Float[Tensor, " batch"]:
        """The loss of each prompt."""
        with torch.no_grad():
            liked, disliked = self._likelihoods(training, batch, [])
        plus = [each._replace(edit=scaled(each.edit, self.factor)) for each in training.edits()]
        with_concept, without = self._likelihoods(training, batch, plus)
        wanted, other = self._lengths(batch)
        up = (disliked - liked).clamp(min=1)
        losses = -logsigmoid(up * with_concept / wanted - without / other)
        if not self.suppress:
            return losses
        nulled = [
            each._replace(edit=partial(without_vector, vector_of(intervention)))
            for each, intervention in zip(training.edits(), training.trained.values(), strict=True)
        ]
        with_concept, without = self._likelihoods(training, batch, nulled)
        down = (liked - disliked).clamp(min=1)
        return losses - logsigmoid(down * without / other - with_concept / wanted)

    def _likelihoods(
        self, training: Steering, batch: ResponseBatch, edits: Sequence[EditAt]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """log p of the responses with the concept and of those without."""
        assert batch.rejected is not None, "the data has been checked"
        first, second = (
            likelihood(training.network.edit(each.inputs, edits), each.label) for each in (batch, batch.rejected)
        )
        return first, second

    def _lengths(self, batch: ResponseBatch) -> tuple[Tensor | float, Tensor | float]:
        assert batch.rejected is not None, "the data has been checked"
        if self.length == "none":
            return 1.0, 1.0
        first, second = ((each.label != UNUSED).sum(1) for each in (batch, batch.rejected))
        if self.length == "response":
            return first, second
        return first + prompt_length(batch.inputs), second + prompt_length(batch.rejected.inputs)


def prompt_length(inputs: ModelInputs) -> Int[Tensor, " batch"]:
    """How many tokens each prompt has, its special tokens among them."""
    assert inputs.answer is not None, "the response is read from the prompt's last token on"
    start, _ = inputs.extent
    return inputs.answer[:, 0] + 1 - start.to(inputs.answer.device, non_blocking=True)


def likelihood(
    logits: Float[Tensor, "batch response vocabulary"], label: Int[Tensor, "batch response"]
) -> Float[Tensor, " batch"]:
    """log p of each response: the sum over its tokens."""
    used = label != UNUSED
    each = log_softmax(logits.float(), -1).gather(-1, label.where(used, 0)[..., None])[..., 0]
    return (each * used).sum(1)


def without_vector(vector: Float[Tensor, " hidden"], base: Float[Tensor, "*batch hidden"]) -> Tensor:
    """h - relu(h . w) / |w|^2 w, where |w| is not 0."""
    vector = vector.to(base)
    along = (base @ vector).relu() / vector.square().sum().clamp(min=torch.finfo(vector.dtype).tiny)
    return base - along[..., None] * vector
