"""How the threshold of a detector is chosen, on validation texts alone."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itrain.detectors import Detector
from itrain.metrics import threshold_at, threshold_interval, threshold_of_youden

ThresholdRule = Literal["false_positive_rate", "youden"]
"""At a share of false positives, or where the true and the false positive rate differ most."""


def require_rule(rule: str) -> ThresholdRule:
    """The rule, if it is one.

    Raises:
        ValueError: it is none.
    """
    found: ThresholdRule | None = next((each for each in get_args(ThresholdRule) if each == rule), None)
    if found is None:
        raise ValueError(f"threshold '{rule}' is none of {', '.join(get_args(ThresholdRule))}")
    return found


def choose_threshold(
    detector: Detector,
    concept: int,
    scores: Float[Tensor, " texts"],
    labels: Int[Tensor, " texts"],
    *,
    rule: ThresholdRule,
    rate: float,
) -> None:
    """Choose a detector's threshold for a concept, and its interval where the rule has one.

    Raises:
        ValueError: the texts that the rule needs are missing.
    """
    if rule == "youden":
        detector.thresholds[concept] = threshold_of_youden(scores, labels)
        detector.bounded[concept] = False
        detector.bounds[concept] = 0.0
        return
    negatives = scores[labels == 0]
    detector.thresholds[concept] = threshold_at(negatives, rate)
    ends = torch.tensor(threshold_interval(negatives, rate))
    detector.bounded[concept] = ends.isfinite()
    detector.bounds[concept] = ends.nan_to_num(posinf=0.0, neginf=0.0)
