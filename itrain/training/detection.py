"""What detectors tell of labelled texts: their scores, kept until the end of a split, and the figures of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isnan, nan
from statistics import fmean
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.data import LabelledBatch
from itrain.detectors import Detector
from itrain.metrics import Scored, auroc, rates_above
from itrain.metrics.detection import Column
from itrain.trust import shown

SHIFT = "shift"
"""What stands before the name of a shifted test set in the names of its figures."""
LISTED = 20
"""Up to how many concepts each has figures of its own, beside those of all."""

MOST_CONTROLS = 1000
"""How many random directions a run can have."""

MEANS = ("auroc", "true_positive_rate", "false_positive_rate", "f1", "f1_rare")
ALL = "all concepts"
"""The figures that are averaged over several concepts, and the name of these in theirs."""

CONTROLLED = ("control_auroc", "control_positives", "control_negatives")
"""The figures of the control task: AUROC, and its texts with and without the label."""

Told: TypeAlias = tuple[int, int]
"""A detector and a concept, by number."""


def countable(concepts: Sequence[str], random_directions: int) -> list[str]:
    """The concepts, where they can name figures and there are no more controls than tell a spread.

    Raises:
        ValueError: naming them.
    """
    if wrong := next((each for each in concepts if not isinstance(each, str) or not each.isprintable()), None):
        raise ValueError(f"concepts: {shown(wrong)} is no name; write a text without control characters")
    if random_directions > MOST_CONTROLS:
        raise ValueError(f"random_directions={random_directions}: up to {MOST_CONTROLS} can be asked for")
    return list(concepts)


class Detected:
    """The scores of texts by all detectors, for each test set.

    Args:
        detectors: their names, each with ``{}`` in place of a concept's.
        concepts: the names of the concepts.
        controls: which of the detectors are controls, by number.
        positive_rate: the share of texts with a concept in ``f1_rare``.
    """

    def __init__(
        self, *, detectors: Sequence[str], concepts: Sequence[str], controls: Sequence[int], positive_rate: float
    ) -> None:
        self.detectors, self.concepts, self.controls = list(detectors), list(concepts), list(controls)
        self.positive_rate = positive_rate
        self.sets: dict[str, Scored] = {}

    def clear(self) -> None:
        self.sets.clear()

    def update(self, scores: Float[Tensor, "batch detectors concepts"], batch: LabelledBatch) -> None:
        """Keep the scores of a batch."""
        labels = batch.labels[:, None].expand(scores.shape)
        for number, name in enumerate(batch.sets):
            if name not in self.sets:
                self.sets[name] = Scored(columns=len(self.detectors) * len(self.concepts)).to(scores.device)
            # Also where a batch has none of a set: all processes have the same sets.
            rows = (batch.of == number).to(scores.device)
            self.sets[name].update(scores[rows], labels[rows])

    def validated(self) -> dict[str, Tensor]:
        """The mean AUROC of a validation, over detectors that are no controls and over concepts."""
        found = [area for number, area in enumerate(self.areas()) if number not in self.controls]
        return {"validation/auroc": torch.stack(found).nanmean().float()}

    def areas(self) -> list[Float[Tensor, ""]]:
        """The AUROC of each detector on a split of one set, the mean over concepts."""
        (scored,) = self.sets.values()
        of: dict[int, list[Tensor]] = {}
        for (number, _), column in self._told(scored):
            of.setdefault(number, []).append(auroc(*column))
        return [torch.stack(each).nanmean() for each in of.values()]

    def tested(self, detectors: Sequence[Detector]) -> dict[str, Tensor]:
        """The figures of each detector and concept on each test set, and of several concepts their means."""
        figures: dict[str, float] = {}
        limits = [detector.thresholds.tolist() for detector in detectors]
        for place, scored in self.sets.items():
            before = f"test/{SHIFT}/{place}/" if figures else "test/"
            own: dict[str, list[dict[str, float]]] = {}
            every: dict[str, dict[int, list[dict[str, float]]]] = {}
            for (detector, concept), column in self._told(scored):
                found = self._figures(*column, limits[detector][concept])
                if before == "test/":
                    found |= {"threshold": limits[detector][concept], **_bounds(detectors[detector], concept)}
                name = self.detectors[detector]
                own.setdefault(name.format(self.concepts[concept]), []).append(found)
                concepts = every.setdefault(name.format(ALL), {}).setdefault(detector, [])
                concepts.append({figure: found[figure] for figure in MEANS})
            # Over concepts first, so that the spread is over detectors alone.
            means = {name: [_mean(each, MEANS) for each in found.values()] for name, found in every.items()}
            shown = (own if len(self.concepts) <= LISTED else {}) | (means if len(self.concepts) > 1 else {})
            figures |= {
                f"{before}{figure}/{name}": value
                for name, several in shown.items()
                for figure, value in _means(several).items()
            }
        return {name: torch.tensor(float(value)) for name, value in figures.items()}

    def selectivity(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of detectors on a control task: their AUROC, its texts, and how far it lies below the one in ``found``."""
        (scored,) = self.sets.values()
        own: dict[str, dict[str, float]] = {}
        for (detector, concept), (scores, labels) in self._told(scored):
            name = self.detectors[detector]
            counts = [int((labels == value).sum()) for value in (1, 0)]
            area = float(auroc(scores, labels))
            own[name.format(self.concepts[concept])] = dict(zip(CONTROLLED, (area, *counts), strict=True))
            if len(self.concepts) > 1:
                own.setdefault(name.format(ALL), {})[str(concept)] = area
        for name, figures in own.items():
            if CONTROLLED[0] not in figures:
                own[name] = {CONTROLLED[0]: fmean(figures.values())}
        figures: dict[str, float] = {}
        for name, each in own.items():
            if f"test/auroc/{name}" in found:  # of many concepts their means alone
                figures |= {f"test/{figure}/{name}": value for figure, value in each.items()}
                figures[f"test/auroc_selectivity/{name}"] = float(found[f"test/auroc/{name}"]) - each[CONTROLLED[0]]
        return {name: torch.tensor(float(value)) for name, value in figures.items()}

    def _figures(self, scores: Tensor, labels: Tensor, threshold: float) -> dict[str, float]:
        rates = rates_above(scores, labels, threshold)
        count = rates.positives + rates.negatives
        right = int(((scores > threshold) == (labels == 1))[labels >= 0].sum())
        return {
            "auroc": float(auroc(scores, labels)),
            "true_positive_rate": rates.true_positive,
            "false_positive_rate": rates.false_positive,
            "f1": rates.f1(0.5),
            "f1_rare": rates.f1(self.positive_rate),
            "accuracy": right / count if count else nan,
            "majority_accuracy": max(rates.positives, rates.negatives) / count if count else nan,
            "positives": rates.positives,
            "negatives": rates.negatives,
        }

    def _told(self, scored: Scored) -> Iterator[tuple[Told, Column]]:
        for number, column in enumerate(scored.each()):
            yield divmod(number, len(self.concepts)), column


def _bounds(detector: Detector, concept: int) -> dict[str, float]:
    """The ends of a threshold's interval, where its texts give one."""
    ends = zip(("threshold_low", "threshold_high"), detector.bounds[concept], detector.bounded[concept], strict=True)
    return {name: float(end) for name, end, bounded in ends if bounded}


def _means(several: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of a detector as they are; of the controls their means, and the spread of their AUROC."""
    if len(several) == 1:
        return dict(several[0])
    shared = [figure for figure in several[0] if not figure.startswith("threshold")]
    known = [each["auroc"] for each in several if not isnan(each["auroc"])]
    spread = float(torch.tensor(known).std()) if len(known) > 1 else nan
    return _mean(several, shared) | {"auroc_spread": spread}


def _mean(several: Sequence[Mapping[str, float]], figures: Sequence[str]) -> dict[str, float]:
    """The means of some figures; a concept that a shifted set lacks has no AUROC there, and counts for nothing."""
    known = {figure: [each[figure] for each in several if not isnan(each[figure])] for figure in figures}
    return {figure: fmean(values) if values else nan for figure, values in known.items()}
