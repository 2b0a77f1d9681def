"""Training: the base class of all training modules, with the whole life of a fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import lightning
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from itrain.data.splits import SplitDataModule
from itrain.inputs import Acts, ModelInputs
from itrain.interventions.orthogonal import retract_after_steps
from itrain.models import BaseModel
from itrain.networks.attached import Attached
from itrain.networks.base import Network
from itrain.placements import Placement
from itrain.sites import Site
from itrain.training.attaching import Attaching, Source, inputs_of, model_to_attach, sources_of
from itrain.training.building import in_a_line, require_meant, require_one_place
from itrain.training.callbacks import Preparation, Schedules, Termination
from itrain.training.checkpointed import Checkpointed
from itrain.training.finite import FirstStepCheck, NotFiniteError
from itrain.training.optimization import OptimizerFactory, with_linear_schedule
from itrain.training.sharded import Shardable

if TYPE_CHECKING:
    from itrain.tasks.responses import Tokenizer

SHOWN = 10
"""How many of its trained parts a training prints."""


class Training(Shardable, Checkpointed, ABC):
    """A LightningModule that trains something at sites of a base model.

    ``Trainer.fit`` alone is a whole fit: the callbacks that :meth:`configure_callbacks` adds fit closed-form
    statistics, prepare the network, move schedules and check the first step.

    A subclass begins its constructor with ``self.remember(locals())``, so that checkpoints and exports know its
    arguments. It registers the network last, after everything else that is trained, because another strategy that reads
    a checkpoint matches optimizer state by position among all parameters.
    """

    trains_model: ClassVar[bool] = False
    """Whether the base model's own weights are trained."""
    shows_start: ClassVar[bool] = False
    """Whether a run also tests the untrained start, and reports it as ``before/...``."""
    settles_in_test: ClassVar[bool] = False
    """Whether a test chooses something that an export holds, such as a strength."""
    finds_edits: ClassVar[bool] = False
    """Whether a fit finds what its interventions change, so that they change nothing before it."""
    retracts: ClassVar[bool] = False
    """Whether orthonormal rows are retracted after each step, so that steps keep their size."""

    network: Network
    sites: tuple[Site, ...]
    optimizer: OptimizerFactory | None
    warmup: float
    fitted: Bool[Tensor, ""]
    """Whether the closed-form statistics have been fitted or loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.provenance: dict[str, Any] = {}
        """What an export says besides the weights, where it is known: base model, metrics and configuration."""
        self.tokenizer: Tokenizer | None = None
        """Of texts that are attached as sources; None: unknown."""
        self.fitted_to: object | None = None
        """The data whose statistics this module has fitted itself; None: none, or they were loaded."""
        self.shows_loss = True
        """Whether there is a progress bar for the loss of each step: what one shows, an accelerator is waited for."""
        self.register_buffer("fitted", torch.tensor(False))

    def __repr__(self) -> str:
        """What is trained, a line each; the base model is left out."""
        parts = list(self.trained_parts.items())
        lines = [f"  {name}: {in_a_line(part)}" for name, part in parts[:SHOWN]]
        more = [f"  and {len(parts) - SHOWN} more"] if len(parts) > SHOWN else []
        return "\n".join([type(self).__name__, *lines, *more])

    @property
    @abstractmethod
    def trained_parts(self) -> dict[str, nn.Module]:
        """The modules that are trained, under names that messages use."""

    @property
    @abstractmethod
    def exported(self) -> nn.Module:
        """The module whose weights an export holds."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters, in groups as an optimizer takes them."""

    @abstractmethod
    def score(self, split: str, batch: Any) -> None:
        """Update a split's figures with a batch."""

    @abstractmethod
    def figures(self, split: str) -> dict[str, Tensor]:
        """The figures over all batches of a split since the last call; their names begin with the split's."""

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Where interventions act and read, and for which variables; of a training that only reads, its sites."""
        return Placement.parse_all(self.sites)

    @property
    def edited(self) -> tuple[Site, ...]:
        """The sites that are edited in a run of the model."""
        return self.sites

    @property
    def fits_activations(self) -> bool:
        """Whether :meth:`fit_activations` has something to learn."""
        return False

    def fit_activations(self, batches: Iterable[Any]) -> None:
        """Fit closed-form statistics on batches of the training data, and note that they are known."""
        self.learn_statistics(batches)
        self.fitted.fill_(True)

    def learn_statistics(self, batches: Iterable[Any]) -> None:
        """Learn closed-form statistics, where ``fits_activations`` says that there are any."""

    @property
    def watched(self) -> Mapping[str, Training]:
        """The trainings whose losses and weights must stay finite, under the names of :meth:`losses_of_step`."""
        return {"": self}

    def losses_of_step(self, loss: Float[Tensor, ""]) -> tuple[Sequence[str], Float[Tensor, " names"]]:
        """The losses of the training step that has just run, by name, given their sum."""
        return ("",), loss.view(1)

    def give_up(self, errors: Mapping[str, NotFiniteError]) -> None:
        """End the fit, because losses or weights of some that are watched are not finite.

        Raises:
            NotFiniteError: the first of the errors.
        """
        raise next(iter(errors.values()))

    def anneal(self, progress: float) -> None:
        """Set scheduled values for the progress of training, from 0 to 1."""

    def begin(self, split: str) -> None:
        """Choose what is scored on a split, before its first batch."""

    def prepare(self, data: SplitDataModule, *, uses: int | None = None) -> str:
        """Prepare a fit on the data; return a line that says how the model will be run, and why.

        Statistics that were loaded are kept, and those that were fitted here are fitted again to other data.

        Args:
            data: the data module, set up.
            uses: how often each example will be used, for example the number of epochs; None: often.

        Raises:
            PositionError: an example lacks the position of a site.
            ValueError: a placement names a variable that the task lacks, or none serves one that pairs interchange.
        """
        self.check(data)
        read = tuple(dict.fromkeys(each.read for each in self.placements))
        how = self.network.prepare(self.groups, data.edited(), data.read(), uses=uses, read=read)
        if self.lacks_statistics_of(data):
            self.fit_activations(data.whole("train"))
            self.fitted_to = data
        return how

    def check(self, data: SplitDataModule) -> None:
        """Refuse data in which the placements have no sense, before the model runs; raises as :meth:`prepare` does."""
        data.require(self.placements)
        if not self.finds_edits:
            require_meant(self.trained_parts, getattr(data, "task", None))

    def lacks_statistics_of(self, data: object) -> bool:
        """Whether closed-form statistics are to be fitted to this data, or data loader, before a fit."""
        return self.fits_activations and (not self.fitted or self.fitted_to not in (None, data))

    @property
    def groups(self) -> Sequence[Sequence[Site]]:
        """The sites that are edited together, for each fit that uses the examples; none where nothing is edited."""
        return [self.edited] if self.edited else ()

    def attach(
        self,
        model: nn.Module | BaseModel | None = None,
        *,
        source: Source | Mapping[str, Source] | None = None,
        acts: Acts | Sequence[int] | None = None,
        strength: float = 1.0,
        prompts: Source | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Attached:
        """Have what was trained act in all calls of a model until it is detached.

        ``with training.attach(model): model.generate(...)``; outside of a ``with``, call ``detach()``.

        Args:
            model: the base model that the training was made for, also wrapped; None: the training's own.
            source: what interventions that take a source are given, read once: a text, a text and its continuation, a
                list of these with one for each prompt, the model's arguments as tensors, or inputs of a task; a mapping
                names one for each variable.
            acts: on which tokens edits act, ``prompt``, ``all``, ``generated``, or some generated ones, as ``[0, 2]``,
                counted from 0; None: as in the training.
            strength: how much of an edit's effect is applied: base + strength * (edit(base) - base). 1 is the edit as
                exported; a steering that a test has tried is exported at the strength chosen there, which this scales.
            prompts: the prompts of all calls, as ``source`` is given, where positions name spans.
            tokenizer: of the source's texts; None: that of the base model.

        Raises:
            ValueError: the training edits nothing, the model is another one, or a source is missing.
        """
        target = model_to_attach(model, self)
        tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None) or self.tokenizer
        sources = sources_of(source, target, tokenizer)
        texts = None if prompts is None else inputs_of(prompts, target, tokenizer)
        return self.attach_to(target, sources, Attaching(acts=acts, strength=strength, prompts=texts))

    def attach_to(self, model: nn.Module, sources: Mapping[str, ModelInputs], how: Attaching) -> Attached:
        """Have what was trained act in all calls of the model; raises as :meth:`attach` does."""
        raise ValueError(f"{type(self).__name__} edits nothing, so that there is nothing to attach")

    def export_arguments(self) -> dict[str, Any]:
        """The constructor's arguments that rebuild what is exported, without network and optimizer."""
        return {name: value for name, value in self.arguments.items() if name != "optimizer"}

    def configure_callbacks(self) -> list[lightning.Callback]:
        return [Preparation(self), Schedules(self), FirstStepCheck(self), Termination()]

    def configure_optimizers(self) -> dict[str, Any] | None:
        if self.trains_model and not any(parameter.requires_grad for parameter in self.network.parameters()):
            raise ValueError(
                "nothing of the model is trained: another network that was made of the same model has frozen it; make "
                "the trainable one last, or load the model again for the other"
            )
        groups = [group for group in self.parameter_groups() if group["params"]]
        if not groups:
            return None
        if self.optimizer is None:
            raise ValueError("training needs an optimizer, for example optimizer=partial(torch.optim.Adam, lr=1e-2)")
        optimizer = self.optimizer(groups)
        if self.retracts:
            retract_after_steps(optimizer, self)
        return with_linear_schedule(optimizer, self.trainer, self.warmup)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: BaseModel | None = None,
        metrics: Mapping[str, float] | None = None,
        configuration: Mapping[str, Any] | None = None,
        subfolder: str = "",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> str:
        """Push what was trained to a repository of the Hugging Face hub, as :func:`itrain.sharing.push_to_hub` does."""
        given = {name: value for name, value in locals().items() if name not in ("self", "repo_id")}
        # Exports are made of trainings, so that their room lies above this one.
        return import_module("itrain.sharing").push_to_hub(self, repo_id, **given)

    def setup(self, stage: str) -> None:
        require_one_place(self.network, self.trainer)
        self.shows_loss = self.trainer.progress_bar_callback is not None
        if stage == "fit":
            self.provenance.pop("metrics", None)  # of the weights as they were
        if stage == "fit" and self.trainer.checkpoint_callbacks:
            self.loaded_fingerprint()  # before the weights are divided among processes

    def on_validation_start(self) -> None:
        self.begin("validation")

    def on_test_start(self) -> None:
        self.begin("test")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.score("validation", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.score("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._log_figures("validation")

    def on_test_epoch_end(self) -> None:
        self._log_figures("test")

    def _log_figures(self, split: str) -> None:
        # Processes with accelerators reduce no tensor of the CPU.
        self.log_dict({name: each.to(self.device) for name, each in self.figures(split).items()}, sync_dist=True)
