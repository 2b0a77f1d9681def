"""ProbeTraining: trains probes, beside their controls, at the sites where interventions would act."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from itrain.data import CounterfactualBatch, CounterfactualDataModule, SplitDataModule
from itrain.devices import device_of
from itrain.metrics import gather_counts, likeliest
from itrain.networks.base import Network
from itrain.placements import Placements, plain_sites
from itrain.precision import FullPrecision, match_precision
from itrain.probes import LinearProbe, Probe, control_labels
from itrain.sites import Site, module_names
from itrain.training.base import Training
from itrain.training.finite import FiniteAnswers, require_finite
from itrain.training.optimization import OptimizerFactory
from itrain.training.under import Given, Under


class ProbeSet(nn.Module):
    """The probes of a variable at a site, one for each strength, with their controls and the choice of a strength.

    All start from the same weights, and each is trained independently of the others. Tensor letters: T tasks (the
    probes', then the controls'), L strengths, B batch.
    """

    chosen: Int[Tensor, ""]

    def __init__(self, probe: Probe, strengths: Sequence[float], *, control: bool) -> None:
        super().__init__()
        self.strengths = tuple(strengths)
        tasks = ("probe", "control") if control else ("probe",)
        self.probes = nn.ModuleDict({task: nn.ModuleList(deepcopy(probe) for _ in strengths) for task in tasks})
        self.register_buffer("chosen", torch.tensor(0 if len(strengths) == 1 else -1))

    def forward(self, activation: Float[Tensor, "batch hidden"]) -> Float[Tensor, "tasks strengths batch classes"]:
        # Probes are small and compute in fp32, whatever the model is cast to.
        with torch.autocast(activation.device.type, enabled=False):
            scores = [probe(activation) for probe, _ in self.each()]
        return torch.stack(scores).unflatten(0, (len(self.probes), len(self.strengths)))

    def each(self) -> Iterator[tuple[Probe, float]]:
        """Every probe and control with its strength."""
        for probes in self.probes.values():
            yield from zip(cast("Iterable[Probe]", probes), self.strengths, strict=True)

    def penalty(self) -> Float[Tensor, ""]:
        return torch.stack([strength / 2 * probe.squared_norm() for probe, strength in self.each()]).sum()

    def choose(self, accuracy: Float[Tensor, " strengths"]) -> None:
        """Choose the most accurate strength; ties go to the first."""
        found = accuracy.tolist()
        self.chosen.fill_(found.index(max(found)))

    @property
    def choice(self) -> int:
        """The index of the chosen strength.

        Raises:
            ValueError: no strength has been chosen yet.
        """
        if self.chosen < 0:
            raise ValueError("no strength has been chosen yet: validate before the test, or give l2 a single strength")
        return int(self.chosen)

    @property
    def best(self) -> Probe:
        """The probe of the chosen strength."""
        return list(self.each())[self.choice][0]


class ProbeAccuracy(Metric):
    """The accuracy of each probe of a set, that of the most frequent class, and the number of examples.

    The states are integers and sum over processes, so the result does not depend on how the examples were divided.
    """

    full_state_update = False
    right: Tensor
    classes: Tensor

    def __init__(self, *, tasks: int, strengths: int, num_classes: int) -> None:
        super().__init__(dist_sync_fn=gather_counts)
        self.add_state("right", torch.zeros(tasks, strengths, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("classes", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, scores: Float[Tensor, "tasks strengths batch classes"], values: Int[Tensor, "tasks batch"]
    ) -> None:
        self.right += (likeliest(scores) == values[:, None]).sum(-1)
        self.classes += values[0].bincount(minlength=len(self.classes))

    def compute(self) -> tuple[Float[Tensor, "tasks strengths"], Float[Tensor, ""], Int[Tensor, ""]]:
        examples = self.classes.sum()
        return self.right / examples, self.classes.max() / examples, examples

    def found(self) -> tuple[Float[Tensor, "tasks strengths"], Float[Tensor, ""], Int[Tensor, ""]]:
        """As ``compute``, of whose result torchmetrics drops all axes where a single probe is counted."""
        accuracy, majority, examples = self.compute()
        return accuracy.view_as(self.right), majority, examples


class Prediction(NamedTuple):
    """The class scores of a variable's probes at a site on a batch, and the right classes."""

    name: str
    probe_set: ProbeSet
    scores: Float[Tensor, "tasks strengths batch classes"]
    values: Int[Tensor, "tasks batch"]


