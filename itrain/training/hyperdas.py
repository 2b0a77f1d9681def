"""HyperDAS: a hyper-network that is told a variable in words finds its tokens and its subspace by itself.

Tensor letters: B batch, S and P tokens of source and base, D features, V vocabulary, K rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from itrain.architectures import unwrap
from itrain.bounds import require_at_least, require_share, require_some
from itrain.data import CounterfactualBatch, IntervenedInputs
from itrain.data.splits import SplitDataModule
from itrain.inputs import ModelInputs
from itrain.networks.attached import Attached
from itrain.networks.base import Network
from itrain.objectives.cross_entropy import answer_loss
from itrain.placements import Placement, Placements
from itrain.precision import FullPrecision, match_precision
from itrain.sites import Site
from itrain.training.attaching import Attaching
from itrain.training.base import Training
from itrain.training.hypernetwork import MODES, Hypernetwork, Mode, Picks, States, crowding, one_to_one, soft, swapped
from itrain.training.optimization import OptimizerFactory
from itrain.training.picks import PickScores

SEED = 161_803
"""Of the hyper-network and of the subspace that controls take in place of trained ones."""


class Setup(NamedTuple):
    """What picks tokens and a subspace, and how its picks are used."""

    hypernetwork: Hypernetwork
    mode: Mode = soft
    rows: Float[Tensor, "rank features"] | None = None
    """The subspace in place of the hyper-network's; None: its own."""
    shift: int = 0
    """How many places further in the list of concepts the one lies that it is told."""


