"""Counting: as many responses as objects were shown, and recurrent networks that have learned it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from itrain.bounds import require_at_least
from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ModelInputs
from itrain.tasks.base import Pair, Split, Task
from itrain.tasks.sequences import Sequences
from itrain.tasks.teaching import seeded, teach

RESPONSE, END = 0, 1
"""The symbols that are written; they are read too."""
BEGIN, TRIGGER, OBJECT = 2, 3, 4
"""The other symbols that are read; those of objects begin with the last one."""
KINDS = 3
"""The kinds of objects."""
NOTHING = -1
"""Stands where nothing is read."""
HELD_OUT = (4, 9, 14, 17)


class Counting(Task):
    """As many responses as objects were shown, and then the end: how far a run has counted is a variable, ``count``.

    A run is looked at after ``at`` of its symbols. While objects are shown, ``count`` is how many were; from the
    trigger on, how many responses are to come. It is interchanged between two moments, and the run goes on: with the
    objects that it still shows, the trigger, and the answer, whose end is said again up to the longest one's length.

    Base, source and counterfactual of training and validation pairs have none of the held-out numbers of objects; base
    and source of test pairs have no others.

    Grant 2025, "Model Alignment Search" (arXiv 2501.06164), task MultiObject; there the phase, whether objects are
    shown or responses given, is interchanged together with the count.

    Args:
        max_count: the most objects.
        held_out: numbers of objects in test pairs.
        phases: ``same`` interchanges counts of one phase, ``any`` of either, so that the count alone must move.

    Raises:
        ValueError: numbers that are held out are not among those of objects, or leave none.
    """

    variables = ("count",)

    def __init__(
        self,
        *,
        max_count: int = 20,
        held_out: Sequence[int] = HELD_OUT,
        phases: Literal["same", "any"] = "same",
    ) -> None:
        self.phases = phases
        self.max_count, self.held_out, self.seen = max_count, tuple(held_out), numbers_of(max_count, held_out)
        if not held_out:
            raise ValueError("held_out is empty; name the numbers of objects in test pairs")
        self.causal_model = CausalModel(
            inputs={
                "objects": range(1, max_count + 1),
                "kinds": range(KINDS**max_count),
                "at": range(2 * max_count + 2),
            },
            mechanisms={
                "count": lambda objects, at: at if at <= objects else max(2 * objects + 1 - at, 0),
                "ahead": lambda objects, at: max(objects - at, 0),
                "said": self._said,
            },
            output="said",
        )

    @property
    def outputs(self) -> Sequence[tuple[int, ...]]:
        return Sequences(classes=2, length=self.max_count + 1)

    def values(self, variable: str) -> Sequence[Any]:
        return range(self.max_count + 1) if variable == "count" else super().values(variable)

    def label(self, output: tuple[int, ...]) -> tuple[int, ...]:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        drawn = self.held_out if split == "test" else self.seen
        allowed = range(1, self.max_count + 1) if split == "test" else self.seen
        while True:
            base, source = self._run(random, drawn), self._run(random, drawn)
            if self.phases == "same" and _answers(base) != _answers(source):
                continue
            objects, at = base["objects"], base["at"]
            # What the base has shown or answered, or has yet to show, comes to what the source has counted.
            other = at - objects - 1 if _answers(base) else objects - at
            if self.causal_model.run(source)["count"] + other in allowed:
                return Pair(base=base, sources={"count": source})

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        read = torch.full((len(settings), 2 * self.max_count + 2), NOTHING)
        after = torch.full((len(settings), self.max_count + 1), NOTHING)
        for row, setting in enumerate(settings):
            before, later = self._symbols(setting)
            read[row, read.shape[1] - len(before) :] = torch.tensor(before)
            after[row, after.shape[1] - len(later) :] = torch.tensor(later, dtype=torch.long)
        return ModelInputs(arguments={"input": read, "after": after})

    def told(self, settings: Sequence[Setting], answers: Sequence[Sequence[int]]) -> ModelInputs:
        return ModelInputs(arguments={**self.inputs(settings).arguments, "told": torch.tensor(answers)})

    def _run(self, random: Random, numbers: Sequence[int]) -> Setting:
        objects = random.choice(numbers)
        kinds = random.randrange(KINDS**self.max_count)
        return {"objects": objects, "kinds": kinds, "at": random.randrange(2 * objects + 2)}

    def _said(self, count: int, ahead: int) -> tuple[int, ...]:
        responses = count + ahead
        return (RESPONSE,) * responses + (END,) * (self.max_count + 1 - responses)

    def _symbols(self, setting: Setting) -> tuple[list[int], list[int]]:
        """What a run reads up to the moment at which it is looked at, and what it reads from there to its answer."""
        objects = setting["objects"]
        shown = [OBJECT + setting["kinds"] // KINDS**place % KINDS for place in range(objects)]
        read, at = [*shown, TRIGGER], min(setting["at"], 2 * objects + 1)
        answered = [RESPONSE] * (at - len(read))
        return [BEGIN, *read[:at], *answered], read[at:]


def _answers(setting: Setting) -> bool:
    """Whether the trigger has been read."""
    return setting["at"] > setting["objects"]


class Counter(nn.Module):
    """A gated recurrent cell that reads symbols and then writes responses and the end.

    ``module:state.output`` is the state after the symbols of ``input``, from which it goes on alone: it reads those of
    ``after`` and writes. Where nothing is read the state stays.
    """

    def __init__(self, *, hidden_size: int = 20, length: int = 21) -> None:
        super().__init__()
        require_at_least(1, hidden_size=hidden_size, length=length)
        self.length = length
        self.embedding = nn.Embedding(OBJECT + KINDS, hidden_size)
        self.cell = nn.GRUCell(hidden_size, hidden_size)
        self.state = nn.Identity()
        self.scores = nn.Linear(hidden_size, 2)

    def forward(
        self,
        input: Int[Tensor, "batch read"],
        after: Int[Tensor, "batch later"],
        told: Int[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length 2"]:
        """The scores of response and end at each place, after the symbols it is told, or else its own likeliest."""
        state = self.embedding.weight.new_zeros(len(input), self.cell.hidden_size)
        state = self.read(after, self.state(self.read(input, state)))
        found = [self.scores(state)]
        for place in range(1, self.length if told is None else told.shape[1]):
            last = found[-1].argmax(-1) if told is None else told[:, place - 1]
            state = self.cell(self.embedding(last), state)
            found.append(self.scores(state))
        return torch.stack(found, 1)

    def read(
        self, symbols: Int[Tensor, "batch read"], state: Float[Tensor, "batch hidden"]
    ) -> Float[Tensor, "batch hidden"]:
        """The state after the symbols."""
        for symbol in symbols.unbind(1):
            new = self.cell(self.embedding(symbol.clamp(min=0)), state)
            state = new.where((symbol != NOTHING)[:, None], state)
        return state


def trained_counter(
    *,
    max_count: int = 20,
    hidden_size: int = 20,
    held_out: Sequence[int] = HELD_OUT,
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 1e-2,
) -> Counter:
    """A network trained on new runs in each step; the same weights each time.

    Args:
        max_count: the most objects.
        hidden_size: of the network.
        held_out: numbers of objects that it never sees.
        seed: of its start and of the runs.
        steps, batch_size, learning_rate: of Adam, whose rate falls linearly to 0.
    """
    require_at_least(1, batch_size=batch_size)
    seen = torch.tensor(numbers_of(max_count, held_out))
    with seeded(seed) as generator:
        model, places = Counter(hidden_size=hidden_size, length=max_count + 1), torch.arange(max_count + 1)

        def loss() -> Float[Tensor, ""]:
            objects = seen[torch.randint(len(seen), (batch_size, 1), generator=generator)]
            shown = torch.randint(OBJECT, OBJECT + KINDS, (batch_size, max_count), generator=generator)
            shown = shown.where(places[:-1] >= max_count - objects, NOTHING)
            begin, trigger = torch.full_like(objects, BEGIN), torch.full_like(objects, TRIGGER)
            said = (places >= objects).long() * END
            scores = model(torch.cat([begin, shown, trigger], 1), trigger[:, :0], said)
            return cross_entropy(scores.flatten(0, 1), said.flatten())

        teach(model, loss, steps=steps, rate=learning_rate)
    return model


def numbers_of(max_count: int, held_out: Sequence[int]) -> list[int]:
    """The numbers of objects that are not held out.

    Raises:
        ValueError: one that is held out is not among them, or none is left.
    """
    require_at_least(2, max_count=max_count)
    every = range(1, max_count + 1)
    if strange := [each for each in held_out if each not in every]:
        raise ValueError(f"held_out: {strange[0]} is no number of objects up to max_count={max_count}")
    left = [each for each in every if each not in held_out]
    if not left:
        raise ValueError("held_out: all numbers of objects are, and none is left; hold out fewer")
    return left