class ProbeTraining(Training):
    """Trains a probe of each variable at each site on the bases' activations; the base model is frozen.

    loss = sum over sites, variables and strengths of CE(probe(h_site(base)), value of the variable in the base's run)
    + l2 / 2 * sum W^2, the mean cross entropy in nats of the standardised activations; biases are free. With N
    training examples this is scikit-learn's ``LogisticRegression(C=1 / (N * l2))``. The strength that is most accurate
    on the validation examples is the one that is tested.

    A control probe of the same kind is trained beside each, on labels that are random for each type and fixed:
    selectivity = accuracy of the probe on the test examples - accuracy of its control on new contexts of types that it
    was trained on, since the label of an unseen type cannot be known. Hewitt and Liang 2019, "Designing and
    Interpreting Probes with Control Tasks", section 2.

    Probes may read a run ``under`` interventions, as in amnesic probing: what can still be read once a variable is
    erased, or swapped for that of a source? The classes stay those of the base's own run.

    Args:
        network: the base model, frozen.
        sites: sites of one token each.
        classes: the number of values of each variable that is read.
        probe: builds a probe from the numbers of features and classes.
        l2: strengths of the regularisation, trained side by side; ties in accuracy go to the strongest.
        control: whether control probes are trained; the batches must have types.
        control_seed: draws the control labels.
        optimizer: builds the optimizer from groups of parameters; None: for evaluation only.
        warmup: share of the steps in which the learning rate rises.
        hidden_sizes: features at each site; None asks the network.
        under: the interventions: those of a training of the same model, which stay as they are, or
            ``partial(Interchange, sites=..., intervention=...)``, which are fitted in closed form before the probes.

    Raises:
        ValueError: a site has several tokens, a strength is negative, or control probes have no types to label.
    """

    def __init__(
        self,
        *,
        network: Network,
        sites: Placements,
        classes: Mapping[str, int] | None = None,
        optimizer: OptimizerFactory | None = None,
        probe: Callable[..., Probe] = LinearProbe,
        l2: Sequence[float] = (0.1, 0.01, 0.001),
        control: bool = False,
        control_seed: int = 0,
        warmup: float = 0.1,
        hidden_sizes: Sequence[int] | None = None,
        under: Given | str | None = None,
    ) -> None:
        super().__init__()
        self.remember(locals())
        if not l2 or min(l2) < 0:
            raise ValueError(f"l2 is one strength or several, none below 0; got {list(l2)}")
        if not classes:
            raise ValueError(
                "a probe needs the number of values of each variable that it reads: "
                "classes={variable: len(task.values(variable)) for variable in task.variables}"
            )
        self.sites, self.classes = plain_sites(sites, who="a probe"), dict(classes)
        self.l2 = tuple(sorted(l2, reverse=True))
        self.control, self.control_seed = control, control_seed
        self.optimizer, self.warmup = optimizer, warmup
        sizes = list(hidden_sizes or [network.hidden_size(site) for site in self.sites])
        self.arguments.update(sites=self.sites, hidden_sizes=sizes)
        names = [f"{variable} {site}" for site in self.sites for variable in self.classes]
        self._keys = dict(zip(names, module_names(names), strict=True))
        self.probes = FullPrecision(
            {
                self._keys[f"{variable} {site}"]: ProbeSet(probe(size, num_classes=count), self.l2, control=control)
                for site, size in zip(self.sites, sizes, strict=True)
                for variable, count in self.classes.items()
            }
        )
        match_precision(self.probes, network)
        self.under = None if under is None else Under(under, network)
        if self.under is not None:
            self.arguments["under"] = self.under.factory
        self.network = network
        self.metrics: dict[str, dict[str, ProbeAccuracy]] = {}
        self.answers = FiniteAnswers(network)

    def training_step(self, batch: CounterfactualBatch, batch_idx: int) -> Tensor:
        predictions = list(self.predictions(batch))
        losses = torch.stack([_losses(prediction) for prediction in predictions])
        self.log("train/loss", losses[:, 0].mean(), prog_bar=self.shows_loss, batch_size=len(batch))
        penalty = torch.stack([prediction.probe_set.penalty() for prediction in predictions]).sum()
        return losses.sum() * batch.weight + penalty

    def predictions(self, batch: CounterfactualBatch) -> Iterator[Prediction]:
        """The prediction of each variable's probes at each site."""
        for site, activation in self._read(batch).items():
            for number, (variable, count) in enumerate(self.classes.items()):
                name, values = f"{variable} {site}", [batch.variables[variable]]
                probe_set = self._probes(name)
                if self.control:
                    if batch.types is None:
                        raise ValueError("control probes label types, and the task names no control variable for them")
                    seed = self.control_seed * len(self.classes) + number
                    values.append(control_labels(batch.types, count, seed=seed))
                yield Prediction(name, probe_set, probe_set(activation), torch.stack(values))

    @property
    def chosen(self) -> dict[str, Probe]:
        """The chosen probe of each variable at each site, under its name in the results."""
        return {f"{variable} {site}": self._probes(f"{variable} {site}").best for site, variable in self._pairs}

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        """The probes of each variable at each site."""
        return {f"{site} ({variable})": self._probes(f"{variable} {site}") for site, variable in self._pairs}

    @property
    def exported(self) -> nn.Module:
        return self.probes if self.under is None else nn.ModuleDict({"probes": self.probes, "under": self.under})

    @property
    def edited(self) -> tuple[Site, ...]:
        return ()

    @property
    def fits_activations(self) -> bool:
        return True

    def prepare(self, data: SplitDataModule, *, uses: int | None = None) -> str:
        """As in :meth:`Training.prepare`, for data whose test bases are new.

        Raises:
            ValueError: probes would be tested on bases that they are trained on.
        """
        if isinstance(data, CounterfactualDataModule) and not data.task.exhaustive and data.trained_on:
            raise ValueError(
                f"probes read bases, and {data.trained_on} of the {len(data.datasets['test'])} test bases of "
                f"{type(data.task).__name__} are trained on; let sample() draw each split from settings of its own, "
                "divide a table by its bases (data.disjoint=[base]), or set exhaustive = True on a task that has no "
                "more"
            )
        how = super().prepare(data, uses=uses)
        return how if self.under is None else f"under {self.under}; what is read is not cached"

    def check(self, data: SplitDataModule) -> None:
        super().check(data)
        if self.under is not None:
            self.under.require(data)

    def on_train_start(self) -> None:
        if self.under is not None:
            self.under.require_known()

    def learn_statistics(self, batches: Iterable[CounterfactualBatch]) -> None:
        """Fit the probes' mean and deviation to the training activations, and before them what they read under."""
        found: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        device = device_of(self.network)
        if self.under is not None:
            batches = list(batches)
            self.under.learn(batches)
        with torch.no_grad():
            for batch in batches:
                for site, activation in self._read(batch.to(device)).items():
                    found[site].append(activation)
        activations = {site: require_finite(torch.cat(rows), site) for site, rows in found.items()}
        for site, variable in self._pairs:
            for probe, _ in self._probes(f"{variable} {site}").each():
                probe.fit(activations[site])

    def predict_step(self, batch: CounterfactualBatch, batch_idx: int) -> dict[str, Float[Tensor, "batch classes"]]:
        """The class scores of the chosen probe of each variable at each site."""
        return {
            prediction.name: prediction.scores[0, prediction.probe_set.choice] for prediction in self.predictions(batch)
        }

    def begin(self, split: str) -> None:
        self.metrics.clear()
        self.answers.counts.clear()

    def score(self, split: str, batch: CounterfactualBatch) -> None:
        metrics = self.metrics.setdefault(split, {})
        for name, _, scores, values in self.predictions(batch):
            if name not in metrics:
                tasks, strengths, _, count = scores.shape
                metrics[name] = ProbeAccuracy(tasks=tasks, strengths=strengths, num_classes=count).to(scores.device)
            metrics[name].update(scores, values)
            self.answers.update(f"{split}, {name}", scores.movedim(2, 0))

    def figures(self, split: str) -> dict[str, Tensor]:
        """The figures of a split; the validation of a fit also chooses each probe's strength."""
        self.answers.require()
        metrics = self.metrics.pop(split)
        return self._validated(metrics) if split == "validation" else self._tested(metrics)

    def _validated(self, metrics: Mapping[str, ProbeAccuracy]) -> dict[str, Tensor]:
        """The mean accuracy of the best strengths. In a fit, or where none has been chosen yet, they are chosen."""
        fits, trying = self.trainer.state.fn == TrainerFn.FITTING, self.trainer.sanity_checking
        best = []
        for name, metric in metrics.items():
            accuracy, *_ = metric.found()
            probe_set = self._probes(name)
            if not trying and (fits or probe_set.chosen < 0):
                probe_set.choose(accuracy[0])
            best.append(accuracy[0].max())
        return {"validation/probe_accuracy": torch.stack(best).mean()}

    def _tested(self, metrics: Mapping[str, ProbeAccuracy]) -> dict[str, Tensor]:
        """The figures of each chosen probe, of the most frequent class and of its control, and their means."""
        controls = self._control_metrics() if self.control else {}
        figures: dict[str, dict[str, Tensor]] = {}
        for name, metric in metrics.items():
            (accuracy, majority, examples), choice = metric.found(), self._probes(name).choice
            found = {"probe_accuracy": accuracy[0, choice], "majority_accuracy": majority, "examples": examples}
            if self.control:
                (_, control), _, control_examples = controls[name].found()
                found |= {
                    "control_accuracy": control[choice],
                    "control_examples": control_examples,
                    "selectivity": accuracy[0, choice] - control[choice],
                }
            for figure, value in found.items():
                figures.setdefault(figure, {})[name] = value.float()
        reported = {f"test/l2/{name}": torch.tensor(self.l2[self._probes(name).choice]) for name in metrics}
        for figure, values in figures.items():
            reported |= {f"test/{figure}/{name}": value for name, value in values.items()}
            reported[f"test/{figure}"] = torch.stack(list(values.values())).mean()
        return reported

    @torch.no_grad()
    def accuracies(self, batches: Iterable[CounterfactualBatch]) -> dict[str, float]:
        """The accuracy of each chosen probe on other batches than the test's."""
        device = device_of(self.network)
        for batch in batches:
            self.score("others", batch.to(device))
        found = {name: metric.found()[0][0] for name, metric in self.metrics.pop("others").items()}
        return {name: float(accuracy[self._probes(name).choice]) for name, accuracy in found.items()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.probes.parameters())}]

    def _read(self, batch: CounterfactualBatch) -> dict[Site, Tensor]:
        if self.under is None:
            activations = self.network.read(batch.base, self.sites)
        else:
            activations = self.under.read(batch, self.sites)
        for site, activation in activations.items():
            if activation.ndim == 3 and activation.shape[1] != 1:
                raise ValueError(
                    f"site '{site}' has {activation.shape[1]} tokens; a probe reads one, such as '{site.one_token}'"
                )
        return {site: activation.flatten(1) for site, activation in activations.items()}

    def _control_metrics(self) -> dict[str, ProbeAccuracy]:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, CounterfactualDataModule):
            raise ValueError(
                "control probes are tested on new contexts of the training types: give trainer.test the data as "
                "datamodule=CounterfactualDataModule(...)"
            )
        for batch in data.control_dataloader():
            self.score("control", batch.to(self.device))
        return self.metrics.pop("control")

    @property
    def _pairs(self) -> list[tuple[Site, str]]:
        return [(site, variable) for site in self.sites for variable in self.classes]

    def _probes(self, name: str) -> ProbeSet:
        return cast(ProbeSet, self.probes[self._keys[name]])


def _losses(prediction: Prediction) -> Float[Tensor, "tasks strengths"]:
    """The mean cross entropy of each probe."""
    scores, values = prediction.scores, prediction.values[:, None].expand(prediction.scores.shape[:-1])
    return cross_entropy(scores.flatten(0, 2), values.flatten(), reduction="none").view_as(values).mean(-1)
