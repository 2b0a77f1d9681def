"""Compares a replay with plain hooks, on one example of each layout in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from itrain.inputs import ModelInputs
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import Edit, EditAt, Edits
from itrain.networks.replay.compiled import CompileError
from itrain.networks.replay.eligible import precision
from itrain.weights import without_values

TOLERANCE = 1e-4
"""How far a replay's answer and gradient may be from plain hooks', relative to their norms."""

Run = Callable[[Sequence[Edits]], list[Tensor]]
"""From the members' edits to their answers."""

Values = Mapping[tuple[int, int], Tensor]
"""What each member's edits make of their activations."""


class Probed(NamedTuple):
    """Answers and what edits were given, and the gradients in what they made of it of a fixed sum of the answers."""

    results: list[Tensor]
    gradients: list[Tensor]

    def take(self, rows: Int[Tensor, " examples"]) -> Probed:
        return Probed(*([each[rows] for each in part] for part in self))

    def distance(self, expected: Probed, values: Values, *, least: float) -> float:
        """The largest difference relative to norms.

        A gradient's norm counts as no less than ``least`` of what gradients of such sums are like: all of one that is 0
        but for rounding may differ.
        """
        if without_values():
            return 0.0
        size = max((float(each.norm()) for each in values.values()), default=1.0)
        usual = sum(float(each.norm()) for each in expected.results) / max(size, 1e-30)
        scale = least * max([usual, *(float(each.norm()) for each in expected.gradients)])
        pairs = [(a, b, 1e-30) for a, b in zip(self.results, expected.results, strict=True)]
        pairs += [(a, b, max(scale, 1e-30)) for a, b in zip(self.gradients, expected.gradients, strict=True)]
        # Of numbers among which one is none, torch's maximum is none either, unlike Python's.
        return float(torch.tensor([(a - b).norm() / b.norm().clamp(min=smallest) for a, b, smallest in pairs]).max())


class Difference(NamedTuple):
    """How a replay differs from plain hooks, and the error that it fails with, if it does."""

    reason: str
    error: Exception | None = None


class StaleError(Exception):
    """What was kept is not what the model puts out any more."""


def difference(hooked: HookedNetwork, inputs: ModelInputs, members: Sequence[Edits], replay: Run) -> Difference | None:
    """How the replay of the members' edits differs from plain hooks by more than rounding; None where it does not.

    Answers, what edits are given and, if gradients are on, those in what edits make of it are compared, for an example
    of each layout.

    Raises:
        CompileError: compiled blocks fail.
    """
    rows = _one_of_each(inputs)
    try:
        found, made = _probe(replay, members)
    except CompileError:
        raise
    except Exception as error:
        _probe(partial(hooked.edit_each, inputs), members)  # raises what is the edits' own fault
        return failure(error)
    found, values = found.take(rows), {key: each[rows] for key, each in made.items()}
    expected, _ = _probe(partial(hooked.edit_each, inputs.take(rows)), members, values)
    tolerance = _tolerance(hooked.model)
    worst = found.distance(expected, values, least=16 * torch.finfo(precision(hooked.model)).eps / tolerance)
    # A NaN must fail this too.
    if worst <= tolerance:
        return None
    return Difference(f"answer or gradient differs from plain hooks by {worst:.1e} of its norm")


def alike(kept: Tensor, found: Tensor, model: nn.Module) -> bool:
    """Whether an activation of the model that was kept is the one that was found, to rounding."""
    return bool((kept - found).norm() <= _tolerance(model) * found.norm())


def _tolerance(model: nn.Module) -> float:
    # A few roundings, where the model's precision is so low that these are more.
    return max(TOLERANCE, 8 * torch.finfo(precision(model)).eps)


def failure(error: Exception) -> Difference:
    """That of a replay which fails."""
    return Difference(f"it fails with {type(error).__name__}: {error}", error)


def _one_of_each(inputs: ModelInputs) -> Int[Tensor, " examples"]:
    """The first example of each layout of tokens, spans and answer that there is."""
    layout = [*inputs.extent, *(span for _, span in sorted(inputs.spans.items()))]
    layout += [each for each in (inputs.tokens, inputs.answer) if each is not None]
    table = torch.cat([each.cpu().view(inputs.batch_size, -1) for each in layout], 1).tolist()
    first = {tuple(each): row for row, each in reversed(list(enumerate(table)))}
    return torch.tensor(sorted(first.values()))


def _probe(run: Run, members: Sequence[Edits], values: Values | None = None) -> tuple[Probed, Values]:
    """What a run of the edits shows, and what they make of their activations.

    With ``values`` edits are not called again: they may be random.
    """
    made: dict[tuple[int, int], Tensor] = {}
    given: dict[tuple[int, int], Tensor] = {}

    def probe(key: tuple[int, int], apply: Edit, base: Tensor) -> Tensor:
        # With gradients, if they are on: a parametrisation computed without would be cached without for the step.
        new = apply(base) if values is None else values[key]
        made[key] = new.detach().clone().requires_grad_(torch.is_grad_enabled())
        given[key] = base.detach()
        return made[key]

    probes = [
        [part._replace(edit=partial(probe, (member, number), part.edit)) for number, part in enumerate(_parts(edits))]
        for member, edits in enumerate(members)
    ]
    # The edits' random numbers must be those that they would draw without the trial.
    device = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=device):
        found = [answer.float() for answer in run(probes)]
    keys = sorted(made)
    results = [*(answer.detach() for answer in found), *(given[key] for key in keys)]
    gradients: Sequence[Tensor] = ()
    if torch.is_grad_enabled() and made:  # no example may have the tokens that are edited
        # Not of squares: their sum is the same whatever a last norm is given.
        total = torch.stack([(answer * _weights(answer)).sum() for answer in found]).sum()
        made_of = [made[key] for key in keys]
        gradients = torch.autograd.grad(total, made_of, allow_unused=True, materialize_grads=True)
    return Probed(results, list(gradients)), {key: each.detach() for key, each in made.items()}


def _parts(edits: Edits) -> list[EditAt]:
    """The edits of prompts and of responses, apart where different functions make them."""
    at = [each if isinstance(each, EditAt) else EditAt(*each) for each in edits]
    return [part for each in at for part in each.parts]


def _weights(answer: Tensor) -> Tensor:
    """Different weights of an answer's last dimension."""
    return torch.arange(1, answer.shape[-1] + 1, device=answer.device).float().cos()
