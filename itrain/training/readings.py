"""What the detectors of a monitoring say of texts, token by token, as a monitor of a live model says it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from itrain.inputs import ModelInputs
from itrain.training.detecting import is_random
from itrain.training.monitor import Reading

if TYPE_CHECKING:
    from itrain.training.monitoring import Monitoring


@torch.no_grad()
def readings_of(training: Monitoring, inputs: ModelInputs) -> list[Reading]:
    """What the detectors, without the controls, say of each text and each of its tokens."""
    read, scored = training.read(inputs), training.scores(inputs)
    watching = [(number, each) for number, each in enumerate(training.each()) if not is_random(each[0])]
    of_tokens = {number: detector.token_scores(read[place.name][0]) for number, (_, place, detector) in watching}
    thresholds = {number: detector.thresholds.tolist() for number, (*_, detector) in watching}
    at = training.sites[0] if training.sites[0].position else training.sites[0].at("all")
    index, valid = inputs.indices(at, inputs.length)
    ids, found = inputs.arguments["input_ids"].gather(1, index), []
    names = {
        f"{concept} {name} {place.name}": (number, column)
        for number, (name, place, _) in watching
        for column, concept in enumerate(training.concepts)
    }
    for row in range(inputs.batch_size):
        own = torch.ones_like(index[row], dtype=torch.bool) if valid is None else valid[row]
        found.append(
            Reading(
                tokens=ids[row][own].cpu(),
                counted=training.counted(inputs, at)[row][own].cpu(),
                token_scores={name: of_tokens[n][row][own][:, c].cpu() for name, (n, c) in names.items()},
                scores={name: float(scored[row, n, c]) for name, (n, c) in names.items()},
                thresholds={name: thresholds[n][c] for name, (n, c) in names.items()},
            )
        )
    return found
