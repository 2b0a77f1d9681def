"""ModelAlignment: trains maps of two models into one space, through which each can be given the other's values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from itrain.bounds import require_some
from itrain.data import CounterfactualBatch
from itrain.data.splits import SplitDataModule
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention, verified
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.models import BaseModel
from itrain.networks.attached import Attached
from itrain.networks.base import Network
from itrain.networks.choose import plain_network
from itrain.objectives.cross_entropy import answer_loss
from itrain.placements import Factory, Placement, Placements
from itrain.signatures import nearest
from itrain.training.attaching import Attaching, attach_interchange
from itrain.training.base import Training
from itrain.training.building import count_features
from itrain.training.interchange import Activations, Interchange, Interventions
from itrain.training.optimization import OptimizerFactory
from itrain.training.scores import InterchangeScores

SIDES = MODEL, PARTNER = "model", "partner"
"""The names of the two models in figures, directions and exports."""
DIRECTIONS: Mapping[str, tuple[str, str]] = {
    f"{source}_to_{target}": (source, target) for source, target in product(SIDES, SIDES)
}
"""The model that a source is read in, and the one that is edited."""
Partner: TypeAlias = nn.Module | BaseModel | Callable[[], nn.Module | BaseModel]
"""A second model, or what makes it."""


class ModelAlignment(Training):
    """Trains a subspace in each of two frozen models, so that a value read in one has its effect in the other too.

    h_t' = h_t + R_t^T (R_s h_s - R_t h_t) with orthonormal rows R_s and R_t of one rank, which is
    W_t^-1 (M W_s h_s + (1 - M) W_t h_t) for rotations W of all of a model's features of which M shares the first ones.
    The loss is the mean of the directions' cross entropies of the counterfactual labels, a model to itself among them.
    The models may have different sizes and kinds; they take the same inputs and give the same answers.

    Grant 2025, "Model Alignment Search" (arXiv 2501.06164).

    Figures are named after directions: ``test/model_to_partner/iia_argmax`` is of sources that are read in the model
    and bases that run in its partner; ``test/iia_argmax`` is of all directions. A test scores the controls in each: a
    random subspace in either model, and, where these have one size, the whole activation with its axes as they are.

    Args:
        network: the first model, frozen.
        sites: where it is read and edited, and its partner too unless ``partner_sites`` says otherwise.
        partner: the second model, or what makes it: a class or function, or a partial of one, which an export can name.
        partner_sites: where the second model is read and edited, in the order of the sites that correspond.
        intervention: DAS, for its rank, which is that of the space that the models share.
        train_directions: those that are trained; None: all four. All are scored.
        optimizer: builds the optimizer from groups of parameters; None: for evaluation only.
        warmup: share of the steps in which the learning rate rises.
        hidden_sizes, partner_hidden_sizes: features at the sites of either model; None: what their modules tell.
        example: an input, which the partner is run on where its modules do not tell.

    Raises:
        ValueError: the sites of the models do not correspond, or the intervention is none with a subspace.
    """

    retracts: ClassVar[bool] = True

    def __init__(
        self,
        *,
        network: Network,
        sites: Placements,
        partner: Partner,
        partner_sites: Placements | None = None,
        intervention: Factory | None = None,
        train_directions: Sequence[str] | None = None,
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
        hidden_sizes: Sequence[int] | None = None,
        partner_hidden_sizes: Sequence[int] | None = None,
        example: ModelInputs | None = None,
    ) -> None:
        super().__init__()
        self.remember(locals())
        self.optimizer, self.warmup = optimizer, warmup
        self.directions = tuple(DIRECTIONS if train_directions is None else train_directions)
        _require_directions(self.directions)
        self.partner = _made(partner)
        other = plain_network(self.partner.model)
        theirs = sites if partner_sites is None else partner_sites
        if partner_hidden_sizes is None and example is not None:
            partner_hidden_sizes = count_features(other, theirs, example)
        self.sides = {
            MODEL: Interchange(network, sites=sites, intervention=intervention, hidden_sizes=hidden_sizes),
            PARTNER: Interchange(other, sites=theirs, intervention=intervention, hidden_sizes=partner_hidden_sizes),
        }
        """The interventions in each of the models."""
        ours, its = self.sides.values()
        _require_correspondence(ours, its)
        self.sites = ours.sites
        self.arguments.update(
            sites=ours.placements,
            partner_sites=its.placements,
            hidden_sizes=ours.hidden_sizes,
            partner_hidden_sizes=its.hidden_sizes,
        )
        del self.arguments["example"]
        self.scores = InterchangeScores(ours)
        self.evaluated: dict[str, Mapping[str, Interventions]] = {}
        """What is scored in each model, by the suffix in the figures' names."""
        self.maps = nn.ModuleDict({name: side.interventions for name, side in self.sides.items()})
        fingerprint = torch.tensor(list(bytes.fromhex(self.partner.fingerprint)), dtype=torch.uint8)
        self.maps.register_buffer("partner_fingerprint", fingerprint)
        verified(self.maps, "partner_fingerprint", "the partner")
        self.partner_network = other
        self.network = network

    def answers(
        self, batch: CounterfactualBatch, interventions: Mapping[str, Interventions], directions: Sequence[str]
    ) -> Iterator[tuple[str, Float[Tensor, "batch ... vocabulary"]]]:
        """The edited model's answers on the bases in each direction; each model reads the sources once.

        Directions to one model share a run of it.
        """
        named = {each: DIRECTIONS[each] for each in directions}
        with self.network.unchanged(), self.partner_network.unchanged(), parametrize.cached():
            sources = dict.fromkeys(source for source, _ in named.values())
            read = {each: self.sides[each].read(batch, interventions[each]) for each in sources}
            for target, side in self.sides.items():
                edits = {}
                for direction, (source, to) in named.items():
                    if to == target:
                        values = read[source]
                        if source != target:
                            values = _moved(values, interventions[source], interventions[target])
                        edits[direction] = side.edits(batch, interventions[target], values)
                if edits:
                    yield from zip(edits, side.network.edit_each(batch.base, list(edits.values())), strict=True)

    def training_step(self, batch: CounterfactualBatch, batch_idx: int) -> Tensor:
        answers = self.answers(batch, self.trained, self.directions)
        losses = [answer_loss(logits, batch.counterfactual_label).mean() for _, logits in answers]
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, prog_bar=self.shows_loss, batch_size=len(batch))
        return loss * batch.weight

    def attach_to(self, model: nn.Module, sources: Mapping[str, ModelInputs], how: Attaching) -> Attached:
        """Have the first model's subspace act in it, with sources that are read in it too."""
        return attach_interchange(self.sides[MODEL], model, sources, how)

    @property
    def placements(self) -> tuple[Placement, ...]:
        return self.sides[MODEL].placements

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        return {f"{name}, {place}": part for name, side in self.sides.items() for place, part in side.parts.items()}

    @property
    def exported(self) -> nn.Module:
        return self.maps

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group for side in self.sides.values() for group in side.parameter_groups()]

    def check(self, data: SplitDataModule) -> None:
        for side in self.sides.values():
            data.require(side.placements)
        _require_vocabulary(self.partner, getattr(getattr(data, "task", None), "tokenizer", None))

    def begin(self, split: str) -> None:
        """Choose what is scored: the trained subspaces and, in a test, their controls."""
        self.scores.reset()
        trained = self.trained
        self.evaluated = {"": trained}
        if split == "test":
            self.evaluated["/random_subspace"] = {name: _random(trained[name], seed) for seed, name in enumerate(SIDES)}
            sizes = [[each.hidden_size for each in trained[name].values()] for name in SIDES]
            if sizes[0] == sizes[1]:
                self.evaluated["/full_vector"] = {
                    name: {place: FullVector(each.hidden_size) for place, each in trained[name].items()}
                    for name in SIDES
                }

    def score(self, split: str, batch: CounterfactualBatch) -> None:
        for control, interventions in self.evaluated.items():
            for direction, logits in self.answers(batch, interventions, list(DIRECTIONS)):
                self.scores.update(f"{split}{control}", logits, batch)
                self.scores.update(f"{split}{control}/{direction}", logits, batch)

    def figures(self, split: str) -> dict[str, Tensor]:
        return self.scores.compute()

    @property
    def trained(self) -> dict[str, Interventions]:
        """The interventions of each placement in either model."""
        return {name: side.trained for name, side in self.sides.items()}


