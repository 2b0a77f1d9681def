"""The columns of a results table and the figures of a run, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# --- settings of a fit: the columns of a sweep's table up to and including the command

METHOD, COMPONENT, LAYER, POSITION = "method", "component", "layer", "position"
WINDOW, RANK, SEED, COMMAND = "window", "rank", "seed", "command"
PLACE = [LAYER, POSITION]
"""The columns that make a cell of a heat map."""
REQUIRED = (METHOD, *PLACE, SEED, COMMAND, "flag")
"""The columns that every table of a sweep has."""

RANDOM_SUBSPACE, FULL_VECTOR = "random_subspace", "full_vector"
CONTROLS = (RANDOM_SUBSPACE, FULL_VECTOR)
"""The methods that are controls: the first should change no label, the second as many as any subspace can."""

# --- figures of a fit: the columns after the command

IIA = "iia_changing_pairwise"
"""The share of label-changing pairs in which the counterfactual label wins over the base's."""
PROBE_ACCURACY, CONTROL_ACCURACY, MAJORITY_ACCURACY = "probe_accuracy", "control_accuracy", "majority_accuracy"
SELECTIVITY, ANSWER_PROBABILITY = "selectivity", "answer_probability"
GAP, RANK_FOUND, SECONDS, FLAG = "gap", "rank_found", "seconds", "flag"
PAIRS_CHANGING, PAIRS_PRESERVING = "pairs_changing", "pairs_preserving"
EXAMPLES, CONTROL_EXAMPLES = "examples", "control_examples"
RANDOM_MODEL = "random_model/"
"""Prefix of the figures of the same fit on a randomly initialised model."""
RUNS = ("corrupted", "clean")
"""Prefixes of the figures of the two runs that causal tracing lies between."""
CURVE, EPOCH, VALIDATION = "curve", "epoch", "validation/"
DIVERGED = "diverged"
"""1 for a fit whose loss, weights or answers were not finite; it has no other figures."""

FIGURES: Mapping[str, str] = {
    IIA: "IIA, label-changing pairs",
    PROBE_ACCURACY: "accuracy",
    SELECTIVITY: "selectivity",
    ANSWER_PROBABILITY: "probability of the answer",
}
"""The figures that have heat maps, with their titles."""
COUNTED: Mapping[str, tuple[str, str]] = {
    IIA: (PAIRS_CHANGING, "pairs"),
    RANDOM_MODEL + IIA: (PAIRS_CHANGING, "pairs"),
    PROBE_ACCURACY: (EXAMPLES, "examples"),
    RANDOM_MODEL + PROBE_ACCURACY: (EXAMPLES, "examples"),
    CONTROL_ACCURACY: (CONTROL_EXAMPLES, "examples"),
}
"""For figures that are shares: the column with the number of pairs or examples, and what is counted."""

# --- figures of a single run: ``<test or before>/<part>/<figure>``, or ``test/<figure>/<probe>``

TEST, BEFORE = "test", "before"
MODEL_ACCURACY, TASK_ACCURACY, TEST_RANK = "model/accuracy", "task_accuracy", "test/rank"
EXACT_MATCH, PERPLEXITY, L2 = "exact_match", "perplexity", "l2"
TRAIN_LOSS = "train/loss"

_SHARES = ("iia", "iia_changing", "iia_preserving", "cause", "isolate", "disentangle", "answer")
KNOWN = frozenset(
    {*FIGURES, CONTROL_ACCURACY, MAJORITY_ACCURACY, EXAMPLES, CONTROL_EXAMPLES, PAIRS_CHANGING, PAIRS_PRESERVING}
    | {DIVERGED, GAP, RANK_FOUND, SECONDS, RANK, TASK_ACCURACY, EXACT_MATCH, PERPLEXITY, L2}
    | {f"{figure}_{rule}" for figure in _SHARES for rule in ("argmax", "pairwise")}
)
"""The figures that itrain's own trainings report; a figure with another name is one of the user's own."""


def is_known(key: str) -> bool:
    """Whether a column of a table, or a figure of a run, is one of itrain's own."""
    return any(part in KNOWN for part in key.split("/"))


def written(value: Any) -> str:
    """A value in at most four digits; nothing for a missing one."""
    if isinstance(value, int | float):
        return "" if value != value else f"{value:.4g}"
    return "" if value is None or value != value else str(value)


def spoken(column: str) -> str:
    """A column's name as text."""
    return column.replace("/", ", ").replace("_", " ")
