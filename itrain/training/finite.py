"""Numbers that are not finite: a fit, statistics or answers that hold some end with an error, and never as a result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import SumMetric

from itrain.architectures import unwrap
from itrain.interventions.base import Intervention
from itrain.metrics import gather_counts
from itrain.networks.base import Network
from itrain.shards import local
from itrain.sites import Site
from itrain.training.callbacks import FirstStepError, FitCallback, data_of
from itrain.weights import served_by, weights

if TYPE_CHECKING:
    import lightning

DIVERGED = "diverged"
"""The figure of a fit that has no others; results know it by this name."""
STEPS = 50
"""The steps after which their losses are looked at, so that an accelerator is not waited for in each."""


class NotFiniteError(RuntimeError):
    """A loss, weight, activation or answer is NaN or infinite.

    Args:
        message: what, where and when.
        places: the sites or parts, as the training names them; none: it concerns all.
    """

    def __init__(self, message: str, places: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.places = tuple(places)


class Step(NamedTuple):
    """The losses of a step, by name."""

    epoch: int
    number: int
    names: Sequence[str]
    losses: Float[Tensor, " names"]


class FiniteCheck(FitCallback):
    """Ends a fit in which a loss or a trained weight is no finite number any more.

    A step only keeps its losses. They are looked at in the first step and after every 50; losses and weights before a
    validation, a test or a prediction, at the end of an epoch, and before a checkpoint is written: it would replace the
    last good one.

    Raises:
        NotFiniteError: saying what, where and when.
    """

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.steps: list[Step] = []
        self.begun = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.steps.clear()
        self.begun = False

    def on_before_backward(self, trainer: lightning.Trainer, pl_module: Any, loss: Tensor) -> None:
        if pl_module is not self.module:
            return
        names, losses = pl_module.losses_of_step(loss.detach())
        self.steps.append(Step(trainer.current_epoch, trainer.global_step, names, losses))
        if not self.begun or len(self.steps) == STEPS:
            self._look(trainer, weights=False)
            self.begun = True

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._look_at_all(trainer, pl_module)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._look_at_all(trainer, pl_module)

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._look_at_all(trainer, pl_module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._look_at_all(trainer, pl_module)

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._look_at_all(trainer, pl_module)

    def _look_at_all(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if pl_module is self.module:
            self._look(trainer, weights=True)

    def _look(self, trainer: lightning.Trainer, *, weights: bool) -> None:
        steps, self.steps = self.steps, []
        training: Any = self.module
        lost = dict(_lost(steps))
        errors: dict[str, NotFiniteError] = {}
        for name, part in training.watched.items():
            fault = fault_in(part) if weights or name in lost else None
            if fault or name in lost:
                errors[name] = _error(trainer, part, lost.get(name, ""), fault)
        # Every process takes part, or those without a fault would wait for the others for good.
        flags = torch.tensor([float(name in errors) for name in training.watched], device=training.device)
        flags = trainer.strategy.reduce(flags, reduce_op="sum") if len(flags) else flags
        for name, flag in zip(training.watched, flags.tolist(), strict=True):
            if flag and name not in errors:
                errors[name] = NotFiniteError("another process has found a loss or weight that is not finite")
        if errors:
            training.give_up(errors)


class FirstStepCheck(FiniteCheck):
    """Also ends a fit at its first optimizer step if a trained module got no gradient.

    An edit without a path to the answer still gives a finite loss and numbers that look like a result: in the last
    block at a token that no later one reads, or at a site above the answer. A loss of exactly 0, that of pairs whose
    weight is 0, tells nothing: the next step decides. For a module that some batches leave alone, the first epoch does.

    Raises:
        FirstStepError: naming the site.
    """

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.done = self.whole = False
        self.first: list[Tensor] = []
        self.waiting: dict[str, nn.Module] | None = None
        """The modules that have had no gradient yet; None: before the first step."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.whole = not trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def on_before_backward(self, trainer: lightning.Trainer, pl_module: Any, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        if not self.done and pl_module is self.module:
            if not loss.requires_grad:
                name, part = next(iter(pl_module.trained_parts.items()))
                raise _without_effect(name, part, "at the first step")
            self.first.append(loss.detach())

    def on_before_optimizer_step(self, trainer: lightning.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        if self.done or pl_module is not self.module:
            return
        # Of sharded weights, the processes have different parts.
        agreed = partial(trainer.strategy.reduce_boolean_decision, all=False)
        if self.waiting is None:
            decides = agreed(any(map(bool, self.first)))
            self.first.clear()
            if not decides:
                return
            self.waiting = dict(pl_module.trained_parts)
        self.waiting = {name: part for name, part in self.waiting.items() if not agreed(_has_gradient(part))}
        self.done = not self.waiting
        for name, part in self.waiting.items():
            if name not in _left_alone(pl_module):
                raise _without_effect(name, part, "at the first step")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if pl_module is self.module and self.whole:
            for name, part in (self.waiting or {}).items():
                raise _without_effect(name, part, "in an epoch")


def _left_alone(training: Any) -> set[str]:
    """The trained parts that some batches leave alone: those of some variables, or of some generated tokens."""
    if getattr(training, "acts", "prompt") not in ("prompt", "all"):
        return set(training.trained_parts)
    return {str(each) for each in training.placements if each.variables is not None}


def _without_effect(name: str, part: nn.Module, when: str) -> FirstStepError:
    if not isinstance(part, Intervention):
        return FirstStepError(
            f"{name}: {type(part).__name__} has no gradient {when}, so that nothing it computes reaches the loss; look "
            "at the weights of the loss, and at scales of 0"
        )
    return FirstStepError(
        f"site '{name}': {type(part).__name__} has no effect on the label there (no gradient {when}); choose a lower "
        "layer or, in the upper layers, the answer's own token, 'last'"
    )


class Fault(NamedTuple):
    """A weight or statistic that is not finite, and the part that has it, if it is known."""

    text: str
    place: str | None


def fault_in(training: Any) -> Fault | None:
    """The first trained weight or statistic of a training that is not finite."""
    exported = training.exported
    weights = {name: each for name, each in exported.named_parameters() if each.requires_grad}
    buffers = {name: each for name, each in exported.named_buffers() if each.is_floating_point()}
    # Infinity in a buffer is a mask or a bound.
    name = _first({**weights, **{name: each.masked_fill(each.isinf(), 0) for name, each in buffers.items()}})
    if name is None:
        return None
    weight = {**weights, **buffers}[name]
    for place, part in training.trained_parts.items():
        for leaf, each in [*part.named_parameters(), *part.named_buffers()]:
            if each is weight:
                # The free parameter behind a parametrised weight goes by the weight's name.
                leaf = leaf.replace("parametrizations.", "").removesuffix(".original")
                return Fault(f"the weight '{leaf}' of {type(part).__name__} at '{place}' is not finite", place)
    return Fault(f"the weight '{name}' is not finite", None)


def fault_in_weights(network: Network) -> Fault | None:
    """The first weight of a base model that is not finite."""
    if served_by(network.model) is not None:
        return None
    own = {name for name, _ in unwrap(network.model).named_parameters(remove_duplicate=False)}
    # One by one, since a quantised weight in full takes more room.
    found = (name for name, value in weights(network.model) if name in own and not local(value).isfinite().all())
    name = next(found, None)
    return Fault(f"the base model's weight '{name}' is not finite", None) if name is not None else None


def require_finite(activations: Tensor, site: Site) -> Tensor:
    """The activations, from which statistics are learned.

    Raises:
        NotFiniteError: some are not finite.
    """
    if not activations.isfinite().all():
        raise NotFiniteError(
            f"site '{site}': activations of the base model there are not finite, so no statistics can be learned from "
            "them; load the model in another precision, or choose another site",
            [str(site)],
        )
    return activations


class FiniteAnswers:
    """Counts, for each place of a table, the examples whose answers are not finite, over all processes.

    Args:
        network: the base model that answers.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.counts: dict[str, SumMetric] = {}

    def update(self, place: str, logits: Float[Tensor, "batch ... vocabulary"]) -> None:
        """Count the examples with a logit that is NaN or plus infinity; minus infinity excludes an output."""
        lost = (~(logits.flatten(1) < torch.inf)).any(1)
        self.counts.setdefault(place, SumMetric(dist_sync_fn=gather_counts).to(logits.device)).update(lost.sum())

    def require(self) -> None:
        """Refuse figures of answers that were not finite, and forget them.

        Raises:
            NotFiniteError: naming the place, and how many there were.
        """
        found = {place: int(count.compute()) for place, count in self.counts.items()}
        self.counts.clear()
        for place, count in found.items():
            if count:
                weight = fault_in_weights(self.network)
                why = weight.text if weight else "load the model in another precision"
                raise NotFiniteError(
                    f"{place}: answers to {count} examples are not finite, so there are no figures; {why}"
                )


def _lost(steps: Sequence[Step]) -> Iterator[tuple[str, str]]:
    """The names whose loss was not finite, each with the first step in which it was not."""
    if not steps:
        return
    places = [(step, name) for step in steps for name in step.names]
    values = torch.cat([step.losses for step in steps]).tolist()
    for (step, name), value in reversed(list(zip(places, values, strict=True))):
        if not isfinite(value):
            yield name, f"the loss is {value} at step {step.number} (epoch {step.epoch})"


def _error(trainer: lightning.Trainer, training: Any, lost: str, fault: Fault | None) -> NotFiniteError:
    place = fault.place if fault else None
    facts = [each for each in (lost, fault.text if fault else "") if each]
    if not _fits(trainer):
        return NotFiniteError(f"{facts[0]}, so there is nothing to evaluate", [place] if place else [])
    if not lost:
        facts[0] += f" at step {trainer.global_step} (epoch {trainer.current_epoch})"
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    kept = f"; the last good checkpoint is '{checkpoint}'" if checkpoint else ""
    base = _fault_of_base(trainer, training)
    why = base.text if base else _STEPS if trainer.global_step else _START if fault else _LOSS
    place = base.place if base else place
    return NotFiniteError(f"{', and '.join(facts)}: {why}{kept}", [place] if place else [])


_STEPS = (
    "the steps are too large; lower the learning rate (training.optimizer.lr) or clip gradients "
    "(trainer.gradient_clip_val=1)"
)
_START = "it was not before the first step either; load it again, or make it anew"
_LOSS = "the model's answer to these examples overflows, though weights are finite; load it in another precision"


def _fault_of_base(trainer: lightning.Trainer, training: Any) -> Fault | None:
    """What is not finite in the base model itself: a weight, or its activations at a site."""
    network = training.network
    if training.trains_model:
        return None
    if weight := fault_in_weights(network):
        return weight
    data = data_of(trainer)
    if data is None or trainer.world_size > 1:  # a read in one process alone would wait for the others
        return None
    inputs = data.edited()[0]
    with torch.no_grad():
        read: Mapping[Site, Tensor] = network.read(
            inputs.take(torch.arange(min(8, inputs.batch_size))).to(training.device), training.sites
        )
    site = _first({str(site): activation for site, activation in read.items()})
    return Fault(f"the base model's activations at '{site}' are not finite", site) if site is not None else None


def _fits(trainer: lightning.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def _first(named: Mapping[str, Tensor]) -> str | None:
    """The first of the tensors that is not finite, of a sharded one in the part here; they are waited for once."""
    if not named:
        return None
    device = next(iter(named.values())).device
    flags = torch.stack([local(each.detach()).isfinite().all().to(device) for each in named.values()]).tolist()
    return next((name for name, finite in zip(named, flags, strict=True) if not finite), None)


def _has_gradient(part: nn.Module) -> bool:
    trainable = [parameter for parameter in part.parameters() if parameter.requires_grad]
    return not trainable or any(p.grad is not None and bool(local(p.grad).count_nonzero()) for p in trainable)
