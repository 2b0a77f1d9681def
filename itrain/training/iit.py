"""InterchangeInterventionTraining: trains the model itself to have the structure of a causal model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import MeanMetric

from itrain.architectures import unwrap
from itrain.bounds import require_at_least
from itrain.data import CounterfactualBatch
from itrain.data.splits import SplitDataModule
from itrain.inputs import ModelInputs
from itrain.metrics import StrictAccuracy, is_right
from itrain.metrics.strict import is_known
from itrain.networks.attached import Attached
from itrain.networks.base import Network
from itrain.objectives.base import Edited, ObjectiveFactory, Objectives, Outcome
from itrain.objectives.cross_entropy import CrossEntropy, answer_loss
from itrain.placements import Factory, Placement, Placements
from itrain.precision import match_precision
from itrain.sites import Site, SiteLike
from itrain.training.attaching import Attaching, attach_interchange
from itrain.training.base import Training
from itrain.training.building import require_terms, require_unlearned
from itrain.training.callbacks import FirstStepError
from itrain.training.interchange import Interchange
from itrain.training.optimization import OptimizerFactory
from itrain.training.placed import Placed
from itrain.training.readouts import Readouts
from itrain.training.scores import InterchangeScores
from itrain.training.strict import Resampling, Sampling
from itrain.training.trained_weights import ALPHA, choose_weights, frozen_to_eval

TERMS = frozenset({"task", "strict", "source", "readout"})
"""The terms of the loss beside those of the objectives."""


class InterchangeInterventionTraining(Placed[Interchange], Training):
    """Trains a model so that interventions at its sites act as a causal model predicts, while it keeps doing its task.

    loss = 1/N sum_n task_weight CE(model(base_n), base label_n)
    + interchange_weight(n) sum_o weight_o loss_o(model(base_n | do(site := intervention(base_n, source_n))), label_n)
    + strict_weight CE(model(base_n | nodes as in source_n), base label_n)
    + source_weight sum_v CE(model(source_nv), source label_nv)
    + readout_weight mean_v CE(W_v block_v(base_n) + b_v, value of v in the base's run) + penalty.

    The second line, with the counterfactual label and the cross entropy, is IIT: Geiger et al. 2022, "Inducing Causal
    Structure for Interpretable Neural Networks", section 3. The paper's baselines are the first line alone (plain
    training), with the fourth (as much data as IIT sees), and with the fifth (multi-task training: at each site that is
    read, linear heads read what the edit of a variable would take from it). The third is Strict IIT (SIIT): Gupta et
    al. 2024, "InterpBench: Semi-Synthetic Transformers for Evaluating Mechanistic Interpretability Techniques". Its
    nodes are what the alignment leaves to no variable: see :class:`~itrain.training.strict.Resampling`.
    ``strict_accuracy`` is the share of right answers when a node is resampled, the mean over nodes. Gradients flow
    through the sources' runs too, unless ``detach_source``.

    What is trained of the model is in train mode during a fit, with dropout where it has any; what is frozen stays in
    eval mode, so that its running statistics stay too. Outside a fit all of the model is in eval mode. Lightning alone
    would keep the eval mode in which transformers loads models.

    Args:
        task_weight: weight of the loss on the bases' answers.
        interchange_weights: weight of the loss on the counterfactual answers: one for all pairs, or one for each set of
            interchanged variables, for example ``{left: 1, left+right: 0.5}``. Sets that are not named are evaluated
            but not trained.
        objectives: build the losses of counterfactual answers, by name, as in
            :class:`~itrain.training.alignment.AlignmentSearch`; None: cross entropy alone.
        strict_weight: weight of the loss on the bases' answers while nodes are resampled.
        strict_sites: the nodes; None: at each of ``sites``, the coordinates that no intervention swaps.
        siit_sampling: the nodes of a step: ``individual`` one at random, ``sample_all`` each with a chance of one half,
            ``all`` all of them together.
        source_weight: weight of the loss on the sources' answers.
        readout_weight: weight of the linear heads' loss.
        detach_source: stop gradients at the sources' activations.
        parts: paths of the model's modules or parameters that are trained, with ``*`` for any text; None: all that is
            not frozen or, with LoRA, none.
        lora_rank: rank of the adapters that are added to the frozen model; None: no adapters.
        lora_alpha, lora_targets: scale of the adapters, and where they go: see :func:`~itrain.adapters.add_lora`.
        classes: the number of values of each variable, for the linear heads.
        network: the base model, trainable.
        sites, intervention, shared, join_positions, hidden_sizes: as in
            :class:`~itrain.training.interchange.Interchange`.
        optimizer: builds the optimizer from groups of parameters; None: for evaluation only.
        warmup: share of the steps in which the learning rate rises.

    Raises:
        FirstStepError: at the first step, edits at a site have no effect on the answer.
        ValueError: nothing of the model is trained, a part does not exist, or a weight is given for variables that no
            pair interchanges or for nodes of which there are none.
    """

    trains_model: ClassVar[bool] = True
    shows_start: ClassVar[bool] = True
    retracts: ClassVar[bool] = True

    def __init__(
        self,
        *,
        network: Network,
        sites: Placements,
        intervention: Factory | None = None,
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
        task_weight: float = 1.0,
        interchange_weights: Mapping[str, float] | float = 1.0,
        objectives: Mapping[str, ObjectiveFactory] | None = None,
        strict_weight: float = 0.0,
        strict_sites: Sequence[SiteLike] | None = None,
        siit_sampling: Sampling = "individual",
        source_weight: float = 0.0,
        readout_weight: float = 0.0,
        detach_source: bool = False,
        parts: Sequence[str] | None = None,
        lora_rank: int | None = None,
        lora_alpha: float = ALPHA,
        lora_targets: Sequence[str] = (),
        classes: Mapping[str, int] | None = None,
        shared: bool = False,
        join_positions: bool = False,
        hidden_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.remember(locals())
        require_at_least(0, task_weight=task_weight, source_weight=source_weight, readout_weight=readout_weight)
        require_at_least(0, strict_weight=strict_weight)
        weights = interchange_weights if isinstance(interchange_weights, Mapping) else {"": interchange_weights}
        require_at_least(0, interchange_weights=min(weights.values(), default=0))
        self.optimizer, self.warmup = optimizer, warmup
        self.task_weight, self.interchange_weights = task_weight, interchange_weights
        self.source_weight, self.readout_weight = source_weight, readout_weight
        self.interchange = Interchange(
            network,
            sites=sites,
            intervention=intervention,
            shared=shared,
            join_positions=join_positions,
            hidden_sizes=hidden_sizes,
            detach_source=detach_source,
        )
        self.sites = self.interchange.sites
        self.arguments.update(sites=self.placements, hidden_sizes=self.interchange.hidden_sizes)
        given = {"interchange": CrossEntropy} if objectives is None else objectives
        self.objectives = Objectives(given, default=CrossEntropy)
        self.scores = InterchangeScores(self.interchange)
        self.task_accuracy: dict[str, MeanMetric] = {}
        self.strict_weight = strict_weight
        self.resampling = Resampling(self.interchange, sites=strict_sites, sampling=siit_sampling, weight=strict_weight)
        self.strict_accuracy: dict[str, StrictAccuracy] = {}
        self._require_terms()
        choose_weights(network, parts=parts, lora_rank=lora_rank, lora_alpha=lora_alpha, lora_targets=lora_targets)
        self._alone = parts is not None and lora_rank is None
        network.eval()
        self.readouts = Readouts(self.interchange, classes=classes) if readout_weight else nn.ModuleList()
        match_precision(self.readouts, network)
        self.network = network

    def _require_terms(self) -> None:
        """Refuse objectives that have the name of another term, and strict training where there are no nodes."""
        if clash := TERMS & self.objectives.parts.keys():
            raise ValueError(f"objectives: '{min(clash)}' names another term of the loss; choose another name")
        if self.strict_weight and not self.resampling.nodes(self.trained):
            raise ValueError(
                "strict_weight: nothing can be resampled, since the interventions leave no coordinate of their sites; "
                "give the variables fewer coordinates (intervention.blocks), or name strict_sites=[<site>, ...]"
            )

    def training_step(self, batch: CounterfactualBatch, batch_idx: int) -> Tensor:
        terms = self.terms(batch)
        loss = torch.stack([weight * losses for weight, losses in terms.values()]).sum(0).mean()
        self.log_dict({f"train/{name}_loss": each.mean() for name, (_, each) in terms.items()}, batch_size=len(batch))
        self.log("train/loss", loss, prog_bar=self.shows_loss, batch_size=len(batch))
        return loss * batch.weight + self.interchange.penalty(batch)

    def terms(self, batch: CounterfactualBatch) -> dict[str, tuple[Tensor | float, Float[Tensor, " batch"]]]:
        """The weight and the pairs' losses of each term whose weight is not 0."""
        terms = {
            "task": (self.task_weight, self.task_loss),
            "strict": (self.strict_weight, self.strict_loss),
            "source": (self.source_weight, self.source_loss),
            "readout": (self.readout_weight, self.readout_loss),
        }
        found: dict[str, tuple[Tensor | float, Tensor]] = {
            name: (weight, loss(batch)) for name, (weight, loss) in terms.items() if weight
        }
        of_pairs = self.weight_of_pairs(batch)
        if self._interchanges(of_pairs):
            of_pairs = of_pairs.to(batch.base_label.device, non_blocking=True)
            weights = {name: each.weight * of_pairs for name, each in self.objectives.parts.items()}
            found |= {name: (weights[name], losses) for name, losses in self.interchange_losses(batch).items()}
        return found

    def _interchanges(self, of_pairs: Float[Tensor, " batch"]) -> bool:
        """Whether pairs are interchanged: where they count here, or in another process's share of the batch."""
        return bool(of_pairs.any()) or (self.network.in_step and self._weighs_pairs)

    @property
    def _weighs_pairs(self) -> bool:
        weights = self.interchange_weights
        return any(weights.values()) if isinstance(weights, Mapping) else bool(weights)

    def task_loss(self, batch: CounterfactualBatch) -> Float[Tensor, " batch"]:
        """The loss of each base's own answer."""
        return answer_loss(self.network(batch.own), batch.base_label)

    def interchange_losses(self, batch: CounterfactualBatch) -> dict[str, Float[Tensor, " batch"]]:
        """The loss of each counterfactual answer by each objective."""
        edited: dict[Placement, Edited] | None = {} if self.objectives.needs_edited else None
        logits = self.interchange(batch, self.trained, edited)
        outcome = Outcome(logits=logits, batch=batch, network=self.network, edited=edited or {})
        return self.objectives(outcome)[1]

    def strict_loss(self, batch: CounterfactualBatch) -> Float[Tensor, " batch"]:
        """The loss of each base's own answer while nodes of this step are resampled."""
        nodes = self.resampling.drawn(self.global_step)
        return answer_loss(self.resampling.answers(batch, nodes), batch.base_label)

    def source_loss(self, batch: CounterfactualBatch) -> Float[Tensor, " batch"]:
        """The loss of the answers on each pair's sources, summed over the sources."""
        of_variables = []
        for variable in batch.sources:
            rows, source = batch.rows(variable), batch.own_source(variable)
            if rows is not None and not len(rows) and not self.network.in_step:
                continue
            ran = torch.arange(len(batch)) if rows is None or self.network.in_step else rows
            labels = batch.source_labels[variable]
            at = ran.to(labels.device, non_blocking=True)
            losses = answer_loss(self.network(source.take(ran)), labels[at])
            if rows is not None and ran is not rows:
                at = rows.to(labels.device, non_blocking=True)
                losses = losses[at]
            of_variables.append(losses.new_zeros(len(batch)).index_add(0, at, losses))
        return torch.stack(of_variables).sum(0)

    def readout_loss(self, batch: CounterfactualBatch) -> Float[Tensor, " batch"]:
        """The mean loss of the linear heads, which read the variables' values from the bases."""
        return cast(Readouts, self.readouts).losses(self.interchange, batch)

    def weight_of_pairs(self, batch: CounterfactualBatch) -> Float[Tensor, " batch"]:
        """The interchange weight of each pair, by the variables that it interchanges, on the CPU."""
        names = ["+".join(group) for group in batch.groups]
        weights = self.interchange_weights
        if not isinstance(weights, Mapping):
            weights = dict.fromkeys(names, weights)
        for name in weights:
            if name not in names:
                raise ValueError(f"interchange_weights: no pair interchanges '{name}'; there are {', '.join(names)}")
        return torch.tensor([weights.get(name, 0.0) for name in names])[batch.group]

    def attach_to(self, model: nn.Module, sources: Mapping[str, ModelInputs], how: Attaching) -> Attached:
        """Attach the interventions to the co-trained model.

        Raises:
            ValueError: the model is another one, which has not been trained.
        """
        if unwrap(model) is not unwrap(self.network.model):
            raise ValueError(
                f"{type(self).__name__} has trained the weights of its own model, which this one has not: leave model "
                "out, and call training.network.model inside"
            )
        return attach_interchange(self.interchange, model, sources, how)

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        """The intervention of each placement, under its name, and the model."""
        return {**self.interchange.parts, "model": self.network.model}

    @property
    def exported(self) -> nn.Module:
        return nn.ModuleDict({"interventions": self.interchange.interventions, "network": self.network})

    def parameter_groups(self) -> list[dict[str, Any]]:
        own = [*self.readouts.parameters(), *self.network.parameters()]
        return [*self.interchange.parameter_groups(), {"params": [each for each in own if each.requires_grad]}]

    def predict_step(self, batch: CounterfactualBatch, batch_idx: int) -> Float[Tensor, "batch vocabulary"]:
        """The logits of each pair's interchange, with gates as in evaluation."""
        return self.interchange(batch, self.interchange.hardened())

    def begin(self, split: str) -> None:
        self.scores.begin(split)
        self.task_accuracy.clear()
        self.strict_accuracy.clear()

    def score(self, split: str, batch: CounterfactualBatch) -> None:
        clean = self.network(batch.own)
        self.scores.score(split, batch, clean if batch.answered is None else None)
        right = is_right(clean, batch.base_label)
        self.task_accuracy.setdefault(split, MeanMetric().to(right.device)).update(
            right.float(), is_known(batch.base_label).float()
        )
        for placement, node in self.resampling.nodes(self.interchange.hardened()).items():
            strict = self.strict_accuracy.setdefault(split, StrictAccuracy().to(right.device))
            strict.update(self.resampling.answers(batch, {placement: node}), batch.base_label)

    def figures(self, split: str) -> dict[str, Tensor]:
        found = {f"{split}/task_accuracy": metric.compute() for split, metric in self.task_accuracy.items()}
        found |= {f"{split}/strict_accuracy": metric.compute() for split, metric in self.strict_accuracy.items()}
        self.task_accuracy.clear()
        self.strict_accuracy.clear()
        return self.scores.compute() | found

    def check(self, data: SplitDataModule) -> None:
        super().check(data)
        self.objectives.require(data.datasets["train"].examples)
        data.require([Placement(write=site) for site in self.resampling.sites])

    @property
    def groups(self) -> Sequence[Sequence[Site]]:
        """The sites that are edited together: those of the interventions, and those that are resampled."""
        return [self.edited, *([self.resampling.sites] if set(self.resampling.sites) - set(self.sites) else [])]

    def export_arguments(self) -> dict[str, Any]:
        return {name: value for name, value in super().export_arguments().items() if name != "objectives"}

    def on_fit_start(self) -> None:
        require_terms(self, "task_weight", "interchange_weights", "strict_weight", "source_weight", "readout_weight")
        if not (self._weighs_pairs or self.strict_weight or self.readout_weight):
            require_unlearned(self.trained, f"interchange_weights={self.interchange_weights}")
        self._train_mode()

    def _train_mode(self) -> None:
        """Put what is trained of the model into train mode, and leave the rest in eval mode."""
        self.network.train()
        frozen_to_eval(self.network.model, whole=self._alone)

    def on_train_batch_start(self, batch: CounterfactualBatch, batch_idx: int) -> None:
        """Refuse, at the first step, a site that the answer does not depend on."""
        if self.trainer.global_step or batch_idx:
            return
        # The model's own weights get gradients all the same, so a missing gradient cannot tell.
        self.network.eval()
        with torch.no_grad():
            answers = self.network(batch.base)
            for site in self.sites:
                if torch.equal(self.network.edit(batch.base, [(site, _disturb)]), answers):
                    raise FirstStepError(
                        f"site '{site}': edits there have no effect on the label; choose a lower layer or, in the "
                        "upper layers, the answer's own token, 'last'"
                    )
        self._train_mode()

    def on_fit_end(self) -> None:
        self.network.eval()


def _disturb(activation: Tensor) -> Tensor:
    """Change every value, in a way that no normalisation undoes."""
    return activation.roll(1, -1) + 1
