"""Monitoring: fits detectors of concepts on labelled texts, with their thresholds and controls.

Tensor letters: B batch, P tokens, D features, C concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from itrain.bounds import require_at_least, require_some
from itrain.data import LabelledBatch, LabelledDataModule, SplitDataModule
from itrain.detectors import Detector, Pooling, pooled
from itrain.devices import device_of
from itrain.inputs import ModelInputs
from itrain.networks.base import Network
from itrain.placements import Placements, plain_sites
from itrain.precision import match_precision
from itrain.sites import Site, module_names
from itrain.training.attaching import Attaching
from itrain.training.base import Training
from itrain.training.detecting import (
    CONTROL,
    RANDOM,
    Place,
    arbitrary_of,
    build_detectors,
    factories_of,
    held,
    is_random,
    learned_labels,
    loss_of,
    places_of,
    require_labels,
)
from itrain.training.detection import ALL, Detected, countable
from itrain.training.finite import FiniteAnswers, require_finite
from itrain.training.monitor import Monitor, Reading, Watching
from itrain.training.optimization import OptimizerFactory
from itrain.training.readings import readings_of
from itrain.training.thresholds import ThresholdRule, choose_threshold, require_rule


class Monitoring(Training):
    """Fits detectors of concepts on the activations of labelled texts; the base model is frozen.

    A detector scores each token of a text, and pools these scores into the text's. Padding is never a token, and tokens
    in ``excluded`` are none that count. Closed-form directions are those of each training text's mean activation, or of
    its last token where that is pooled; probes learn by the binary cross entropy of the pooled scores,
    loss = sum over detectors of BCE(score, label) + l2 / 2 * sum W^2, in nats.

    The threshold of each detector and concept lets through ``false_positive_rate`` of the validation texts without the
    concept, or has Youden's highest J = TPR - FPR on the validation texts. It is used as it is on the test texts and on
    those of each shift. Control: random directions, of which means and the spread of AUROC are shown, since a single
    one is far from 0.5 where a concept moves activations far.

    Another control is a detector of the same kind on the labels of a control task, which are arbitrary for each type of
    texts (see :mod:`itrain.data.arbitrary`). Selectivity = AUROC - AUROC of the control on new texts of the types that
    it was trained on. Hewitt and Liang 2019, "Designing and Interpreting Probes with Control Tasks", section 2.

    Args:
        network: the base model, frozen.
        sites: where tokens are read; all tokens of a text where a site names no position.
        concepts: the names of the labels.
        detectors: by name, what builds each detector; None: the difference in means and a linear probe.
        pooling: how a text's score comes from those of its tokens, for detectors that have none of their own.
        join_sites: whether each detector reads the features of all sites, one after the other; else each has its own.
        excluded: the tokens that are not counted, such as a tokenizer's special ones.
        prefix: how many tokens at the start of each text are not counted, such as those of a chat template.
        threshold: how thresholds are chosen: at the ``false_positive_rate``, or by ``youden``.
        false_positive_rate: at which the thresholds are chosen, by that rule.
        positive_rate: the share of texts with a concept in F1 beside the balanced one.
        l2: the strength of the regularisation of probes.
        random_directions: how many directions the control has.
        control: whether detectors of the control task are trained; the texts must have types.
        seed: draws them.
        optimizer: builds the optimizer from groups of parameters; None: for evaluation only.
        warmup: share of the steps in which the learning rate rises.
        hidden_sizes: features at each site; None asks the network.

    Raises:
        ValueError: no concept or detector is named, a number is out of its bounds, or joined sites name other tokens.
    """

    uncounted: Int[Tensor, " excluded"]

    def __init__(
        self,
        *,
        network: Network,
        sites: Placements,
        concepts: Sequence[str] = (),
        detectors: Mapping[str, Callable[..., Detector]] | None = None,
        pooling: Pooling = "mean",
        join_sites: bool = False,
        excluded: Sequence[int] | None = None,
        prefix: int = 0,
        threshold: ThresholdRule = "false_positive_rate",
        false_positive_rate: float = 0.01,
        positive_rate: float = 0.01,
        l2: float = 0.01,
        random_directions: int = 8,
        control: bool = False,
        seed: int = 0,
        optimizer: OptimizerFactory | None = None,
        warmup: float = 0.1,
        hidden_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.remember(locals())
        require_some(concepts=concepts, detectors=detectors)
        require_at_least(0, prefix=prefix, l2=l2, random_directions=random_directions)
        for name, rate in {"false_positive_rate": false_positive_rate, "positive_rate": positive_rate}.items():
            if not 0 < rate < 1:
                raise ValueError(f"{name}={rate}: give a share between 0 and 1")
        self.sites, self.concepts = plain_sites(sites, who="a detector"), countable(concepts, random_directions)
        self.pooling: Pooling = pooling
        self.excluded, self.prefix = sorted(excluded or ()), prefix
        self.threshold: ThresholdRule = require_rule(threshold)
        self.false_positive_rate, self.positive_rate, self.l2 = false_positive_rate, positive_rate, l2
        self.known_share: float | None = None
        """The share of labels of the training texts that are known; None: that of each batch."""
        self.optimizer, self.warmup = optimizer, warmup
        sizes = list(hidden_sizes or [network.hidden_size(site) for site in self.sites])
        factories = factories_of(detectors, pooling=pooling, directions=random_directions, seed=seed)
        self.names, self.control = list(factories), control
        self.places = places_of(self.sites, joined=join_sites)
        self.arguments.update(
            sites=self.sites, hidden_sizes=sizes, concepts=self.concepts, excluded=self.excluded, detectors=detectors
        )
        features = dict(zip(self.sites, sizes, strict=True))
        joined = {place: sum(features[site] for site in place.sites) for place in self.places}
        counts: dict[str, Any] = {"concepts": len(self.concepts), "pooling": pooling, "control": control}
        built = dict(build_detectors(factories, joined, **counts))
        self._keys = dict(zip(built, module_names(list(built)), strict=True))
        self.detectors = held({self._keys[name]: each for name, each in built.items()}, control=control)
        match_precision(self.detectors, network)
        self.register_buffer("uncounted", torch.tensor(self.excluded, dtype=torch.long), persistent=False)
        self.network = network
        self.detected = Detected(
            detectors=[f"{{}} {RANDOM if is_random(name) else name} {place.name}" for name, place, _ in self.each()],
            concepts=self.concepts,
            controls=[number for number, (name, _, _) in enumerate(self.each()) if is_random(name)],
            positive_rate=positive_rate,
        )
        self.answers = FiniteAnswers(network)

    def detector(self, name: str, place: Place, *, control: bool = False) -> Detector:
        """The detector of a name at a place, or its like that is fitted to the control task."""
        found = self.detectors[self._keys[f"{CONTROL} {name} {place.name}" if control else f"{name} {place.name}"]]
        assert isinstance(found, Detector), "only detectors are held"
        return found

    def each(self) -> Iterator[tuple[str, Place, Detector]]:
        """Every detector, with its name and its place."""
        for place in self.places:
            for name in self.names:
                yield name, place, self.detector(name, place)

    def controls(self) -> Iterator[tuple[str, Place, Detector]]:
        """Every detector of the control task, with the name of the one whose control it is, and its place."""
        for place in self.places if self.control else ():
            for name in self.names:
                if not is_random(name):
                    yield name, place, self.detector(name, place, control=True)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        read, learning = self.read(batch.inputs), [each for *_, each in (*self.each(), *self.controls()) if each.learns]
        losses = [
            loss_of(each(*read[place.name]), batch.labels, self.known_share)
            for _, place, each in self.each()
            if each.learns
        ]
        self.log("train/loss", torch.stack(losses).mean(), prog_bar=self.shows_loss, batch_size=len(batch))
        arbitrary = [
            loss_of(each(*read[place.name]), arbitrary_of(batch)) for _, place, each in self.controls() if each.learns
        ]
        penalties = [self.l2 / 2 * each.penalty() for each in learning]
        return torch.stack(losses + arbitrary).sum() * batch.weight + torch.stack(penalties).sum()

    def read(
        self, inputs: ModelInputs
    ) -> dict[str, tuple[Float[Tensor, "batch tokens hidden"], Bool[Tensor, "batch tokens"]]]:
        """The activations of each place's tokens, and which of them count."""
        reads = {site: site if site.position else site.at("all") for site in self.sites}
        found = self.network.read(inputs, reads.values())
        return {
            place.name: (
                torch.cat([found[reads[site]] for site in place.sites], -1),
                self.counted(inputs, reads[place.sites[0]]),
            )
            for place in self.places
        }

    def counted(self, inputs: ModelInputs, site: Site) -> Bool[Tensor, "batch tokens"]:
        """Which of the tokens at a site count: no padding, none of the first ones, and none that is excluded."""
        index, valid = inputs.indices(site, inputs.length)
        kept = ~torch.isin(inputs.arguments["input_ids"].gather(1, index), self.uncounted.to(index.device))
        if self.prefix:
            start = inputs.extent[0].to(index.device)
            kept &= index >= (start + self.prefix)[:, None]
        return kept if valid is None else kept & valid

    def attach_to(self, model: nn.Module, sources: Mapping[str, ModelInputs], how: Attaching) -> Monitor:
        """Have the detectors read the model whenever it is called: ``with training.attach(model) as monitor``.

        Raises:
            ValueError: it is attached like an edit, or no thresholds have been chosen.
        """
        if sources or how.prompts is not None or how.acts is not None or how.strength != 1:
            raise ValueError("a monitor edits nothing; leave source, acts, strength and prompts out")
        if not self.calibrated:
            raise ValueError("no thresholds have been chosen yet: fit or test the detectors first, or calibrate them")
        self.detectors.to(device_of(model))
        watching = [
            Watching(detector, place.sites, [f"{concept} {name} {place.name}" for concept in self.concepts])
            for name, place, detector in self.each()
            if not is_random(name)
        ]
        return Monitor(model, watching, excluded=self.excluded, prefix=self.prefix)

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        arbitrary: dict[str, nn.Module] = {
            f"{place.name} ({name}, control task)": each for name, place, each in self.controls()
        }
        return {f"{place.name} ({name})": detector for name, place, detector in self.each()} | arbitrary

    @property
    def exported(self) -> nn.Module:
        return self.detectors

    @property
    def edited(self) -> tuple[Site, ...]:
        return ()

    @property
    def fits_activations(self) -> bool:
        return True

    def check(self, data: SplitDataModule) -> None:
        """Refuse texts of which no token counts, before the model runs.

        Raises:
            ValueError: naming the text, the sites that read other tokens, or why there is no control task.
        """
        super().check(data)
        if isinstance(data, LabelledDataModule):
            # Unlabelled texts count for nothing, however batches are divided.
            self.known_share = float((data.datasets["train"].examples.labels >= 0).double().mean())
            if self.control and not data.has_control:
                raise ValueError(f"control: {data.control_task}; leave it out")
            if self.control:
                require_labels(self.detectors, data, anew=self.lacks_statistics_of(data))
        for inputs in data.edited():
            for site in self.sites:
                counted = self.counted(inputs, site if site.position else site.at("all"))
                if len(empty := (~counted.any(1)).nonzero()):
                    raise ValueError(
                        f"site '{site}': no token of {inputs.name(int(empty[0]))} counts; leave the text out, or set "
                        f"training.prefix (now {self.prefix}) or training.excluded (now {self.excluded}) lower"
                    )

    @torch.no_grad()
    def learn_statistics(self, batches: Iterable[LabelledBatch]) -> None:
        """Fit directions, and the mean and deviation of probes, to an activation of each training text."""
        device = device_of(self.network)
        how: Pooling = "last" if self.pooling == "last" else "mean"
        found: dict[str, list[Tensor]] = {place.name: [] for place in self.places}
        labels, arbitrary = [], []
        for batch in (each.to(device) for each in batches):
            labels.append(batch.labels)
            arbitrary += [arbitrary_of(batch)] if self.control else []
            for name, (tokens, counted) in self.read(batch.inputs).items():
                found[name].append(pooled(tokens, counted, how))
        activations = {
            place.name: require_finite(torch.cat(found[place.name]), place.sites[0]) for place in self.places
        }
        for _, place, detector in self.each():
            detector.fit(activations[place.name], torch.cat(labels))
        for _, place, detector in self.controls():
            detector.fit(activations[place.name], torch.cat(arbitrary))

    def scores(self, inputs: ModelInputs) -> Float[Tensor, "batch detectors concepts"]:
        """The scores of texts by all detectors, in the order of :meth:`each`."""
        return self._scored(inputs, self.each())

    def readings(self, inputs: ModelInputs) -> list[Reading]:
        """What the detectors, without the controls, say of each text and each of its tokens."""
        return readings_of(self, inputs)

    def predict_step(self, batch: LabelledBatch, batch_idx: int) -> dict[str, Float[Tensor, "batch concepts"]]:
        """The scores of each text by each detector."""
        names = [f"{name} {place.name}" for name, place, _ in self.each()]
        return dict(zip(names, self.scores(batch.inputs).unbind(1), strict=True))

    def begin(self, split: str) -> None:
        self.detected.clear()
        self.answers.counts.clear()
        if split == "test" and not self.calibrated:
            self._calibrate_as_tested()

    def on_train_start(self) -> None:
        for _, _, detector in self.each():
            detector.calibrated.fill_(False)

    def on_train_end(self) -> None:
        self._calibrate_as_tested()  # The last validation was of weights before the last steps.

    @property
    def calibrated(self) -> bool:
        """Whether all thresholds have been chosen."""
        return all(bool(detector.calibrated) for _, _, detector in self.each())

    @torch.no_grad()
    def calibrate(self, batches: Iterable[LabelledBatch]) -> None:
        """Choose the thresholds by the rule, on these texts."""
        device, scores, labels = device_of(self.network), [], []
        for batch in (each.to(device) for each in batches):
            scores.append(self.scores(batch.inputs))
            labels.append(batch.labels)
        found, known = torch.cat(scores), torch.cat(labels)
        for number, (_, _, detector) in enumerate(self.each()):
            for concept in range(len(self.concepts)):
                own = found[:, number, concept], known[:, concept]
                choose_threshold(detector, concept, *own, rule=self.threshold, rate=self.false_positive_rate)
            detector.calibrated.fill_(True)

    def score(self, split: str, batch: LabelledBatch) -> None:
        scores = self.scores(batch.inputs)
        self.detected.update(scores, batch)
        self.answers.update(split, scores)

    def figures(self, split: str) -> dict[str, Tensor]:
        """The figures of a split."""
        self.answers.require()
        if split == "validation":
            return self.detected.validated()
        found = self.detected.tested([detector for _, _, detector in self.each()])
        return found | (self._control_figures(found) if self.control else {})

    @torch.no_grad()
    def areas(self, batches: Iterable[LabelledBatch]) -> dict[tuple[str, str], float]:
        """The AUROC of each detector at each place on other texts than the test's, the mean over concepts."""
        self.detected.clear()
        for batch in (each.to(device_of(self.network)) for each in batches):
            self.detected.update(self.scores(batch.inputs), batch)
        names = ((name, place.name) for name, place, _ in self.each())
        return dict(zip(names, map(float, self.detected.areas()), strict=True))

    def told(self, name: str, place: str) -> str:
        """What the figures of a detector at a place end in; of several concepts, their means."""
        return f"{self.concepts[0] if len(self.concepts) == 1 else ALL} {name} {place}"

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.detectors.parameters())}]

    def _calibrate_as_tested(self) -> None:
        """Choose the thresholds on the validation texts, with scores in the precision of a test."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SplitDataModule):
            with self.trainer.precision_plugin.test_step_context():
                self.calibrate(data.whole("validation"))

    @torch.no_grad()
    def _control_figures(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The AUROC of the control task's detectors on new texts of the training types, and the selectivity of each."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, LabelledDataModule):
            raise ValueError(
                "the control task is tested on new texts of the training types: give trainer.test the data as "
                "datamodule=LabelledDataModule(...)"
            )
        if not learned_labels(self.detectors, data):
            return {}
        controls = list(self.controls())
        names = [f"{{}} {name} {place.name}" for name, place, _ in controls]
        scored = Detected(
            detectors=names, concepts=self.concepts, controls=(), positive_rate=self.detected.positive_rate
        )
        with self.trainer.precision_plugin.test_step_context():
            for batch in (each.to(self.device) for each in data.control_dataloader()):
                scored.update(self._scored(batch.inputs, controls), batch)
        return scored.selectivity(found)

    def _scored(
        self, inputs: ModelInputs, detectors: Iterable[tuple[str, Place, Detector]]
    ) -> Float[Tensor, "batch detectors concepts"]:
        read = self.read(inputs)
        # Detectors are small and compute in fp32, whatever the model is cast to.
        with torch.autocast(inputs.device.type, enabled=False):
            return torch.stack([detector(*read[place.name]) for _, place, detector in detectors], 1)