class HyperDAS(Training):
    """Trains a hyper-network to find, for a variable in words, the tokens of base and source and the subspace.

    At one layer h_j := h_j + (sum_i w_ij s_i + w_none,j h_j - h_j) W W^T for each token j of the base, where w are the
    hyper-network's weights of the source's tokens and W = (1 - 2 v v^T) R^T its subspace; see
    :class:`~itrain.training.hypernetwork.Hypernetwork`. loss = 1/N sum_n a_n CE_n + lambda C_n, with a_n the weight of
    cause or isolate pairs and C_n what source tokens give to base tokens beyond 1 each. lambda is 0 for the first share
    ``sparsity_start`` of the steps, and then what a line over all steps from the first to the second of ``sparsity``
    has reached.

    An edit may be soft, as in training, or hard: base tokens take one source token each (``one_to_many``), or each
    source token also goes to one base token (the figures without a mode). Soft weights mix tokens, by which the edit
    can do what no token holds: ``leakage`` is what disentangling loses where they are made hard, soft less one-to-one.

    A test has three controls of the picks: ``random_hypernetwork``, untrained; ``other_concept``, told another variable
    of the task; ``random_subspace`` and ``full_vector``, a fixed subspace at the tokens that are picked. Where the
    token that holds the variable is known, it also tells how often it is picked.

    Sun et al. 2025, "HyperDAS: Towards Automating Mechanistic Interpretability with Hypernetworks", section 3; their
    settings are the defaults but for the sizes: theirs are width 4096, 32 heads, rank 128. There the hyper-network
    attends to the states of all layers, here to those that are edited.

    Args:
        network: the base model, frozen.
        sites: one site of text; its position says which tokens can be picked, all unless it names some.
        instructions: the tokens of the words for each variable.
        optimizer: builds the optimizer from groups of parameters; None: for evaluation only.
        warmup: share of the steps in which the learning rate rises.
        rank: of the subspace.
        width, heads, blocks: of the hyper-network.
        cause_weight, isolate_weight: of pairs in which the label is to change, and of those in which nothing is.
        sparsity: the weight of C, at the first step and at the last.
        sparsity_start: share of the steps in which that weight is 0.
        rotation_lr: learning rate of R, which has no weight decay; None: the optimizer's.
        known: the position of the token that holds the variable, as ``entity.last``, for figures of the picks alone.

    Raises:
        ValueError: there is not one plain site in text, or the model has no embeddings of tokens.
    """

    retracts: ClassVar[bool] = True

    def __init__(
        self,
        *,
        network: Network,
        sites: Placements,
        instructions: Mapping[str, Sequence[int]],
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
        rank: int = 8,
        width: int = 64,
        heads: int = 4,
        blocks: int = 2,
        cause_weight: float = 3.5,
        isolate_weight: float = 0.5,
        sparsity: Sequence[float] = (0.15, 1.5),
        sparsity_start: float = 0.5,
        rotation_lr: float | None = None,
        known: str | None = None,
    ) -> None:
        super().__init__()
        self.remember(locals())
        require_at_least(0, cause_weight=cause_weight, isolate_weight=isolate_weight, rotation_lr=rotation_lr)
        require_share(sparsity_start=sparsity_start)
        require_some(instructions=instructions)
        if len(sparsity) != 2 or min(sparsity) < 0:
            raise ValueError(f"sparsity={list(sparsity)}: give the weight at the first step and at the last, 0 or more")
        self.optimizer, self.warmup, self.rotation_lr = optimizer, warmup, rotation_lr
        self.cause_weight, self.isolate_weight = cause_weight, isolate_weight
        self.sparsity, self.sparsity_start = tuple(sparsity), sparsity_start
        self.site = _one_site(sites)
        self.sites = (self.site,)
        self.known = None if known is None else self.site.at(known)
        if self.known is not None and self.known.count != 1:
            raise ValueError(f"known={known}: name one token, for example {self.known.one_token}")
        self.instructions = {name: tuple(tokens) for name, tokens in instructions.items()}
        self.sizes = {"rank": rank, "width": width, "heads": heads, "blocks": blocks}
        embeddings, concepts = _words(network, self.instructions)
        self.features = network.hidden_size(self.site)
        self.hypernetwork = Hypernetwork(embeddings=embeddings, concepts=concepts, features=self.features, **self.sizes)
        self.exports = FullPrecision({"hypernetwork": self.hypernetwork})
        match_precision(self.exports, network)
        self.register_buffer("crowding_weight", torch.zeros(()), persistent=False)
        self.arguments.update(sites=self.placements)
        self.setups: dict[str, Setup] = {}
        """What is scored, by the ends of the figures' names."""
        self.scores = PickScores(network, self.site, self.known)
        self.network = network

    crowding_weight: Float[Tensor, ""]

    def training_step(self, batch: CounterfactualBatch, batch_idx: int) -> Tensor:
        logits, picks = self.run(batch, Setup(self.hypernetwork))
        losses = answer_loss(logits, batch.counterfactual_label)
        isolates = batch.isolates.to(losses.device, non_blocking=True)
        loss = (losses * torch.where(isolates, self.isolate_weight, self.cause_weight)).mean()
        crowded = crowding(picks.weights).mean()
        self.log_dict({"train/answer_loss": loss, "train/crowding": crowded}, batch_size=len(batch))
        loss = loss + self.crowding_weight * crowded
        self.log("train/loss", loss, prog_bar=self.shows_loss, batch_size=len(batch))
        return loss * batch.weight

    def run(self, batch: CounterfactualBatch, setup: Setup) -> tuple[Float[Tensor, "batch ... vocabulary"], Picks]:
        """The model's answer on the bases under the edit, and the hyper-network's weights before the mode."""
        told = (_variables(batch, list(self.instructions)) + setup.shift) % len(self.instructions)
        made: list[Picks] = []

        def edit(base: Float[Tensor, "batch base features"]) -> Tensor:
            present = batch.base.present(self.site).to(base.device, non_blocking=True)
            picks = setup.hypernetwork(told.to(base.device, non_blocking=True), States(base, present), source)
            made.append(picks)
            rows = setup.hypernetwork.rotation if setup.rows is None else setup.rows
            return swapped(base, source.values, picks._replace(weights=setup.mode(picks.weights)), rows)

        with self.network.unchanged():
            source = self._sources(batch)
            logits = self.network.edit(batch.base, [(self.site, edit)])
        return logits, made[-1]

    def _sources(self, batch: CounterfactualBatch) -> States:
        """The states of each pair's source."""
        found: list[tuple[Int[Tensor, " rows"] | None, States]] = []
        with torch.no_grad():
            for variable, source in batch.sources.items():
                rows = batch.rows(variable)
                if rows is None or len(rows):
                    taken = source if rows is None else source.take(rows)
                    values = self.network.read(taken, [self.site])[self.site]
                    found.append((rows, States(values, taken.present(self.site).to(values.device, non_blocking=True))))
        if found[0][0] is None:
            return found[0][1]
        longest = max(states.values.shape[1] for _, states in found)
        first = found[0][1].values
        whole = States(
            first.new_zeros(len(batch), longest, first.shape[2]),
            torch.zeros(len(batch), longest, dtype=torch.bool, device=first.device),
        )
        for rows, states in found:
            assert rows is not None, "a pair has one source"
            at, length = rows.to(first.device, non_blocking=True), states.values.shape[1]
            whole.values[at, :length], whole.present[at, :length] = states
        return whole

    def predict_step(self, batch: CounterfactualBatch, batch_idx: int) -> Float[Tensor, "batch ... vocabulary"]:
        """The logits of each pair under the one-to-one edit."""
        return self.run(batch, Setup(self.hypernetwork, one_to_one))[0]

    def check(self, data: SplitDataModule) -> None:
        """Refuse data in which there is not one source of one known variable for each pair, in text.

        Base and source may have different numbers of tokens, which other trainings refuse.
        """
        for split, dataset in data.datasets.items():
            pairs = dataset.examples
            if not isinstance(pairs, CounterfactualBatch):
                raise ValueError(f"HyperDAS learns from data=counterfactual, not from {type(data).__name__}")
            if self.network.in_step:
                raise ValueError("HyperDAS runs its hyper-network on whole activations; train it with trainer=ddp")
            for group in pairs.groups:
                if len(group) != 1 or group[0] not in self.instructions:
                    raise ValueError(
                        f"{split} pairs interchange {'+'.join(group) or 'nothing'}; HyperDAS is told one variable of "
                        f"{', '.join(self.instructions)} for each pair"
                    )
            for inputs in (pairs.base, *pairs.sources.values()):
                if isinstance(inputs, IntervenedInputs) or inputs.tokens is None:
                    raise ValueError("HyperDAS picks tokens of texts that nothing edits; these sources are others")
                for site in (self.site, *([] if self.known is None else [self.known])):
                    inputs.require(site)

    def anneal(self, progress: float) -> None:
        first, last = self.sparsity
        weight = first + (last - first) * progress if progress >= self.sparsity_start else 0.0
        self.crowding_weight.fill_(weight)

    def begin(self, split: str) -> None:
        own = Setup(self.hypernetwork, one_to_one)
        self.setups = {end: own._replace(mode=mode) for end, mode in MODES.items()}
        if split == "test":
            with isolate_rng():
                torch.manual_seed(SEED)
                embeddings, concepts = _words(self.network, self.instructions)
                random = Hypernetwork(embeddings=embeddings, concepts=concepts, features=self.features, **self.sizes)
            random = random.to(self.hypernetwork.rotation)
            random.concepts = random.concepts.to(self.hypernetwork.concepts)
            self.setups["/random_hypernetwork"] = own._replace(hypernetwork=random.requires_grad_(False))
            if len(self.instructions) > 1:
                self.setups["/other_concept"] = own._replace(shift=1)
            if self.sizes["rank"] < self.features:
                self.setups["/random_subspace"] = own._replace(rows=random.rotation)
            self.setups["/full_vector"] = own._replace(rows=torch.eye(self.features).to(self.hypernetwork.rotation))
        self.scores.begin()

    def score(self, split: str, batch: CounterfactualBatch) -> None:
        clean = self.scores.unedited(batch) if split == "test" else None
        for end, setup in self.setups.items():
            logits, picks = self.run(batch, setup)
            self.scores.update(f"{split}{end}", logits, batch, clean)
            if setup.mode is one_to_one and setup.rows is None:
                self.scores.update_picks(f"{split}{end}", picks.weights, batch)

    def figures(self, split: str) -> dict[str, Tensor]:
        return self.scores.compute(split)

    def attach_to(self, model: nn.Module, sources: Mapping[str, ModelInputs], how: Attaching) -> Attached:
        raise ValueError("HyperDAS edits pairs whose base it has read, and acts in no other calls; use predict_step")

    def export_arguments(self) -> dict[str, Any]:
        return super().export_arguments() | {
            "instructions": {name: list(each) for name, each in self.instructions.items()}
        }

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        return {str(self.site): self.hypernetwork}

    @property
    def exported(self) -> nn.Module:
        return self.exports

    def parameter_groups(self) -> list[dict[str, Any]]:
        rotation = self.hypernetwork.parametrizations.rotation.original  # type: ignore[union-attr]
        others = [each for each in self.hypernetwork.parameters() if each is not rotation]
        own = {} if self.rotation_lr is None else {"lr": self.rotation_lr}
        return [{"params": others}, {"params": [rotation], "weight_decay": 0.0, **own}]


