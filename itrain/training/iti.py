"""Inference-time intervention: a few attention heads, chosen by probes, are shifted along a direction of a concept.

Tensor letters: N texts, H heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from itrain.architectures import heads_of
from itrain.data.responses import ResponseBatch
from itrain.data.splits import SplitDataModule
from itrain.devices import device_of
from itrain.interventions.fixed import AddVector
from itrain.networks.base import Network
from itrain.networks.lane import EditAt, scaled
from itrain.placements import Placement, Placements
from itrain.sites import Site
from itrain.training.finite import require_finite
from itrain.training.interchange import Interchange
from itrain.training.judges import Judge
from itrain.training.steering import Steering

COMPONENT = "attention_value_output"
"""What the heads read, one after the other, before the output projection."""
HELD_OUT = 0.2
"""The share of the training texts on which the accuracy of probes is measured."""
STRENGTHS = (1.0, 2.0, 5.0, 10.0, 15.0, 20.0)
STEPS = 200
"""The most steps of the probes' optimizer; a few dozen do."""
Along = Literal["mass_mean", "probe"]


class Heads(NamedTuple):
    """What the training texts say of the heads of a placement."""

    accuracy: Float[Tensor, " heads"]
    """Of each head's probe, on texts that it has not learned from."""
    shift: Float[Tensor, "heads features"]
    """sigma theta of each head."""


class InferenceTimeIntervention(Steering):
    """Shifts the attention heads that tell best whether a text has a concept: h + alpha sigma theta, at each token.

    A logistic regression of each head's activation at the last token of a text, the response included, tells texts with
    the concept from others. The ``heads`` whose probes are most accurate on a fifth of the training texts, which the
    probes have not learned from, are edited. theta has length 1: with ``mass_mean`` it is the difference of the two
    means, with ``probe`` the probe's weights; sigma is the standard deviation of h theta over the training texts.
    Nothing is trained. alpha is the strength, of which the test tries some, as :class:`Steering` does.

    The control ``random_heads`` shifts as many other heads by their own sigma theta, at the same strengths.

    Li et al. 2023, "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model". As in the authors'
    code, the edits of a layer are one vector, added before the output projection, which weights can take up.

    Args:
        network: the base model, frozen.
        sites: the ``attention_value_output`` of each layer whose heads are candidates.
        concept, end, acts, max_perplexity_ratio, judge, reference, max_new_tokens, applied: as in :class:`Steering`.
        heads: how many are edited, K.
        along: theta, ``mass_mean`` or ``probe``.
        strengths: the alphas that are measured.
        seed: of the texts that probes do not learn from, of the random heads and of the draws in texts.
        hidden_sizes: features at each site; None asks the network.

    Raises:
        ValueError: a site is not of all heads, or there are not more heads than are edited.
    """

    control: ClassVar[str] = "random_heads"
    finds_edits: ClassVar[bool] = True

    def __init__(
        self,
        *,
        network: Network,
        sites: Placements,
        concept: Sequence[Sequence[int]],
        heads: int = 4,
        along: Along = "mass_mean",
        end: int | None = None,
        acts: Literal["prompt", "all", "generated"] | Sequence[int] = "all",
        strengths: Sequence[float] = STRENGTHS,
        max_perplexity_ratio: float = 1.5,
        judge: Judge | None = None,
        reference: str | None = None,
        max_new_tokens: int = 16,
        seed: int = 0,
        hidden_sizes: Sequence[int] | None = None,
        applied: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            network=network,
            sites=sites,
            intervention=AddVector,
            concept=concept,
            end=end,
            acts=acts,
            strengths=strengths,
            max_perplexity_ratio=max_perplexity_ratio,
            judge=judge,
            reference=reference,
            max_new_tokens=max_new_tokens,
            seed=seed,
            hidden_sizes=hidden_sizes,
            applied=applied,
        )
        if along not in get_args(Along):
            raise ValueError(f"along={along!r}: use {', '.join(get_args(Along))}")
        self.counts = [_count_heads(network, placement.write) for placement in self.placements]
        if not 1 <= heads < sum(self.counts):
            raise ValueError(f"heads={heads}: the sites have {sum(self.counts)}; choose 1 to {sum(self.counts) - 1}")
        self.heads, self.along = heads, along
        for name in ("intervention", "optimizer", "scale", "shared", "warmup"):
            del self.arguments[name]  # which are not this class's
        self.arguments.update(heads=heads, along=along)
        sizes = self.interchange.hidden_sizes
        self.random_heads = Interchange(network, sites=self.placements, intervention=AddVector, hidden_sizes=sizes)
        self.accuracies: Float[Tensor, " heads"] | None = None
        """Of the probes of all heads, in the order of the sites; None: nothing was fitted here."""

    @property
    def fits_activations(self) -> bool:
        return True

    @property
    def chosen_heads(self) -> list[str]:
        """The heads that are edited, such as ``layer2.attention_value_output.head1``."""
        found = []
        for placement, count in zip(self.placements, self.counts, strict=True):
            shifted = _vector(self.interchange, placement).view(count, -1).any(1)
            found += [f"{placement.write.at(None)}.head{head}" for head in shifted.nonzero().flatten().tolist()]
        return found

    def prepare(self, data: SplitDataModule, *, uses: int | None = None) -> str:
        how = super().prepare(data, uses=uses)
        return f"{how}; edits {', '.join(self.chosen_heads)}"

    def learn_statistics(self, batches: Iterable[ResponseBatch]) -> None:
        """Find the direction of each head, and the heads whose probes are most accurate.

        Raises:
            ValueError: there are not several texts with the concept and without.
        """
        read: dict[Placement, list[Tensor]] = {placement: [] for placement in self.placements}
        has: list[Tensor] = []
        device = device_of(self.network)
        with torch.no_grad():
            for batch in batches:
                texts = self._texts(batch).to(device)
                found = self.network.read(texts, [each.write.at("last") for each in self.placements])
                for placement in self.placements:
                    read[placement].append(found[placement.write.at("last")].flatten(1))
                has.append(torch.ones(len(batch)) if batch.has_concept is None else batch.has_concept)
        concept = torch.cat(has).to(device) > 0
        probed_on = self._probed_on(concept)
        every = [
            self._told(require_finite(torch.cat(read[placement]), placement.write), count, concept, probed_on)
            for placement, count in zip(self.placements, self.counts, strict=True)
        ]
        self.accuracies = torch.cat([each.accuracy for each in every]).cpu()
        order = sorted(range(len(self.accuracies)), key=lambda head: -float(self.accuracies[head]))  # type: ignore[index]
        chosen, rest = order[: self.heads], sorted(order[self.heads :])
        self._shift(self.interchange, every, chosen)
        self._shift(self.random_heads, every, Random(self.seed).sample(rest, min(self.heads, len(rest))))

    @property
    def has_control(self) -> bool:
        """Whether the other heads' directions are known: no export holds them."""
        return any(bool(_vector(self.random_heads, placement).any()) for placement in self.placements)

    def random_edits(self, strength: float, keys: Int[Tensor, " batch"]) -> list[EditAt]:
        """Edits of as many other heads."""
        found = self.edits_of(self.random_heads.trained)
        return [each._replace(edit=scaled(each.edit, strength)) for each in found]

    def figures(self, split: str) -> dict[str, Tensor]:
        found = super().figures(split)
        if split == "test" and self.accuracies is not None:
            best = self.accuracies.sort(descending=True).values[: self.heads]
            found["test/head_accuracy"], found["test/head_accuracy_all"] = best.mean(), self.accuracies.mean()
        return found

    def _probed_on(self, concept: Tensor) -> Tensor:
        """Which texts probes learn from; the others tell how accurate they are."""
        order = torch.randperm(len(concept), generator=torch.Generator().manual_seed(self.seed)).to(concept.device)
        learned = torch.ones_like(concept)
        learned[order[: round(HELD_OUT * len(concept))]] = False
        for part in (concept[learned], concept[~learned]):
            if not len(part) or bool(part.all()) or not bool(part.any()):
                raise ValueError(
                    f"probes tell texts with the concept from others, and {int(concept.sum())} of the {len(concept)} "
                    "training texts have it, too few or too many; add some of the others (task.negatives=true)"
                )
        return learned

    def _told(self, activations: Float[Tensor, "texts hidden"], count: int, concept: Tensor, learned: Tensor) -> Heads:
        """Each head's accuracy and shift."""
        by_head = activations.double().unflatten(1, (count, -1))
        weights, bias = regressed(by_head[learned], concept[learned])
        scores = torch.einsum("nhd,hd->nh", by_head[~learned], weights) + bias
        accuracy = ((scores > 0) == concept[~learned, None]).double().mean(0)
        theta = by_head[concept].mean(0) - by_head[~concept].mean(0) if self.along == "mass_mean" else weights
        length = theta.norm(dim=1, keepdim=True)
        theta = theta / length.where(length > 0, 1)
        sigma = torch.einsum("nhd,hd->nh", by_head, theta).std(0)
        return Heads(accuracy, sigma[:, None] * theta)

    def _shift(self, interchange: Interchange, every: Sequence[Heads], heads: Sequence[int]) -> None:
        """Have the interventions shift these heads, counted over all sites, and no others."""
        first = 0
        for placement, found in zip(self.placements, every, strict=True):
            kept = torch.tensor([first + head in heads for head in range(len(found.shift))], device=found.shift.device)
            _vector(interchange, placement).copy_((found.shift * kept[:, None]).flatten())
            first += len(found.shift)


