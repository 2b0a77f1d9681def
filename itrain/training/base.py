"""What all training modules have in common: a network, sites, parts that are trained, and a linear schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import lightning
from torch import nn

from itrain.inputs import ModelInputs
from itrain.networks.base import Network
from itrain.sites import Site
from itrain.training.optimization import OptimizerFactory, with_linear_schedule


class Training(lightning.LightningModule, ABC):
    """A LightningModule that trains something at sites of a base model.

    The network is registered after all that is trained beside it, because optimizer state is matched by position among
    all parameters when a checkpoint is read in another strategy.
    """

    trains_model: ClassVar[bool] = False
    """Whether the base model's own weights are trained."""
    shows_start: ClassVar[bool] = False
    """Whether a run tests the start too, and reports it as ``before/...``."""

    network: Network
    sites: tuple[Site, ...]
    optimizer: OptimizerFactory | None
    warmup: float

    @property
    @abstractmethod
    def trained_parts(self) -> dict[str, nn.Module]:
        """The modules that are trained, under names that messages use."""

    @property
    @abstractmethod
    def exported(self) -> nn.Module:
        """The module whose weights an export holds."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, without the network, that build what is exported again: sites, factories of
        modules as classes or partials of them, and plain data."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, as an optimizer takes it."""

    @property
    def edited(self) -> tuple[Site, ...]:
        """The sites that are edited in a run of the model."""
        return self.sites

    def fit_activations(self, batches: Iterable[Any]) -> None:
        """Learn closed-form statistics from the training data, before the first step."""

    def anneal(self, progress: float) -> None:
        """Set what schedules rule, for a share of the training from 0 to 1."""

    def prepare(self, bases: Sequence[ModelInputs], sources: Sequence[ModelInputs]) -> str:
        """Tell the network what it will be asked; the line that says how the model will be run."""
        return self.network.prepare([self.edited], bases, sources)

    def configure_optimizers(self) -> dict[str, Any]:
        if self.optimizer is None:
            raise ValueError("training needs an optimizer, for example optimizer=partial(torch.optim.Adam, lr=1e-2)")
        return with_linear_schedule(self.optimizer(self.parameter_groups()), self.trainer, self.warmup)
