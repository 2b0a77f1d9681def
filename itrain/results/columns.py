"""The columns of a results table and the figures of a run, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# --- settings of a fit: the columns of a sweep's table up to and including the command

METHOD, COMPONENT, LAYER, POSITION = "method", "component", "layer", "position"
WINDOW, RANK, SEED, COMMAND = "window", "rank", "seed", "command"
PLACE = [LAYER, POSITION]
"""The columns that make a cell of a heat map."""
STEP, WHOLE = "step ", "(whole)"
"""How the position of a module's call begins, and that of a site without one; no span can have these names."""
REQUIRED = (METHOD, *PLACE, SEED, COMMAND, "flag")
"""The columns that every table of a sweep has."""

RANDOM_SUBSPACE, FULL_VECTOR = "random_subspace", "full_vector"
CONTROLS = (RANDOM_SUBSPACE, FULL_VECTOR)
"""The methods that are controls: the first should change no label, the second as many as any subspace can."""

# --- figures of a fit: the columns after the command

IIA, PAIRWISE = "iia_changing_argmax", "iia_changing_pairwise"
"""The shares of label-changing pairs in which the counterfactual label is the likeliest of all outputs, by which sweeps
are judged, and in which it is likelier than the base's."""
ODDS, ODDS_SPREAD, ODDS_SELECTIVITY = "odds", "odds_spread", "odds_selectivity"
"""How far label-changing pairs are moved from the base's label to the counterfactual one, in nats; the standard
deviation over pairs; and the odds less those of the same fit to the control task."""
CLEAN_DIFFERENCE, LOGIT_DIFFERENCE = "logit_difference_clean", "logit_difference"
FLDD, FLDD_RELATIVE = "fldd", "fldd_relative"
"""The mean logit difference of the base's label over the counterfactual one, before and after an interchange; by how
many percent it has fallen; and by how many of what the full vector makes of it."""
FLIP = "iia_flip"
"""The share of label-changing pairs whose preference of two answers is right in the base and reversed afterwards."""
PROBE_ACCURACY, CONTROL_ACCURACY, MAJORITY_ACCURACY = "probe_accuracy", "control_accuracy", "majority_accuracy"
SELECTIVITY, ANSWER_PROBABILITY = "selectivity", "answer_probability"
EXACT_MATCH, PERPLEXITY = "exact_match", "perplexity"
GAP, RANK_FOUND, SECONDS, FLAG = "gap", "rank_found", "seconds", "flag"
PAIRS_CHANGING, PAIRS_PRESERVING = "pairs_changing", "pairs_preserving"
TOKENS = ("raises", "lowers")
"""The tokens that the leading direction of an alignment makes more and less likely."""
DATA = "data/"
"""Prefix of the figures of the test data itself."""
PAIRS_DISTINCT, BASES_DISTINCT, BASES_TRAINED_ON = "pairs_distinct", "bases_distinct", "bases_trained_on"
"""How many test pairs, and how many of their bases, are different ones; how many bases were trained on."""
MAJORITY_LABEL = DATA + "majority_label"
"""The share of label-changing test pairs with the most frequent counterfactual label: the IIA of one fixed answer."""
EXAMPLES, CONTROL_EXAMPLES = "examples", "control_examples"
ANSWER_SPREAD = "answer_spread"
"""The standard deviation over examples of the answer's probability."""
FEATURES = "features"
"""The size of the activation that an intervention edits, which is the highest rank that a subspace of it can have."""
ROW_PART, NULL_PART, ROW_SHARE = "row_part", "null_part", "row_share"
"""The parts of a subspace that the next linear map reads and does not read, and the former's share of the norm."""
SUBSPACE_PARTS = (ROW_PART, NULL_PART)
ROUND_TRIP = "round_trip_error"
"""The largest share of an activation that a non-linear map and its inverse lose to rounding."""
DIVERGENCE, NATURAL_DIVERGENCE = "divergence", "natural_divergence"
"""How far intervened activations lie from natural ones, and natural ones from each other, in samples of one size."""
CONCEPT_RATE, PERPLEXITY_RATIO = "concept_rate", "perplexity_ratio"
"""The share of continuations that mention a concept; their perplexity, divided by that of unsteered ones."""
STEERING_SCORE = "steering_score"
JUDGED = (STEERING_SCORE, "concept_score", "instruct_score", "fluency_score")
"""A judge's mean scores of continuations, from 0 to 2: the harmonic mean of three aspects, then these."""
WIN_RATES = ("win_rate", "loss_rate", "tie_rate")
"""How often a continuation's score is above a reference's, below it, and neither."""
AUROC, TRUE_POSITIVES, FALSE_POSITIVES = "auroc", "true_positive_rate", "false_positive_rate"
AREA_BY_CHANCE = 0.5
F1, F1_RARE, ACCURACY, AUROC_SPREAD = "f1", "f1_rare", "accuracy", "auroc_spread"
"""Of detection: F1 of balanced classes and of rare positives; the standard deviation of AUROC over controls."""
POSITIVES, NEGATIVES = "positives", "negatives"
THRESHOLDS = ("threshold", "threshold_low", "threshold_high")
"""Above which a score is an alarm, and the ends of its interval."""
RANDOM_DIRECTION = "random_direction/"
"""Prefix of the mean figures of random directions as detectors, at the same site."""
CONTROL_AUROC, AUROC_SELECTIVITY = "control_auroc", "auroc_selectivity"
"""Of a detector on arbitrary labels of types of texts, in new texts of these; and how far it lies below the AUROC."""
CONTROL_POSITIVES, CONTROL_NEGATIVES = "control_positives", "control_negatives"
SHIFTED = "shift/"
"""Prefix of the figures on a shifted test set, before its name."""
RANDOM_MODEL = "random_model/"
"""Prefix of the figures of the same fit on a randomly initialised model."""
FALSE_VARIABLE = "false_variable/"
"""Prefix of the figures of the same fit to variables that the model need not have, beside maps that are not linear."""
CONTROL_TASK = "control_task/"
"""Prefix of the figures of the same fit to a task of the same inputs with arbitrary labels."""
RUNS = ("corrupted", "clean")
"""Prefixes of the figures of the two runs that causal tracing lies between."""
CURVE, EPOCH, VALIDATION = "curve", "epoch", "validation/"
DIVERGED = "diverged"
"""1 for a fit whose loss, weights or answers were not finite; it has no other figures."""