def _made(partner: Partner) -> BaseModel:
    """The second model, with its fingerprint."""
    made = partner if isinstance(partner, nn.Module | BaseModel) else partner()
    return made if isinstance(made, BaseModel) else BaseModel(model=made)


def _moved(read: Activations, one: Interventions, other: Interventions) -> Activations:
    """What was read in one model, as activations of the other with the same features in its subspaces."""
    found: Activations = {variable: {} for variable in read}
    for variable, activations in read.items():
        for (here, intervention), (there, its) in zip(one.items(), other.items(), strict=True):
            if here.serves(variable) and here.read in activations:
                value = activations[here.read]
                if isinstance(intervention, DAS) and isinstance(its, DAS):
                    features, _ = intervention.subspace.encode(value)
                    value = its.subspace.decode(features, features.new_zeros(()))
                found[variable][there.read] = value
    return found


def _random(interventions: Interventions, seed: int) -> Interventions:
    """Subspaces of equal rank that are not trained, those of each model from a seed of its own."""
    found: dict[Placement, Intervention] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for place, each in interventions.items():
            made = DAS(each.hidden_size, rank=each.rank)
            found[place] = made.to(next(each.parameters()))
    return found


def _require_directions(directions: Sequence[str]) -> None:
    require_some(train_directions=directions)
    for each in directions:
        if each not in DIRECTIONS:
            raise ValueError(f"train_directions: there is no '{each}'{nearest(each, DIRECTIONS)}")
    if {name for each in directions for name in DIRECTIONS[each]} != set(SIDES):
        raise ValueError(f"train_directions: {', '.join(directions)} leaves a model out; add {MODEL}_to_{PARTNER}")


