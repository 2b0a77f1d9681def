"""Finetuning on responses: of representations (ReFT) and, for comparison, of weights (LoRA)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchmetrics import MeanMetric, Metric
from torchmetrics.text import Perplexity

from itrain.adapters import add_lora, maps_of, scaled
from itrain.architectures import unwrap
from itrain.data.responses import ResponseBatch, ResponseDataModule
from itrain.data.splits import SplitDataModule
from itrain.devices import device_of
from itrain.inputs import Acts, ModelInputs
from itrain.metrics import UNUSED, is_right
from itrain.networks.attached import Attached, AttachedMaps
from itrain.networks.base import Network
from itrain.networks.lane import EditAt, require_acts
from itrain.objectives.cross_entropy import answer_loss
from itrain.placements import Factory, Placements
from itrain.sites import module_names
from itrain.training.attaching import Attaching, attach_interchange
from itrain.training.base import Training
from itrain.training.finite import FiniteAnswers
from itrain.training.interchange import Interchange, Interventions
from itrain.training.optimization import OptimizerFactory, at_rest
from itrain.training.placed import Placed

SHOWN = 8
"""The number of test examples whose generations a run shows."""


class Generations(NamedTuple):
    """Prompts, with the tokens generated before and after the training, and those of the right responses."""

    prompt: Sequence[str]
    before: Int[Tensor, "batch new"]
    after: Int[Tensor, "batch new"]
    wanted: Int[Tensor, "batch new"]


class Finetuning(Training):
    """Trains a model's responses to prompts.

    loss = 1/N sum_n 1/T_n sum_t -log p(y_nt | prompt_n, y_n1 ... y_n(t-1)), over the T_n tokens of each response,
    including the one that ends it. Each example has the same weight, whatever the length of its response, so that
    processes and accumulated batches give the loss of the whole batch.

    ``perplexity`` is exp of the mean of -log p over all tokens of all responses. ``exact_match`` is the share of
    prompts whose greedy generation is the response. That holds if and only if each token is the likeliest one given the
    right tokens before it, so one run of the right response decides it.
    """

    shows_start: ClassVar[bool] = True
    answers: FiniteAnswers
    generations: Generations
    """For the first test examples of this process, set by each test."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, Metric] = {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SplitDataModule) and not isinstance(data, ResponseDataModule):
            raise ValueError(f"{type(self).__name__} learns from data=responses, not from {type(data).__name__}")

    @abstractmethod
    def edits(self) -> list[EditAt]:
        """The edits of prompts, and of responses where they act there too."""

    def generating_edits(self) -> list[EditAt]:
        """The edits under which text is generated."""
        return self.edits()

    def respond(self, batch: ResponseBatch) -> Float[Tensor, "batch response vocabulary"]:
        """The logits of each response's tokens, given the prompt and the right tokens before."""
        with parametrize.cached():
            return self.network.edit(batch.inputs, self.edits())

    def generate(
        self,
        inputs: ModelInputs,
        *,
        max_new_tokens: int,
        end: int | None = None,
        trained: bool = True,
        **settings: Any,
    ) -> Int[Tensor, "batch new"]:
        """Continue each prompt, greedily unless the settings say otherwise, as those of ``Network.generate``.

        ``trained=False`` generates as before the training.
        """
        edits = self.generating_edits() if trained else []
        return self.network.generate(inputs, edits, max_new_tokens=max_new_tokens, end=end, **settings)

    def penalty(self) -> Tensor | float:
        """The penalty on the size of what is trained, which the loss adds."""
        return 0.0

    def training_step(self, batch: ResponseBatch, batch_idx: int) -> Tensor:
        loss = self.losses(batch).mean()
        self.log("train/loss", loss, prog_bar=self.shows_loss, batch_size=len(batch))
        loss = loss * batch.weight + self.penalty()
        # Edits of the tokens that a later step is given act in none of a batch of short responses.
        return loss if loss.requires_grad else loss + at_rest(self.exported.parameters())

    def losses(self, batch: ResponseBatch) -> Float[Tensor, " batch"]:
        """The training loss of each example."""
        return answer_loss(self.respond(batch), batch.label)

    def test_step(self, batch: ResponseBatch, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        if batch_idx == 0:
            shown = batch.take(torch.arange(min(SHOWN, len(batch))))
            length = shown.label.shape[1]
            before, after = (self.generate(shown.inputs, max_new_tokens=length, trained=each) for each in (False, True))
            prompt = shown.inputs.texts or ()
            self.generations = Generations(prompt, before=before, after=after, wanted=shown.label)

    def predict_step(self, batch: ResponseBatch, batch_idx: int) -> Float[Tensor, "batch response vocabulary"]:
        """The logits of each response's tokens."""
        return self.respond(batch)

    def begin(self, split: str) -> None:
        self.metrics.clear()
        self.answers = FiniteAnswers(self.network)

    def score(self, split: str, batch: ResponseBatch) -> None:
        logits = self.respond(batch).float()
        self.answers.update(split, logits)
        if not self.metrics:
            made = {"perplexity": Perplexity(ignore_index=UNUSED), "exact_match": MeanMetric()}
            self.metrics = {f"{split}/{name}": metric.to(logits.device) for name, metric in made.items()}
        perplexity, exact_match = self.metrics.values()
        perplexity.update(logits, batch.label)
        exact_match.update(is_right(logits, batch.label).float())

    def figures(self, split: str) -> dict[str, Tensor]:
        self.answers.require()
        found = {name: metric.compute() for name, metric in self.metrics.items()}
        self.metrics.clear()
        return found


class RepresentationFinetuning(Placed[Interchange], Finetuning):
    """Finetunes a frozen model by interventions on its activations.

    A position such as ``first2+last2`` counts the prompt's tokens. The interventions act on these, once, and the
    response is run unedited (Wu et al. 2024, "ReFT: Representation Finetuning for Language Models"), unless ``acts``
    says that they act on the response's tokens too, in training as in generation.

    Args:
        network: the base model, frozen.
        sites, intervention, shared, hidden_sizes: as in :class:`~itrain.training.interchange.Interchange`.
        optimizer: builds the optimizer from groups of parameters; None: for evaluation only.
        warmup: share of the steps in which the learning rate rises.
        acts: on which tokens the interventions act: ``prompt``, ``all`` (those of the response too), ``generated``
            (those alone), or some of the response's, as ``[0, 2]``, counted from 0.

    Raises:
        ValueError: a site has no position, so that the response would be edited too; or an intervention takes a source,
            or a placement reads one or names variables.
    """

    def __init__(
        self,
        *,
        network: Network,
        sites: Placements,
        intervention: Factory | None = None,
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
        shared: bool = False,
        hidden_sizes: Sequence[int] | None = None,
        acts: Literal["prompt", "all", "generated"] | Sequence[int] = "prompt",
    ) -> None:
        super().__init__()
        self.remember(locals())
        self.optimizer, self.warmup = optimizer, warmup
        self.acts: Acts = require_acts(acts)
        self.interchange = Interchange(
            network, sites=sites, intervention=intervention, shared=shared, hidden_sizes=hidden_sizes
        )
        self.sites = self.interchange.sites
        self.arguments.update(sites=self.placements, hidden_sizes=self.interchange.hidden_sizes, acts=self.acts)
        self.network = network
        for placement, each in self.trained.items():
            site = placement.write
            if not placement.is_plain:
                raise ValueError(
                    f"site '{placement}': responses have neither sources to read nor variables; name the site alone: "
                    f"site={site}"
                )
            if site.position is None:
                raise ValueError(
                    f"site '{site}': the prompt is edited, not the response; name its tokens, as in '{site}@all'"
                )
            if each.takes_source:
                raise ValueError(
                    f"{type(each).__name__} takes a source, and responses have none; try intervention=loreft"
                )

    def attach_to(self, model: nn.Module, sources: Mapping[str, ModelInputs], how: Attaching) -> Attached:
        how = how if how.acts is not None else how._replace(acts=self.acts)
        return attach_interchange(self.interchange, model, sources, how)

    def check(self, data: SplitDataModule) -> None:
        super().check(data)
        inputs = data.datasets["train"].examples.inputs
        longest = 0 if inputs.tokens is None else int((inputs.extent[1] - inputs.tokens[:, 1]).max())
        if self.network.in_step and self.acts not in ("prompt", "all"):
            raise ValueError(
                f"acts={self.acts}: a process whose responses all lack such tokens would make other runs than those "
                "with which it shares the model's weights; act on 'all', or train with trainer=ddp"
            )
        first, said = (min(self.acts), list(self.acts)) if isinstance(self.acts, tuple) else (0, self.acts)
        if said not in ("prompt", "all") and first >= longest:
            raise ValueError(
                f"acts={said}: a training response goes on after {longest} of its tokens at most, counted from 0, so "
                "that nothing would be edited; act earlier, or on 'all'"
            )

    def edits(self) -> list[EditAt]:
        return self.edits_of(self.trained if self.training else self.interchange.hardened())

    def edits_of(self, interventions: Interventions) -> list[EditAt]:
        """The edits that the interventions of the placements make."""
        return [
            EditAt(placement.write, partial(each, source=None), self.acts) for placement, each in interventions.items()
        ]

    def penalty(self) -> Tensor | float:
        return self.interchange.penalty()

    def learn_statistics(self, batches: Iterable[ResponseBatch]) -> None:
        """Fit closed-form statistics to the activations of the training prompts."""
        self.interchange.fit((batch.inputs, None) for batch in batches)


class LoRA(nn.ModuleDict):
    """The two matrices of an adapter."""


class AttachedAdapters(Attached):
    """Adapters of a model that act scaled; afterwards they act as before.

    Args:
        model: the model that has them.
        adapted: its modules with adapters.
        strength: their scale.
    """

    def __init__(self, model: nn.Module, adapted: Sequence[nn.Module], *, strength: float) -> None:
        super().__init__(model, strength=strength)
        self.adapted = adapted
        self.attach()

    def _install(self, stack: ExitStack) -> None:
        stack.enter_context(scaled(self.adapted, self.strength))

    def _what(self) -> str:
        return f"adapters of {len(self.adapted)} modules"


class LoRAFinetuning(Finetuning):
    """Finetunes a model by low-rank adapters of its weights: the baseline of ReFT, on the same data and loss.

    Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models".

    Args:
        network: the base model, trainable; its own weights are frozen here, and the adapters are added in place.
        rank, alpha, targets: as in :func:`~itrain.adapters.add_lora`.
        optimizer: builds the optimizer from groups of parameters; None: for evaluation only.
        warmup: share of the steps in which the learning rate rises.
    """

    trains_model: ClassVar[bool] = True

    def __init__(
        self,
        *,
        network: Network,
        targets: Sequence[str],
        rank: int = 8,
        alpha: float = 16.0,
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        self.remember(locals())
        self.sites = ()
        self.targets, self.rank, self.alpha = list(targets), rank, alpha
        self.optimizer, self.warmup = optimizer, warmup
        self._adapted = add_lora(network.model, rank=rank, alpha=alpha, targets=self.targets)
        self.network = network

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        """The adapters of each module, under its path."""
        return {
            path: LoRA({"A": module.lora_A, "B": module.lora_B})  # type: ignore[dict-item]
            for path, module in self._adapted.items()
        }

    @property
    def exported(self) -> nn.Module:
        parts = self.trained_parts
        return nn.ModuleDict(dict(zip(module_names(list(parts)), parts.values(), strict=True)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.exported.parameters())}]

    def attach_to(self, model: nn.Module, sources: Mapping[str, ModelInputs], how: Attaching) -> Attached:
        """Attach the adapters: to a model without any, or to that in which they are, where they are scaled.

        Raises:
            ValueError: a source is given, or when they act, which is always.
        """
        if sources or how.acts not in (None, "all"):
            what = "takes no source" if sources else f"changes weights, which act at all tokens, not acts={how.acts!r}"
            raise ValueError(f"{type(self).__name__} {what}; leave that out")
        if unwrap(model) is unwrap(self.network.model):
            return AttachedAdapters(model, list(self._adapted.values()), strength=how.strength)
        maps = {path: maps_of(module) for path, module in self._adapted.items()}
        self.exported.to(device_of(model))
        return AttachedMaps(model, maps, scale=self.alpha / self.rank, strength=how.strength)

    def edits(self) -> list[EditAt]:
        return []

    def generate(
        self,
        inputs: ModelInputs,
        *,
        max_new_tokens: int,
        end: int | None = None,
        trained: bool = True,
        **settings: Any,
    ) -> Int[Tensor, "batch new"]:
        self._switch(trained)
        try:
            return super().generate(inputs, max_new_tokens=max_new_tokens, end=end, **settings)
        finally:
            self._switch(True)

    def prepare(self, data: SplitDataModule, *, uses: int | None = None) -> str:
        super().prepare(data, uses=uses)
        return "the whole model, with adapters"

    def _switch(self, on: bool) -> None:
        for module in self._adapted.values():
            module.enable_adapters(on)  # type: ignore[operator]
