"""Placed: a training that holds an interchange, and says by it where it acts and what is trained there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from torch import nn

from itrain.placements import Placement
from itrain.training.interchange import Interchange, Interventions

Held = TypeVar("Held", bound=Interchange)
"""The kind of interchange that is held."""


class Placed(Generic[Held]):
    """Answers for a training what its interchange knows; stands before :class:`~itrain.training.base.Training`."""

    interchange: Held

    @property
    def placements(self) -> tuple[Placement, ...]:
        return self.interchange.placements

    @property
    def trained(self) -> Interventions:
        """The intervention of each placement."""
        return self.interchange.trained

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        """The intervention of each placement, under its name."""
        return self.interchange.parts

    @property
    def exported(self) -> nn.Module:
        return self.interchange.interventions

    @property
    def fits_activations(self) -> bool:
        return self.interchange.fits_activations

    def learn_statistics(self, batches: Iterable[Any]) -> None:
        """Fit closed-form statistics to the activations of the training pairs."""
        self.interchange.learn(batches)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.interchange.parameter_groups()

    def anneal(self, progress: float) -> None:
        self.interchange.anneal(progress)
