"""AlignmentSearch: trains the edit that makes a frozen model behave as its causal model predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from itrain.data import CounterfactualBatch
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.interventions.controls import FullVector, RandomSubspace
from itrain.metrics import RULES, InterchangeAccuracy
from itrain.networks.hooks import Edit
from itrain.networks.replay import Network
from itrain.sites import Site
from itrain.training.optimization import OptimizerFactory, with_linear_schedule

Interventions = Mapping[Site, Intervention]


class AlignmentSearch(lightning.LightningModule):
    """Trains interventions at sites of a frozen model on the counterfactual labels of a causal model.

    loss = cross entropy(model(base | do(site := intervention(base, source))), counterfactual label), over the whole
    vocabulary at the answer token (Geiger et al. 2024, eq. 5). The interventions are registered before the network,
    because optimizer state is matched by position among all parameters when a checkpoint is read in another strategy.

    Args:
        network: the base model, frozen.
        sites: one or several sites; each has an intervention of its own unless ``shared``.
        intervention: from the number of features to the intervention, for example ``partial(DAS, rank=4)``.
        optimizer: from the parameters to the optimizer; None is for evaluation only.
        warmup: share of the steps in which the learning rate rises.
        shared: one intervention for all sites.
        join_positions: treat a site's positions as one vector of P * D features instead of P vectors of D.
        hidden_sizes: features that each site's intervention sees; None asks the network, which knows them for named
            components without joined positions. :func:`count_features` finds them out in the other cases.
    """

    def __init__(
        self,
        *,
        network: Network,
        sites: Sequence[Site],
        intervention: Callable[[int], Intervention],
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
        shared: bool = False,
        join_positions: bool = False,
        hidden_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.shared, self.join_positions = shared, join_positions
        self.intervention, self.optimizer, self.warmup = intervention, optimizer, warmup
        sizes = hidden_sizes or [network.hidden_size(site) for site in self.sites]
        if shared and len(set(sizes)) > 1:
            listed = ", ".join(f"{site} {size}" for site, size in zip(self.sites, sizes, strict=True))
            raise ValueError(f"sites of different sizes cannot share an intervention: {listed}")
        built = [intervention(sizes[0])] * len(sizes) if shared else [intervention(size) for size in sizes]
        self.interventions = nn.ModuleDict({_key(site): each for site, each in zip(self.sites, built, strict=True)})
        self.network = network
        self.controls: dict[str, Interventions] = {}
        self.metrics: dict[str, InterchangeAccuracy] = {}

    def training_step(self, batch: CounterfactualBatch, batch_idx: int) -> Tensor:
        logits = self.interchange(batch, self.trained)
        loss = cross_entropy(logits, batch.counterfactual_label)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss * batch.weight

    def interchange(
        self, batch: CounterfactualBatch, interventions: Interventions
    ) -> Float[Tensor, "batch vocabulary"]:
        """The model's answer on the bases when each variable's sites take their features from its sources."""
        if not batch.sources:
            raise ValueError("the batch has no sources, so there is no variable to interchange")
        edits: list[tuple[Site, Edit]] = []
        with parametrize.cached():
            for variable, source in batch.sources.items():
                activations = self._read(source, interventions)
                for site, intervention in interventions.items():
                    batch.base.require_same_count(source, site)
                    self._require_joinable(batch.base, site)
                    edits.append((site, self._edit(intervention.edit_for(variable), activations.get(site))))
            return self.network.edit(batch.base, edits)

    @property
    def trained(self) -> Interventions:
        """The intervention of each site."""
        return {site: self.interventions[_key(site)] for site in self.sites}  # type: ignore[misc]

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        """The intervention of each site, under the site's name."""
        return {str(site): intervention for site, intervention in self.trained.items()}

    def fit_activations(self, batches: Iterable[CounterfactualBatch]) -> None:
        """Give interventions that need closed-form statistics the base activations of the training pairs."""
        wanted = {site: each for site, each in self.trained.items() if each.fits_activations}
        if not wanted:
            return
        found: dict[Site, list[Tensor]] = {site: [] for site in wanted}
        device = next(self.network.parameters()).device
        with torch.no_grad():
            for batch in batches:
                for site, activation in self.network.read(batch.base.to(device), wanted).items():
                    if site.position is not None and not self.join_positions:
                        activation = activation[batch.base.present(site).to(device)]
                    found[site].append(self._joined(activation).flatten(0, -2))
        for site, intervention in wanted.items():
            intervention.fit(torch.cat(found[site]))

    def validation_step(self, batch: CounterfactualBatch, batch_idx: int) -> None:
        self._score("validation", batch, self.trained)

    def test_step(self, batch: CounterfactualBatch, batch_idx: int) -> None:
        self._score("test", batch, self.trained)
        for name, interventions in self.controls.items():
            self._score(f"test/{name}", batch, interventions)

    def on_validation_epoch_end(self) -> None:
        self._report()

    def on_test_start(self) -> None:
        full = {site: FullVector(each.hidden_size) for site, each in self.trained.items()}
        random = {
            site: RandomSubspace(each.hidden_size, rank=min(each.rank, each.hidden_size)).to(self.device)
            for site, each in self.trained.items()
        }
        self.controls = {"random_subspace": random, "full_vector": full}

    def on_test_epoch_end(self) -> None:
        self._report()

    def configure_optimizers(self) -> dict[str, Any]:
        if self.optimizer is None:
            raise ValueError("training needs an optimizer, for example optimizer=partial(torch.optim.Adam, lr=1e-2)")
        return with_linear_schedule(self.optimizer(self.interventions.parameters()), self.trainer, self.warmup)

    def _score(self, name: str, batch: CounterfactualBatch, interventions: Interventions) -> None:
        logits = self.interchange(batch, interventions)
        for rule in RULES:
            metric = f"{name}/{rule}"
            if metric not in self.metrics:
                self.metrics[metric] = InterchangeAccuracy(rule=rule).to(self.device)
            self.metrics[metric].update(logits, batch.counterfactual_label, batch.contrast_label, batch.changes)

    def _report(self) -> None:
        for name, metric in self.metrics.items():
            place, _, rule = name.rpartition("/")
            for key, value in metric.compute().items():
                label = f"{place}/{key}_{rule}" if key.startswith("iia") else f"{place}/{key}"
                self.log(label, value.float(), sync_dist=True)
        self.metrics.clear()

    def _read(self, source: ModelInputs, interventions: Interventions) -> dict[Site, Tensor]:
        sites = [site for site, intervention in interventions.items() if intervention.takes_source]
        return self.network.read(source, sites) if sites else {}

    def _edit(self, apply: Callable[[Tensor, Tensor | None], Tensor], source: Tensor | None) -> Edit:
        if not self.join_positions:
            return partial(_call, apply, source)
        joined = None if source is None else self._joined(source)
        return lambda base: apply(self._joined(base), joined).view_as(base)

    def _require_joinable(self, base: ModelInputs, site: Site) -> None:
        if self.join_positions and site.position is not None and not bool(base.present(site).all()):
            raise ValueError(f"site '{site}': examples have different numbers of tokens there, which cannot be joined")

    def _joined(self, activation: Tensor) -> Tensor:
        return activation.flatten(1) if self.join_positions else activation


def count_features(
    network: Network, sites: Sequence[Site], example: ModelInputs, *, join_positions: bool = False
) -> list[int]:
    """The features that an intervention at each site sees, from a run of the example where the modules do not tell."""
    if not join_positions:
        return [network.hidden_size(site, example) for site in sites]
    with torch.no_grad():
        activations = network.read(example, sites)
    return [activations[site].flatten(1).shape[1] for site in sites]


def _call(apply: Callable[[Tensor, Tensor | None], Tensor], source: Tensor | None, base: Tensor) -> Tensor:
    return apply(base, source)


def _key(site: Site) -> str:
    """The site as a module's name, which may hold no dots."""
    return str(site).replace(".", "_")