FIGURES: Mapping[str, str] = {
    IIA: "IIA (argmax), label-changing pairs",
    PROBE_ACCURACY: "accuracy",
    SELECTIVITY: "selectivity",
    ANSWER_PROBABILITY: "probability of the answer",
    ODDS: "odds (nats), label-changing pairs",
    ODDS_SELECTIVITY: "odds above the control task's (nats)",
    EXACT_MATCH: "exact match of responses",
    AUROC: "AUROC",
    AUROC_SELECTIVITY: "AUROC above the control task's",
}
"""The figures that have heat maps, with their titles."""
AREAS: Mapping[str, tuple[str, str]] = {
    AUROC: (POSITIVES, NEGATIVES),
    RANDOM_MODEL + AUROC: (POSITIVES, NEGATIVES),
    CONTROL_AUROC: (CONTROL_POSITIVES, CONTROL_NEGATIVES),
}
"""For figures that are an AUROC: the columns with the number of texts with and without the concept."""
UNBOUNDED = frozenset({ODDS, ODDS_SELECTIVITY, CLEAN_DIFFERENCE, LOGIT_DIFFERENCE, FLDD, FLDD_RELATIVE})
"""Figures that are no shares, and may lie anywhere."""
COUNTED: Mapping[str, tuple[str, str]] = {
    IIA: (PAIRS_CHANGING, "pairs"),
    PAIRWISE: (PAIRS_CHANGING, "pairs"),
    RANDOM_MODEL + IIA: (PAIRS_CHANGING, "pairs"),
    PROBE_ACCURACY: (EXAMPLES, "examples"),
    RANDOM_MODEL + PROBE_ACCURACY: (EXAMPLES, "examples"),
    CONTROL_ACCURACY: (CONTROL_EXAMPLES, "examples"),
    CONCEPT_RATE: (EXAMPLES, "examples"),
}
"""For figures that are shares: the column with the number of pairs or examples, and what is counted."""
CHANCE: Mapping[str, str | float] = {
    AUROC: AREA_BY_CHANCE,
    PROBE_ACCURACY: MAJORITY_ACCURACY,
    RANDOM_MODEL + PROBE_ACCURACY: MAJORITY_ACCURACY,
    ANSWER_PROBABILITY: f"{RUNS[0]}/{ANSWER_PROBABILITY}",
}
"""The chance level of a figure, or its column; the others of ``FIGURES`` are 0 where there is nothing to find.

A probe that has learned nothing is right as often as the most frequent class, which is never below 1 / classes. An
intervention that changes nothing leaves the base's label in place: on label-changing pairs its IIA is 0. A trace that
restores nothing has the probability of the corrupted run. Scores that say nothing have an AUROC of 0.5.
"""

