"""What the detectors of a monitoring say of texts, token by token, as a monitor of a live model says it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.inputs import ModelInputs
from itrain.sites import Site
from itrain.training.detecting import is_random
from itrain.training.monitor import Reading

if TYPE_CHECKING:
    from itrain.training.monitoring import Monitoring


@torch.no_grad()
def readings_of(training: Monitoring, inputs: ModelInputs) -> list[Reading]:
    """What the detectors, without the controls, say of each text and each of its tokens.

    Where sites read other tokens than each other, each text is shown whole, with NaN at tokens that a site leaves out.
    """
    read, scored = training.read(inputs), training.scores(inputs)
    watching = [(number, each) for number, each in enumerate(training.each()) if not is_random(each[0])]
    thresholds = {number: detector.thresholds.tolist() for number, (*_, detector) in watching}
    positions = {site.position or "all" for site in training.sites}
    at = training.sites[0].at(positions.pop() if len(positions) == 1 else "all")
    of_tokens = {
        number: _at_tokens(detector.token_scores(read[place.name][0]), inputs, place.sites[0], at)
        for number, (_, place, detector) in watching
    }
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


def _at_tokens(
    scores: Float[Tensor, "batch tokens concepts"], inputs: ModelInputs, read: Site, shown: Site
) -> Float[Tensor, "batch shown concepts"]:
    """The scores of the tokens that one site reads, at those of another; NaN where it reads none."""
    concepts = scores.shape[2]
    index, wanted = (
        inputs.indices(site if site.position else site.at("all"), inputs.length).index.to(scores.device)
        for site in (read, shown)
    )
    every = scores.new_full((len(scores), inputs.length, concepts), torch.nan)
    # Slots that a text lacks repeat its first token, and write the same there.
    every.scatter_(1, index[..., None].expand(-1, -1, concepts), scores)
    return every.gather(1, wanted[..., None].expand(-1, -1, concepts))
