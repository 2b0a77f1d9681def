"""Training with interventions: one at each site, or one for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.networks.base import Network
from itrain.sites import Site
from itrain.training.base import Training
from itrain.training.optimization import OptimizerFactory

Interventions = Mapping[Site, Intervention]


class InterventionTraining(Training):
    """Interventions at sites of a base model.

    Args:
        network: the base model.
        sites: one or several sites; each has an intervention of its own unless ``shared``. The positions of one site
            share its intervention; for one each, list them as sites.
        intervention: from the number of features to the intervention, for example ``partial(LoReFT, rank=4)``.
        optimizer: from the parameters to the optimizer; None is for evaluation only.
        warmup: share of the steps in which the learning rate rises.
        shared: one intervention for all sites.
        hidden_sizes: features that each site's intervention sees; None asks the network, which knows them for named
            components.

    Raises:
        ValueError: sites of different sizes are to share an intervention.
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
        hidden_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.sites, self.shared = tuple(sites), shared
        self.intervention, self.optimizer, self.warmup = intervention, optimizer, warmup
        sizes = hidden_sizes or [network.hidden_size(site) for site in self.sites]
        if shared and len(set(sizes)) > 1:
            listed = ", ".join(f"{site} {size}" for site, size in zip(self.sites, sizes, strict=True))
            raise ValueError(f"sites of different sizes cannot share an intervention: {listed}")
        built = [intervention(sizes[0])] * len(sizes) if shared else [intervention(size) for size in sizes]
        self.interventions = nn.ModuleDict({_key(site): each for site, each in zip(self.sites, built, strict=True)})
        self.network = network

    @property
    def trained(self) -> Interventions:
        """The intervention of each site."""
        return {site: self.interventions[_key(site)] for site in self.sites}  # type: ignore[misc]

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        """The intervention of each site, under the site's name."""
        return {str(site): intervention for site, intervention in self.trained.items()}

    @property
    def exported(self) -> nn.Module:
        return self.interventions

    def arguments(self) -> dict[str, Any]:
        return {
            "sites": self.sites,
            "intervention": self.intervention,
            "shared": self.shared,
            "hidden_sizes": [each.hidden_size for each in self.trained.values()],
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group for each in dict.fromkeys(self.trained.values()) for group in each.parameter_groups()]

    def anneal(self, progress: float) -> None:
        for intervention in self.trained.values():
            intervention.anneal(progress)

    def penalty(self) -> Tensor | float:
        """What the interventions' sizes add to the loss."""
        penalties = (intervention.penalty() for intervention in dict.fromkeys(self.trained.values()))
        return sum((each for each in penalties if each is not None), 0.0)

    def fit_to(self, examples: Iterable[tuple[ModelInputs, Int[Tensor, " batch"] | None]]) -> None:
        """Give interventions that need closed-form statistics the activations of inputs, and the inputs' classes."""
        wanted = {site: each for site, each in self.trained.items() if each.fits_activations}
        if not wanted:
            return
        found: dict[Site, list[Tensor]] = {site: [] for site in wanted}
        classes: dict[Site, list[Tensor]] = {site: [] for site in wanted}
        device = next(self.network.parameters()).device
        with torch.no_grad():
            for inputs, values in examples:
                for site, activation in self.network.read(inputs.to(device), wanted).items():
                    rows, of = self._rows(activation, inputs, site)
                    found[site].append(rows)
                    classes[site] += [] if values is None else [values.to(device)[of]]
        for site, intervention in wanted.items():
            intervention.fit(torch.cat(found[site]), torch.cat(classes[site]) if classes[site] else None)

    def _rows(
        self, activation: Tensor, inputs: ModelInputs, site: Site
    ) -> tuple[Float[Tensor, "rows hidden"], Int[Tensor, " rows"]]:
        """The activation as rows, without tokens that an example lacks, and the example that each row is of."""
        example = torch.arange(len(activation), device=activation.device)
        if site.position is None:
            inside = activation[..., 0].numel() // len(activation)
            return activation.flatten(0, -2), example.repeat_interleave(inside)
        present = inputs.present(site).to(activation.device)
        return activation[present], example[:, None].expand_as(present)[present]


def _key(site: Site) -> str:
    """The site as a module's name, which may hold no dots."""
    return str(site).replace(".", "_")