# --- figures of a single run: ``<test or before>/<part>/<figure>``, or ``test/<figure>/<probe>``

TEST, BEFORE = "test", "before"
MODEL_ACCURACY, TASK_ACCURACY, TEST_RANK = "model/accuracy", "task_accuracy", "test/rank"
STRICT_ACCURACY = "strict_accuracy"
"""The share of answers that stay right where what an alignment leaves to no variable is resampled."""
TEST_STRENGTH, STRENGTH = "test/strength", "strength_"
"""The strength of steering that a run has chosen, and what the names of all strengths begin with."""
UNSTEERED, RANDOM_VECTOR, RANDOM_HEADS = "unsteered", "random_vector", "random_heads"
"""What a steered model is compared with: strength 0, a random direction of equal size, or other heads."""
L2 = "l2"
TRAIN_LOSS = "train/loss"

ATTRIBUTES = ("cause", "isolate", "disentangle")
"""The shares of pairs in which an attribute is swapped, and in which another one is left, and their mean."""
_SHARES = (
    *("iia", "iia_changing", "iia_preserving", "answer"),
    *(f"{figure}{how}" for figure in ATTRIBUTES for how in ("", "_averaged")),
)
KNOWN = frozenset(
    {*FIGURES, CONTROL_ACCURACY, MAJORITY_ACCURACY, EXAMPLES, CONTROL_EXAMPLES, PAIRS_CHANGING, PAIRS_PRESERVING}
    | {PAIRS_DISTINCT, BASES_DISTINCT, BASES_TRAINED_ON, MAJORITY_LABEL.removeprefix(DATA), ANSWER_SPREAD, FEATURES}
    | {DIVERGED, GAP, RANK_FOUND, SECONDS, RANK, TASK_ACCURACY, STRICT_ACCURACY, EXACT_MATCH, PERPLEXITY, L2}
    | {CONCEPT_RATE, PERPLEXITY_RATIO, DIVERGENCE, NATURAL_DIVERGENCE, ROW_SHARE, ROUND_TRIP}
    | {ODDS_SPREAD, CLEAN_DIFFERENCE, LOGIT_DIFFERENCE, FLDD, FLDD_RELATIVE, FLIP}
    | {*JUDGED, *WIN_RATES}
    | {AUROC, TRUE_POSITIVES, FALSE_POSITIVES, F1, F1_RARE, ACCURACY, AUROC_SPREAD, POSITIVES, NEGATIVES, *THRESHOLDS}
    | {CONTROL_AUROC, AUROC_SELECTIVITY, CONTROL_POSITIVES, CONTROL_NEGATIVES}
    | {f"{figure}_{rule}" for figure in _SHARES for rule in ("argmax", "pairwise")}
)
"""The figures that itrain's own trainings report; a figure with another name is one of the user's own."""


def is_known(key: str) -> bool:
    """Whether a column of a table, or a figure of a run, is one of itrain's own."""
    return any(part in KNOWN for part in key.split("/"))


def in_order(layers: Iterable[Any]) -> list[Any]:
    """Layers, or modules by their paths, from the first to the last: ``encoder.2`` before ``encoder.10``."""
    return sorted(layers, key=order_of)


def order_of(layer: Any) -> list[int | str]:
    """The key by which layers and modules' paths are sorted."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(layer))]


def named_layer(layer: Any) -> str:
    """How text speaks of a layer, or of a module that is named by its path."""
    return str(layer) if names_module(layer) else f"layer {layer}"


def names_module(layer: Any) -> bool:
    """Whether a value of the column of layers is the path of a module."""
    return isinstance(layer, str) and not layer.isdigit()


def named_site(layer: Any, position: str) -> str:
    """A row's place as its site says it: ``3@last``, and of a module ``cell.output.step2@last``."""
    if not names_module(layer):
        return f"{layer}@{position}"
    parts = [] if position == WHOLE else position.split(", ")
    steps = [f".step{part.removeprefix(STEP)}" for part in parts if part.startswith(STEP)]
    return "".join([str(layer), *steps, *(f"@{part}" for part in parts if not part.startswith(STEP))])


def written(value: Any) -> str:
    """A value in at most four digits; nothing for a missing one."""
    if isinstance(value, int | float):
        return "" if value != value else f"{value:.4g}"
    return "" if value is None or value != value else str(value)


def spoken(column: str) -> str:
    """A column's name as text."""
    return column.replace("/", ", ").replace("_", " ")
