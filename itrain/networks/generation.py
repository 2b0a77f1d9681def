"""Generation: continues prompts by the model's own ``generate``, with draws and checks of ours.

Tensor letters: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from traceback import walk_tb
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from itrain.inputs import ModelInputs


def generate(
    model: nn.Module,
    prompts: ModelInputs,
    *,
    max_new_tokens: int,
    end: int | None,
    generators: Sequence[torch.Generator] | None,
    settings: Mapping[str, Any],
) -> Int[Tensor, "rows new"]:
    """The new tokens after prompts that are padded on the left; the arguments are those of ``Network.generate``.

    Raises:
        ValueError: the model does not generate text or refuses a setting, or there are not as many generators as rows.
        RuntimeError: the largest logit of some text is not finite, so that it has no next token.
    """
    if not hasattr(model, "generate"):
        raise ValueError(
            f"{type(model).__name__} keeps no keys and values to generate text from: its class has no generate()"
        )
    chosen: dict[str, Any] = {"do_sample": False, "num_beams": 1, **settings, "max_new_tokens": max_new_tokens}
    chosen.setdefault("eos_token_id", end)
    chosen.setdefault("pad_token_id", 0 if end is None else end)
    checks = [_require_finite(prompts), *chosen.pop("logits_processor", ())]
    draws = nullcontext() if generators is None else _DrawnByRow(generators)
    with _without_defaults(model), draws:
        try:
            made: Any = model.generate(**prompts.arguments, logits_processor=checks, **chosen)  # type: ignore[operator]
        except (ValueError, TypeError) as error:
            if not _raised_by_transformers(error):
                raise
            raise ValueError(f"{type(model).__name__}.generate: {' '.join(str(error).split())}") from error
    tokens = made if isinstance(made, Tensor) else made.sequences
    return tokens[:, prompts.length :]


def _raised_by_transformers(error: Exception) -> bool:
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("transformers.")


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """Put the model's own GenerationConfig aside, whose penalties and temperatures nobody has asked for."""
    own = model.generation_config
    model.generation_config = type(own)()
    try:
        yield
    finally:
        model.generation_config = own


def _require_finite(prompts: ModelInputs) -> Callable[[Tensor, Tensor], Tensor]:
    """What is shown the logits of each step, (rows, V), and hands them on."""

    def check(input_ids: Tensor, scores: Float[Tensor, "rows vocabulary"]) -> Tensor:
        lost = ~scores.amax(-1).isfinite()
        if bool(lost.any()):
            row = int(lost.nonzero()[0, 0]) // (len(scores) // prompts.batch_size)
            raise RuntimeError(
                f"the model's logits after {prompts.name(row)} are not finite, so there is no next token; load the "
                "model in another precision, or look for weights of model and intervention that are not finite"
            )
        return scores

    return check


class _DrawnByRow(TorchFunctionMode):
    """Draws each row of ``torch.multinomial`` with a generator of its own.

    ``generate`` draws all rows from torch's one generator, so that a row's tokens would depend on its batch.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.generators = generators

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if function is not torch.multinomial:
            return function(*args, **given)
        chances, *rest = args
        if len(chances) != len(self.generators):
            raise ValueError(
                f"{len(self.generators)} generators are given and {len(chances)} rows drawn; give one for each row"
            )
        drawn = [
            torch.multinomial(chance, *rest, generator=generator, **given)
            for chance, generator in zip(chances, self.generators, strict=True)
        ]
        return torch.stack(drawn)