def _one_site(sites: Placements) -> Site:
    """The site, at all tokens unless it names some.

    Raises:
        ValueError: there are several, or it is no plain site.
    """
    placements = Placement.parse_all(sites)
    if len(placements) != 1 or not placements[0].is_plain:
        raise ValueError(
            f"HyperDAS edits one layer, for all variables; name one site, not {list(map(str, placements))}"
        )
    site = placements[0].write
    return site.at("all") if site.position is None else site


def _words(
    network: Network, instructions: Mapping[str, Sequence[int]]
) -> tuple[Float[Tensor, "words embedding"], Int[Tensor, "concepts length"]]:
    """The base model's embeddings of the instructions' tokens, and each instruction by its places among them."""
    model: Any = unwrap(network.model)
    found = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(found, nn.Embedding):
        raise ValueError(
            f"{type(model).__name__} has no embeddings of tokens, by which HyperDAS reads instructions; take a "
            "language model"
        )
    if empty := [name for name, tokens in instructions.items() if not tokens]:
        raise ValueError(f"instructions.{empty[0]} is empty; give the tokens of its words")
    used = sorted({token for tokens in instructions.values() for token in tokens})
    longest = max(map(len, instructions.values()))
    places = [[used.index(token) for token in tokens] for tokens in instructions.values()]
    concepts = torch.tensor([each + [-1] * (longest - len(each)) for each in places])
    weight = found.weight.detach()[torch.tensor(used, device=found.weight.device)]
    return weight.to("cpu", torch.promote_types(weight.dtype, torch.float32)), concepts


def _variables(batch: CounterfactualBatch, names: Sequence[str]) -> Int[Tensor, " batch"]:
    """The variable of each pair, by its place among the names, on the CPU."""
    return torch.tensor([names.index(group[0]) for group in batch.groups])[batch.group]
