"""Readouts: linear heads that are trained beside a model to read variables where interventions write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from itrain.data import CounterfactualBatch
from itrain.precision import FullPrecision
from itrain.training.interchange import Interchange


class Readouts(nn.ModuleList):
    """A linear head W_v block_v + b_v for each variable v that a placement serves, in the order of the placements.

    block_v is what an edit of v alone would take from the activation that the placement reads, zero elsewhere.

    Args:
        interchange: the placements and their interventions.
        classes: the number of values of each variable.

    Raises:
        ValueError: the variables' numbers of values are not given.
    """

    def __init__(self, interchange: Interchange, *, classes: Mapping[str, int] | None) -> None:
        if not classes:
            raise ValueError(
                "readout_weight trains linear heads, which need each variable's number of values: "
                "classes={variable: len(task.values(variable)) for variable in task.variables}"
            )
        super().__init__(
            FullPrecision(
                {
                    variable: nn.Linear(each.hidden_size, count)
                    for variable, count in classes.items()
                    if placement.serves(variable)
                }
            )
            for placement, each in interchange.trained.items()
        )

    def losses(self, interchange: Interchange, batch: CounterfactualBatch) -> Float[Tensor, " batch"]:
        """The mean cross entropy of the heads, which read the variables' values from the bases.

        Raises:
            ValueError: a site has several tokens, which no head can tell apart.
        """
        placements = interchange.placements
        activations = interchange.network.read(batch.base, [each.read for each in placements])
        losses = []
        for placement, heads in zip(placements, self, strict=True):
            site = placement.read
            activation = interchange.joined(activations[site])
            if activation.ndim == 3 and activation.shape[1] != 1:
                raise ValueError(f"site '{site}' has {activation.shape[1]} tokens; join_positions=True reads them all")
            activation = activation.flatten(1)
            for variable, head in cast(FullPrecision, heads).items():
                block = interchange.trained[placement].edit_for(variable)(torch.zeros_like(activation), activation)
                losses.append(cross_entropy(head(block), batch.variables[variable], reduction="none"))
        return torch.stack(losses).mean(0)
