"""CausalTracing: restores parts of a run that noise has corrupted, and sees how far the answer comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics import MeanMetric

from itrain.data import CounterfactualBatch
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.interventions.controls import FullVector
from itrain.metrics import RULES, is_right
from itrain.networks.base import Network
from itrain.networks.lane import Edit
from itrain.sites import Site
from itrain.training.interchange import Activations, Interchange
from itrain.training.interventions import Interventions
from itrain.training.optimization import OptimizerFactory


class CausalTracing(Interchange):
    """Restores sites of a corrupted run from the clean one; nothing is trained.

    The clean run is that of the base. In the corrupted one the site ``corrupted``, the subject's tokens at the model's
    entrance, is h + noise * sigma * e with e ~ N(0, 1), alike for an example whatever is restored. The figures are of
    the clean answer, the base's: its mean probability, and how often it wins (``argmax``: against the vocabulary,
    ``pairwise``: against the pair's other answer). To swap the subject instead is to interchange full vectors.

    Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2.1.

    Args:
        network, sites, intervention, optimizer, warmup, shared, hidden_sizes: as in
            :class:`~itrain.training.interventions.InterventionTraining`; an intervention is given the corrupted
            activation as base and the clean one as source. Several sites are restored together; none is the corrupted
            run itself.
        corrupted: the site that gets the noise.
        noise: its size, in standard deviations sigma of the clean activations there.
        seed: of the noise.

    Raises:
        ValueError: the intervention has parameters, or answers are of several tokens.
    """

    def __init__(
        self,
        *,
        network: Network,
        sites: Sequence[Site],
        corrupted: str,
        noise: float = 3.0,
        seed: int = 0,
        intervention: Callable[[int], Intervention] = FullVector,
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
        shared: bool = False,
        hidden_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            network=network,
            sites=sites,
            intervention=intervention,
            optimizer=optimizer,
            warmup=warmup,
            shared=shared,
            hidden_sizes=hidden_sizes,
        )
        if learned := [each for each in self.trained.values() if list(each.parameters())]:
            raise ValueError(f"tracing trains nothing, and {type(learned[0]).__name__} is learned; use full_vector")
        self.corrupted, self.noise = Site.parse(corrupted), Noise(noise, seed=seed)
        self.means: dict[str, MeanMetric] = {}

    @property
    def exported(self) -> nn.Module:
        return nn.ModuleDict({"interventions": self.interventions, "noise": self.noise})

    def arguments(self) -> dict[str, Any]:
        known = {name: value for name, value in super().arguments().items() if name != "join_positions"}
        return {**known, "corrupted": str(self.corrupted), "noise": self.noise.scale, "seed": self.noise.seed}

    def references(self) -> dict[str, CausalTracing]:
        """The runs that a restored one lies between: ``corrupted``, nothing restored, and ``clean``, all of it."""
        found = {}
        for name, sites in {"corrupted": [], "clean": [self.corrupted]}.items():
            given = self.arguments() | {"sites": sites, "intervention": FullVector, "hidden_sizes": None}
            found[name] = CausalTracing(network=self.network, **given)
            found[name].noise = self.noise
        return found

    def fit_activations(self, batches: Iterable[CounterfactualBatch]) -> None:
        """Learn the standard deviation of the activations that get the noise."""
        batches = list(batches)
        super().fit_activations(batches)
        device, found = next(self.network.parameters()).device, []
        with torch.no_grad():
            for base in (batch.base.to(device) for batch in batches):
                activation = self.network.read(base, [self.corrupted])[self.corrupted]
                found.append(self._rows(activation, base, self.corrupted)[0])
        self.noise.deviation.copy_(torch.cat(found).std())

    @property
    def edited(self) -> tuple[Site, ...]:
        return (self.corrupted, *self.sites)

    def prepare(self, bases: Sequence[ModelInputs], sources: Sequence[ModelInputs]) -> str:
        return super().prepare(bases, bases)

    def read(self, batch: CounterfactualBatch, sites: Sequence[Site]) -> Activations:
        """What lies at the sites in the clean run."""
        return {"clean": self.network.read(batch.base, sites) if sites else {}}

    def edits(
        self, batch: CounterfactualBatch, interventions: Interventions, activations: Activations
    ) -> list[tuple[Site, Edit]]:
        """The noise, and after it what is restored."""
        clean = activations["clean"]
        restored = [(site, self._edit(each, clean.get(site), None)) for site, each in interventions.items()]
        return [(self.corrupted, partial(self.noise, examples=batch.base.facts.keys)), *restored]

    def on_test_start(self) -> None:
        self.evaluated = {"": {site: each.hardened() for site, each in self.trained.items()}}
        self.evaluated |= {f"/{name}": reference.trained for name, reference in self.references().items()}

    def measure(self, place: str, logits: Float[Tensor, "batch vocabulary"], batch: CounterfactualBatch) -> None:
        """Take the clean answers' probabilities, and whether they win, into the figures of a place."""
        label = batch.base_label
        if label.ndim > 1:
            raise ValueError("tracing follows answers of one token, and the task has some of several")
        other = batch.counterfactual_label.where(batch.changes, batch.contrast_label)
        found = {"probability": logits.float().softmax(-1).take_along_dim(label[:, None], 1)[:, 0]}
        found |= {rule: is_right(logits, label, other, rule) for rule in RULES}
        for figure, values in found.items():
            name = f"{place}/answer_{figure}"
            self.means.setdefault(name, MeanMetric().to(logits.device)).update(values.float())

    def figures(self) -> dict[str, Tensor]:
        """All figures of what was measured since the last call."""
        found = {name: mean.compute() for name, mean in self.means.items()}
        self.means.clear()
        return found


class Noise(nn.Module):
    """h + scale * sigma * e, e ~ N(0, 1) drawn for each example from the seed and the example's key.

    An example's noise so depends neither on the batch that it is in nor on the process that runs it.
    """

    deviation: Float[Tensor, ""]

    def __init__(self, scale: float, *, seed: int) -> None:
        super().__init__()
        self.scale, self.seed = scale, seed
        self.register_buffer("deviation", torch.tensor(torch.nan))

    def forward(
        self, activation: Float[Tensor, "batch *places features"], examples: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch *places features"]:
        if self.deviation.isnan():
            raise RuntimeError("the size of the noise is unknown: call fit_activations(batches) first")
        drawn = torch.stack([self._draw(key, activation.shape[1:]) for key in examples.tolist()])
        return activation + self.scale * self.deviation * drawn.to(activation)

    def _draw(self, key: int, shape: torch.Size) -> Float[Tensor, "*places features"]:
        generator = torch.Generator().manual_seed((key + self.seed) % 2**63)
        # Token by token: an example's draws must not depend on how many tokens the longest one in its batch has.
        places = [torch.randn(shape[-1], generator=generator) for _ in range(shape[:-1].numel())]
        return torch.stack(places).view(shape)
