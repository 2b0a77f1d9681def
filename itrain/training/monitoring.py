"""Monitoring: fits detectors of concepts on labelled texts, with their thresholds and controls.

Tensor letters: B batch, P tokens, D features, C concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from itrain.bounds import require_at_least, require_some
from itrain.data import LabelledBatch, SplitDataModule
from itrain.detectors import Detector, DirectionDetector, Pooling, ProbeDetector, RandomDirection, pooled
from itrain.devices import device_of
from itrain.inputs import ModelInputs
from itrain.metrics import threshold_at, threshold_interval
from itrain.networks.base import Network
from itrain.placements import Placements, plain_sites
from itrain.precision import FullPrecision, match_precision
from itrain.sites import Site, module_names
from itrain.training.attaching import Attaching
from itrain.training.base import Training
from itrain.training.detection import Detected, countable
from itrain.training.finite import FiniteAnswers, require_finite
from itrain.training.monitor import Monitor, Reading, Watching
from itrain.training.optimization import OptimizerFactory

RANDOM = "random_direction"
"""What the names of the controls among the detectors begin with."""


class Place(NamedTuple):
    """Where some detectors read: one site, or several whose features are joined."""

    name: str
    sites: tuple[Site, ...]


class Monitoring(Training):
    """Fits detectors of concepts on the activations of labelled texts; the base model is frozen.

    A detector scores each token of a text, and pools these scores into the text's. Padding is never a token, and tokens
    in ``excluded`` are none that count. Closed-form directions are those of each training text's mean activation, or of
    its last token where that is pooled; probes learn by the binary cross entropy of the pooled scores,
    loss = sum over detectors of BCE(score, label) + l2 / 2 * sum W^2, in nats.

    The threshold of each detector and concept lets through ``false_positive_rate`` of the validation texts without the
    concept. It is used as it is on the test texts and on those of each shift. Control: random directions, of which
    means and the spread of AUROC are shown, since a single one is far from 0.5 where a concept moves activations far.

    Args:
        network: the base model, frozen.
        sites: where tokens are read; all tokens of a text where a site names no position.
        concepts: the names of the labels.
        detectors: by name, what builds each detector; None: the difference in means and a linear probe.
        pooling: how a text's score comes from those of its tokens, for detectors that have none of their own.
        join_sites: whether each detector reads the features of all sites, one after the other; else each has its own.
        excluded: the tokens that are not counted, such as a tokenizer's special ones.
        prefix: how many tokens at the start of each text are not counted, such as those of a chat template.
        false_positive_rate: at which the thresholds are chosen.
        positive_rate: the share of texts with a concept in F1 beside the balanced one.
        l2: the strength of the regularisation of probes.
        random_directions: how many directions the control has.
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
        false_positive_rate: float = 0.01,
        positive_rate: float = 0.01,
        l2: float = 0.01,
        random_directions: int = 8,
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
        self.false_positive_rate, self.positive_rate, self.l2 = false_positive_rate, positive_rate, l2
        self.optimizer, self.warmup = optimizer, warmup
        sizes = list(hidden_sizes or [network.hidden_size(site) for site in self.sites])
        factories = {
            **(_usual(pooling) if detectors is None else detectors),
            **{f"{RANDOM}_{n}": partial(RandomDirection, seed=seed + n) for n in range(random_directions)},
        }
        self.names = list(factories)
        self.places = _places(self.sites, joined=join_sites)
        self.arguments.update(
            sites=self.sites, hidden_sizes=sizes, concepts=self.concepts, excluded=self.excluded, detectors=detectors
        )
        features = dict(zip(self.sites, sizes, strict=True))
        built = {
            f"{name} {place.name}": self._built(name, factory, sum(features[site] for site in place.sites))
            for place in self.places
            for name, factory in factories.items()
        }
        self._keys = dict(zip(built, module_names(list(built)), strict=True))
        self.detectors = FullPrecision({self._keys[name]: each for name, each in built.items()})
        match_precision(self.detectors, network)
        self.register_buffer("uncounted", torch.tensor(self.excluded, dtype=torch.long), persistent=False)
        self.network = network
        self.detected = Detected(
            detectors=[f"{{}} {RANDOM if _is_control(name) else name} {place.name}" for name, place, _ in self.each()],
            concepts=self.concepts,
            controls=[number for number, (name, _, _) in enumerate(self.each()) if _is_control(name)],
            positive_rate=positive_rate,
        )
        self.answers = FiniteAnswers(network)

    def detector(self, name: str, place: Place) -> Detector:
        """The detector of a name at a place."""
        found = self.detectors[self._keys[f"{name} {place.name}"]]
        assert isinstance(found, Detector), "only detectors are held"
        return found

    def each(self) -> Iterator[tuple[str, Place, Detector]]:
        """Every detector, with its name and its place."""
        for place in self.places:
            for name in self.names:
                yield name, place, self.detector(name, place)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        read, penalties, losses = self.read(batch.inputs), [], []
        known = batch.labels >= 0
        for place in self.places:
            tokens, counted = read[place.name]
            for detector in self._learning(place):
                loss = binary_cross_entropy_with_logits(
                    detector(tokens, counted), batch.labels.clamp(min=0).to(tokens.dtype), reduction="none"
                )
                losses.append((loss * known).sum() / known.sum().clamp(min=1))
                penalties.append(self.l2 / 2 * detector.penalty())
        self.log("train/loss", torch.stack(losses).mean(), prog_bar=self.shows_loss, batch_size=len(batch))
        return torch.stack(losses).sum() * batch.weight + torch.stack(penalties).sum()

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
            if not _is_control(name)
        ]
        return Monitor(model, watching, excluded=self.excluded, prefix=self.prefix)

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        return {f"{place.name} ({name})": detector for name, place, detector in self.each()}

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
            ValueError: naming the text, or the sites that read other tokens.
        """
        super().check(data)
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
        labels = []
        for batch in (each.to(device) for each in batches):
            labels.append(batch.labels)
            for name, (tokens, counted) in self.read(batch.inputs).items():
                found[name].append(pooled(tokens, counted, how))
        every = torch.cat(labels)
        for _, place, detector in self.each():
            detector.fit(require_finite(torch.cat(found[place.name]), place.sites[0]), every)

    def scores(self, inputs: ModelInputs) -> Float[Tensor, "batch detectors concepts"]:
        """The scores of texts by all detectors, in the order of :meth:`each`."""
        read = self.read(inputs)
        # Detectors are small and compute in fp32, whatever the model is cast to.
        with torch.autocast(inputs.device.type, enabled=False):
            return torch.stack([detector(*read[place.name]) for _, place, detector in self.each()], 1)

    @torch.no_grad()
    def readings(self, inputs: ModelInputs) -> list[Reading]:
        """What the detectors, without the controls, say of each text and each of its tokens."""
        read, scored = self.read(inputs), self.scores(inputs)
        watching = [(number, each) for number, each in enumerate(self.each()) if not _is_control(each[0])]
        of_tokens = {number: detector.token_scores(read[place.name][0]) for number, (_, place, detector) in watching}
        at = self.sites[0] if self.sites[0].position else self.sites[0].at("all")
        index, valid = inputs.indices(at, inputs.length)
        ids, found = inputs.arguments["input_ids"].gather(1, index), []
        for row in range(inputs.batch_size):
            own = torch.ones_like(index[row], dtype=torch.bool) if valid is None else valid[row]
            names = {
                f"{concept} {name} {place.name}": (number, column)
                for number, (name, place, _) in watching
                for column, concept in enumerate(self.concepts)
            }
            found.append(
                Reading(
                    tokens=ids[row][own].cpu(),
                    counted=self.counted(inputs, at)[row][own].cpu(),
                    token_scores={name: of_tokens[n][row][own][:, c].cpu() for name, (n, c) in names.items()},
                    scores={name: float(scored[row, n, c]) for name, (n, c) in names.items()},
                    thresholds={name: self._threshold(n, c) for name, (n, c) in names.items()},
                )
            )
        return found

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
        """Choose the thresholds on the texts without each concept."""
        device, scores, labels = device_of(self.network), [], []
        for batch in (each.to(device) for each in batches):
            scores.append(self.scores(batch.inputs))
            labels.append(batch.labels)
        found, known = torch.cat(scores), torch.cat(labels)
        for number, (_, _, detector) in enumerate(self.each()):
            for concept in range(len(self.concepts)):
                negatives = found[known[:, concept] == 0, number, concept]
                detector.thresholds[concept] = threshold_at(negatives, self.false_positive_rate)
                ends = torch.tensor(threshold_interval(negatives, self.false_positive_rate))
                detector.bounded[concept] = ends.isfinite()
                detector.bounds[concept] = ends.nan_to_num(posinf=0.0, neginf=0.0)
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
        return self.detected.tested([detector for _, _, detector in self.each()])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.detectors.parameters())}]

    def _calibrate_as_tested(self) -> None:
        """Choose the thresholds on the validation texts, with scores in the precision of a test."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SplitDataModule):
            with self.trainer.precision_plugin.test_step_context():
                self.calibrate(data.whole("validation"))

    def _threshold(self, number: int, concept: int) -> float:
        *_, detector = list(self.each())[number]
        return float(detector.thresholds[concept])

    def _learning(self, place: Place) -> list[Detector]:
        return [detector for name in self.names if (detector := self.detector(name, place)).learns]

    def _built(self, name: str, factory: Callable[..., Detector], features: int) -> Detector:
        if not name.isidentifier():
            raise ValueError(f"detectors: '{name}' is no name; use letters, digits and _")
        own = getattr(factory, "keywords", {})
        pooling = {} if "pooling" in own else {"pooling": self._pooling_of(name)}
        built = factory(features, concepts=len(self.concepts), **pooling)
        if not isinstance(built, Detector):
            raise ValueError(f"detectors.{name}: it makes a {type(built).__name__}; derive it from itrain.Detector")
        return built

    def _pooling_of(self, name: str) -> Pooling:
        """The training's pooling; of the control the mean where that is attention, which it has no query for."""
        return "mean" if _is_control(name) and self.pooling == "attention" else self.pooling


def _is_control(name: str) -> bool:
    return name.startswith(RANDOM)


def _usual(pooling: Pooling) -> dict[str, Callable[..., Detector]]:
    """The detectors where none are named; the difference in means has no query, and takes the mean."""
    closed = partial(DirectionDetector, pooling="mean") if pooling == "attention" else DirectionDetector
    return {"mean_difference": closed, "probe": ProbeDetector}


def _places(sites: Sequence[Site], *, joined: bool) -> list[Place]:
    """Each site by itself, or all of them joined, which then read the same tokens.

    Raises:
        ValueError: they read other tokens.
    """
    if not joined:
        return [Place(str(site), (site,)) for site in sites]
    if len({site.position for site in sites}) > 1:
        raise ValueError("join_sites: sites whose features are joined read the same tokens; give them one position")
    return [Place("+".join(map(str, sites)), tuple(sites))]