def regressed(
    activations: Float[Tensor, "texts heads features"], concept: Tensor
) -> tuple[Float[Tensor, "heads features"], Float[Tensor, " heads"]]:
    """The weights and the bias of each head's logistic regression, as scikit-learn's by default: C = 1.

    min sum over heads and texts of BCE(w h + b, concept) + |w|^2 / 2.
    """
    with torch.inference_mode(False), torch.enable_grad():
        seen, wanted = activations.clone(), concept.clone().to(activations.dtype)[:, None].expand(activations.shape[:2])
        weights = seen.new_zeros(seen.shape[1:], requires_grad=True)
        bias = seen.new_zeros(seen.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weights, bias], max_iter=STEPS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            scores = torch.einsum("nhd,hd->nh", seen, weights) + bias
            found = binary_cross_entropy_with_logits(scores, wanted, reduction="sum") + weights.square().sum() / 2
            found.backward()
            return found

        optimizer.step(loss)  # type: ignore[arg-type]
    return weights.detach(), bias.detach()


def _count_heads(network: Network, site: Site) -> int:
    if site.component.rpartition(".")[2] != COMPONENT or site.head is not None:
        raise ValueError(f"site '{site}': heads are chosen among all of a layer's; name layer<N>.{COMPONENT}@all")
    return heads_of(network.model, site)


def _vector(interchange: Interchange, placement: Placement) -> Float[Tensor, " hidden"]:
    """What is added at a placement."""
    made: Any = interchange.trained[placement]
    return made.vector
