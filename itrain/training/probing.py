"""ProbeTraining: trains probes that read a variable at the sites where interventions would act."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from itrain.data import CounterfactualBatch
from itrain.inputs import ModelInputs
from itrain.networks.replay import Network
from itrain.probes import LinearProbe
from itrain.sites import Site
from itrain.training.optimization import OptimizerFactory, with_linear_schedule


class ProbeTraining(lightning.LightningModule):
    """Trains a probe of each variable at each site on the bases' activations; the base model is frozen.

    loss = mean over sites and variables of cross entropy(probe(h_site(base)), value of the variable in the base's run).

    Args:
        network: the base model, frozen.
        sites: sites of one token each.
        classes: the number of values of each variable.
        probe: from features and classes to the probe.
        optimizer: from the parameters to the optimizer.
        warmup: share of the steps in which the learning rate rises.
        hidden_sizes: features at each site; None asks the network.

    Raises:
        ValueError: a site has several tokens.
    """

    def __init__(
        self,
        *,
        network: Network,
        sites: Sequence[Site],
        classes: Mapping[str, int],
        optimizer: OptimizerFactory,
        probe: Callable[..., LinearProbe] = LinearProbe,
        warmup: float = 0.1,
        hidden_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.sites, self.classes = tuple(sites), dict(classes)
        self.optimizer, self.warmup = optimizer, warmup
        sizes = hidden_sizes or [network.hidden_size(site) for site in self.sites]
        self.probes = nn.ModuleDict(
            {
                self._key(site, variable): probe(size, num_classes=count)
                for site, size in zip(self.sites, sizes, strict=True)
                for variable, count in self.classes.items()
            }
        )
        self.network = network
        self.accuracies: dict[str, MulticlassAccuracy] = {}

    def training_step(self, batch: CounterfactualBatch, batch_idx: int) -> Tensor:
        losses = [cross_entropy(scores, values) for scores, values in self.predictions(batch).values()]
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss * batch.weight

    def predictions(self, batch: CounterfactualBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Scores (B, classes) and true values (B,) for each site and variable."""
        activations = self._read(batch.base)
        return {
            key: (self.probes[key](activations[site]), batch.variables[variable])
            for site in self.sites
            for variable in self.classes
            for key in [self._key(site, variable)]
        }

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        """The probe of each site and variable, under the site's name."""
        return {str(site): self.probes[self._key(site, variable)] for site in self.sites for variable in self.classes}

    def fit_activations(self, batches: Iterable[CounterfactualBatch]) -> None:
        """Give the probes the scale of the training activations."""
        found: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        device = next(self.network.parameters()).device
        with torch.no_grad():
            for batch in batches:
                for site, activation in self._read(batch.base.to(device)).items():
                    found[site].append(activation)
        for site in self.sites:
            for variable in self.classes:
                cast(LinearProbe, self.probes[self._key(site, variable)]).fit(torch.cat(found[site]))

    def validation_step(self, batch: CounterfactualBatch, batch_idx: int) -> None:
        self._score("validation", batch)

    def test_step(self, batch: CounterfactualBatch, batch_idx: int) -> None:
        self._score("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._report()

    def on_test_epoch_end(self) -> None:
        self._report()

    def configure_optimizers(self) -> dict[str, Any]:
        return with_linear_schedule(self.optimizer(self.probes.parameters()), self.trainer, self.warmup)

    def _read(self, inputs: ModelInputs) -> dict[Site, Tensor]:
        activations = self.network.read(inputs, self.sites)
        for site, activation in activations.items():
            if activation.ndim == 3 and activation.shape[1] != 1:
                raise ValueError(
                    f"site '{site}' has {activation.shape[1]} tokens; a probe reads one, such as '{site.terms[0]}.last'"
                )
        return {site: activation.flatten(1) for site, activation in activations.items()}

    def _score(self, split: str, batch: CounterfactualBatch) -> None:
        for key, (scores, values) in self.predictions(batch).items():
            name = f"{split}/probe_accuracy/{key}"
            if name not in self.accuracies:
                self.accuracies[name] = MulticlassAccuracy(scores.shape[-1], average="micro").to(self.device)
            self.accuracies[name].update(scores, values)

    def _report(self) -> None:
        results = {name: metric.compute() for name, metric in self.accuracies.items()}
        self.log_dict(results, sync_dist=True)
        split = next(iter(results)).partition("/")[0]
        self.log(f"{split}/probe_accuracy", torch.stack(list(results.values())).mean(), sync_dist=True)
        self.accuracies.clear()

    @staticmethod
    def _key(site: Site, variable: str) -> str:
        return f"{variable} {site}".replace(".", "_")
