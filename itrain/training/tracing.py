"""CausalTracing: restores parts of a run that noise has corrupted, and measures how far the answer returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from itrain.bounds import require_at_least
from itrain.data import CounterfactualBatch, Runs
from itrain.data.splits import SplitDataModule
from itrain.devices import device_of
from itrain.inputs import ModelInputs
from itrain.interventions.controls import FullVector
from itrain.metrics import RULES, gather_counts, is_right
from itrain.networks.base import Network
from itrain.networks.lane import Edit
from itrain.objectives.base import Edited
from itrain.placements import Factory, Placement, Placements
from itrain.sites import Site, SiteLike
from itrain.training.base import Training
from itrain.training.finite import FiniteAnswers, require_finite
from itrain.training.interchange import Activations, Interchange, Interventions, across, kept
from itrain.training.placed import Placed


class CausalTracing(Placed["Restoration"], Training):
    """Restores sites of a corrupted run from the clean one; nothing is trained.

    The clean run is the base's. In the corrupted run, the activation at ``corrupted``, the subject's tokens at the
    model's entrance, is h + noise * sigma * e with e ~ N(0, 1). An example's noise is the same whatever is restored.
    The figures are those of the clean answer: its mean probability, and how often it wins (``argmax``: against the
    vocabulary, ``pairwise``: against the pair's other answer). To swap the subject instead, interchange full vectors.

    Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2.1.

    Args:
        network: the base model.
        sites, intervention, shared, hidden_sizes: as in :class:`~itrain.training.interchange.Interchange`; an
            intervention is given the corrupted activation as base and the clean one as source. Several sites are
            restored together; without sites, the run is the corrupted one. A placement that reads another site restores
            from that site of the clean run; none names variables, as there are none.
        corrupted: the site that gets the noise.
        noise: its size, in standard deviations sigma of the clean activations there.
        seed: of the noise.

    Raises:
        ValueError: the intervention has parameters, a placement names variables, or answers have several tokens.
    """

    optimizer = None
    warmup = 0.0

    def __init__(
        self,
        *,
        network: Network,
        sites: Placements,
        corrupted: SiteLike,
        noise: float = 3.0,
        seed: int = 0,
        intervention: Factory = FullVector,
        shared: bool = False,
        hidden_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.remember(locals())
        require_at_least(0, noise=noise)
        if not noise:
            raise ValueError(
                f"noise={noise}: nothing would be corrupted, so that nothing is restored; give more than 0"
            )
        self.interchange = Restoration(
            network,
            corrupted=Site.parse(corrupted),
            noise=Noise(noise, seed=seed),
            sites=sites,
            intervention=intervention,
            shared=shared,
            hidden_sizes=hidden_sizes,
        )
        self.sites, self.corrupted = self.interchange.sites, self.interchange.corrupted
        self.arguments.update(
            sites=self.placements, corrupted=str(self.corrupted), hidden_sizes=self.interchange.hidden_sizes
        )
        if named := [each for each in self.placements if each.variables is not None]:
            raise ValueError(
                f"site '{named[0]}': tracing interchanges no variables; leave them out: site={named[0].write}"
            )
        if learned := [each for each in self.trained.values() if list(each.parameters())]:
            raise ValueError(f"tracing trains nothing, and {type(learned[0]).__name__} is learned; use full_vector")
        self.scores = RestorationScores(network)
        self.evaluated: dict[str, Interventions] = {}
        self.network = network

    def references(self) -> dict[str, CausalTracing]:
        """The bounds of a restored run: ``corrupted``, with nothing restored, and ``clean``, with all of it."""
        found = {}
        for name, sites in {"corrupted": [], "clean": [self.corrupted]}.items():
            given = self.export_arguments() | {"sites": sites, "intervention": FullVector, "hidden_sizes": None}
            found[name] = CausalTracing(network=self.network, **given)
            found[name].interchange.noise = self.interchange.noise
        return found

    def training_step(self, batch: CounterfactualBatch, batch_idx: int) -> None:
        raise ValueError("tracing trains nothing; use trainer.test")

    def predict_step(self, batch: CounterfactualBatch, batch_idx: int) -> Float[Tensor, "batch vocabulary"]:
        """The logits of each restored run."""
        return self.interchange(batch, self.interchange.hardened())

    @property
    def exported(self) -> nn.Module:
        return nn.ModuleDict({"interventions": self.interchange.interventions, "noise": self.interchange.noise})

    @property
    def edited(self) -> tuple[Site, ...]:
        return (self.corrupted, *self.sites)

    def check(self, data: SplitDataModule) -> None:
        for inputs in data.edited():
            inputs.require(self.corrupted)
            for each in self.placements:
                inputs.require(each.write)
                inputs.require(each.read)
                if each.names_tokens:
                    inputs.require_same_count(inputs, each.write, each.read)

    @property
    def fits_activations(self) -> bool:
        return True

    def learn_statistics(self, batches: Iterable[CounterfactualBatch]) -> None:
        """Learn the standard deviation of the activations that get the noise."""
        batches = list(batches)
        self.interchange.learn(batches)
        self.interchange.fit_noise(batch.base for batch in batches)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []

    def begin(self, split: str) -> None:
        self.scores.reset()
        self.evaluated = {"": self.interchange.hardened()}
        if split == "test":
            self.evaluated |= {f"/{name}": reference.trained for name, reference in self.references().items()}

    def score(self, split: str, batch: CounterfactualBatch) -> None:
        for control, interventions in self.evaluated.items():
            self.scores.update(f"{split}{control}", self.interchange(batch, interventions), batch)

    def figures(self, split: str) -> dict[str, Tensor]:
        return self.scores.compute()


class Restoration(Interchange):
    """Interventions that restore sites of a corrupted run from the clean one, both of the bases.

    Args:
        corrupted: the site that gets the noise.
        noise: what is added there.
        sites, intervention, shared, hidden_sizes: as in :class:`~itrain.training.interchange.Interchange`.
    """

    needs_sites: ClassVar[bool] = False

    def __init__(
        self,
        network: Network,
        *,
        corrupted: Site,
        noise: Noise,
        sites: Placements,
        intervention: Factory,
        shared: bool = False,
        hidden_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(network, sites=sites, intervention=intervention, shared=shared, hidden_sizes=hidden_sizes)
        self.corrupted, self.noise = corrupted, noise

    def read(self, batch: Runs, interventions: Interventions) -> Activations:
        """What the placements read in the clean run."""
        sites = [placement.read for placement, each in interventions.items() if each.takes_source]
        return {"clean": self.network.read(batch.base, sites) if sites else {}}

    def edits(
        self,
        batch: Runs,
        interventions: Interventions,
        activations: Activations,
        edited: dict[Placement, Edited] | None = None,
    ) -> list[tuple[Site, Edit]]:
        """The noise, followed by the restored sites."""
        restored = []
        for placement, each in interventions.items():
            clean = activations["clean"].get(placement.read) if each.takes_source else None
            apply = each
            if placement.read != placement.write:
                if placement.names_tokens:
                    batch.base.require_same_count(batch.base, placement.write, placement.read)
                apply = partial(across, each, placement)
            edit = self.edit(apply, clean)
            restored.append((placement.write, edit if edited is None else partial(kept, edit, placement, edited)))
        return [(self.corrupted, partial(self.noise, examples=batch.base.keys)), *restored]

    def fit_noise(self, inputs: Iterable[ModelInputs]) -> None:
        """Learn the standard deviation of the activations that get the noise."""
        device, found = device_of(self.network), []
        with torch.no_grad():
            for each in (batch.to(device) for batch in inputs):
                activation = self.network.read(each, [self.corrupted])[self.corrupted]
                found.append(self.rows(activation, each, self.corrupted)[0])
        self.noise.deviation.copy_(require_finite(torch.cat(found), self.corrupted).std())


class RestorationScores:
    """The clean answers' mean probability, its spread over examples, and how often they win, by both rules.

    Args:
        network: the base model that answers.
    """

    def __init__(self, network: Network) -> None:
        self.means: dict[str, MeanMetric] = {}
        self.counts: dict[str, SumMetric] = {}
        self.answers = FiniteAnswers(network)

    def reset(self) -> None:
        """Drop what an interrupted split has left."""
        self.means.clear()
        self.counts.clear()
        self.answers.counts.clear()

    def update(self, place: str, logits: Float[Tensor, "batch vocabulary"], batch: CounterfactualBatch) -> None:
        """Update the figures of a place with the probabilities of the clean answers, and whether they win.

        Raises:
            ValueError: answers have several tokens.
        """
        label = batch.base_label
        if label.ndim > 1:
            raise ValueError("tracing needs answers of one token; this task's have several")
        self.answers.update(place, logits)
        other = batch.counterfactual_label.where(batch.changes, batch.contrast_label)
        found = {"probability": logits.float().softmax(-1).take_along_dim(label[:, None], 1)[:, 0]}
        found |= {rule: is_right(logits, label, other, rule) for rule in RULES}
        found["square"] = found["probability"] ** 2
        for figure, values in found.items():
            name = f"{place}/answer_{figure}"
            self.means.setdefault(name, MeanMetric().to(logits.device)).update(values.float())
        counted = self.counts.setdefault(f"{place}/examples", SumMetric(dist_sync_fn=gather_counts).to(logits.device))
        counted.update(len(label))

    def compute(self) -> dict[str, Tensor]:
        """All figures since the last call."""
        self.answers.require()
        found = {name: each.compute() for name, each in (self.means | self.counts).items()}
        for name in [name for name in found if name.endswith("/answer_square")]:
            place = name.removesuffix("square")
            # Rounding can leave less than nothing where all examples agree.
            found[f"{place}spread"] = (found.pop(name) - found[f"{place}probability"] ** 2).clamp(min=0).sqrt()
        self.reset()
        return found


class Noise(nn.Module):
    """h + scale * sigma * e, e ~ N(0, 1) drawn for each example from the seed and the example's key.

    So an example's noise depends neither on its batch nor on the process that runs it.
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
        return activation + self.scale * self.deviation * drawn.to(activation, non_blocking=True)

    def _draw(self, key: int, shape: torch.Size) -> Float[Tensor, "*places features"]:
        generator = torch.Generator().manual_seed((key + self.seed) % 2**63)
        # Token by token: an example's draws must not depend on how many tokens the longest one in its batch has.
        places = [torch.randn(shape[-1], generator=generator) for _ in range(shape[:-1].numel())]
        return torch.stack(places).view(shape)