def _require_correspondence(ours: Interchange, theirs: Interchange) -> None:
    """Refuse sites of the two models of which one cannot be given what the other has."""
    if len(ours.placements) != len(theirs.placements):
        counts = f"{len(ours.placements)} of the model and {len(theirs.placements)} of its partner"
        raise ValueError(f"partner_sites: there are sites, {counts}; give each of them one that corresponds")
    for (here, one), (there, other) in zip(ours.trained.items(), theirs.trained.items(), strict=True):
        for place, each in ((here, one), (there, other)):
            if not isinstance(each, DAS):
                name = type(each).__name__
                raise ValueError(f"site '{place}': {name} learns no subspace to share; choose intervention=das")
        if here.variables != there.variables:
            raise ValueError(f"partner_sites: '{there}' serves other variables than '{here}', to which it corresponds")
        if one.rank != other.rank:
            raise ValueError(f"site '{there}': rank {other.rank}, and {one.rank} at '{here}', to which it corresponds")


def _require_vocabulary(partner: BaseModel, tokenizer: Any) -> None:
    """Refuse a partner whose tokens are others than those of the inputs."""
    theirs = partner.tokenizer
    if tokenizer is not None and theirs is not None and tokenizer.get_vocab() != theirs.get_vocab():
        raise ValueError(
            f"partner: {partner.name} has another vocabulary than the model, so that the same tokens mean something "
            "else to it; choose models with one tokenizer"
        )
