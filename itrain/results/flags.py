"""Flags: the controls that speak against a result, and from which share on they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from itrain.metrics import auroc_interval
from itrain.results.columns import (
    AREA_BY_CHANCE,
    AUROC,
    COMPONENT,
    CONTROLS,
    DIVERGED,
    EXAMPLES,
    FALSE_VARIABLE,
    FLAG,
    FULL_VECTOR,
    IIA,
    LAYER,
    MAJORITY_ACCURACY,
    MAJORITY_LABEL,
    METHOD,
    NEGATIVES,
    POSITION,
    POSITIVES,
    PROBE_ACCURACY,
    RANDOM_MODEL,
    RANDOM_SUBSPACE,
    RANK,
    SEED,
)
from itrain.results.controls import is_full_rank, without_void
from itrain.results.intervals import over_pairs

if TYPE_CHECKING:
    import pandas

CONTROL_PASSES, RANDOM_MODEL_PASSES, ABOVE_VECTOR = "control passes", "random model passes", "above the whole vector"
FULL_RANK, FALSE_PASSES = "full rank", "false variable passes"
REASONS: Mapping[str, str] = {
    DIVERGED: "loss, weights, activations or answers were not finite, so the fit has no figures: this is not a fit "
    "without effect",
    FULL_RANK: "the rank is the size of the activation, so all of it is swapped: this says nothing of a subspace, and "
    "a random subspace of this rank is no control and is left out of maps and curves",
    RANDOM_MODEL_PASSES: "the same fit on a randomly initialised model scores about as high, so the result says "
    "nothing about what this model has learned",
    FALSE_PASSES: "the same fit to a variable that the model need not have scores about as high, so the map is free "
    "enough to align anything (Sutter et al. 2025)",
    CONTROL_PASSES: "a random subspace of equal rank changes the label too, so no learned direction is needed",
    ABOVE_VECTOR: "the fit scores far above swapping the whole vector, so it may use directions that the model itself "
    "does not use (Makelov et al. 2023)",
}
"""Why a fit has a flag."""
SHOWN = 0.5
"""The share of label-changing pairs from which a control passes: halfway from 0 to 1."""
SHOWN_FALSE = 0.75
"""The same for a false variable, of the mean over pairs whose label changes and stays: a map that swaps alike in all,
or in none, has at most 0.5 of it, and this is halfway from there."""
TWO_ANSWERS = 0.5
"""The most frequent label's share where a table has none: that of two answers, as often one as the other."""
KEPT = IIA.replace("changing", "preserving")
ABOVE = 0.3
"""How far above the whole vector a subspace is flagged (Makelov et al. 2023)."""


def shown_untrained(majority: float) -> float:
    """The IIA from which a fit on a random model counts: halfway to 1 from the share of the most frequent label."""
    return (1 + (majority if majority == majority else TWO_ANSWERS)) / 2


def flagged(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The table with a column ``flag`` that names the first of these facts that speaks against a fit.

    ``diverged``: numbers were not finite, so that there are no figures.
    ``full rank``: the fit, or the control, swaps a subspace as large as the activation.
    ``control passes``: a random subspace of equal rank changes the label as predicted on half of the label-changing
    pairs or more. ``false variable passes``: the same fit to a variable that the model need not have is right on three
    quarters of its pairs, those that change the label counted as much as the others. ``random model passes``: the same
    fit on a randomly initialised model comes halfway to 1 from its chance; or, of a probe that is better than the most
    frequent class, it comes into or above the 95% interval of the probe's accuracy; or, of a detector that is better
    than chance, into or above that of its AUROC. A random model gives all pairs one answer, so its chance is the share
    of label-changing pairs that have the most frequent label: 0.5 of two answers, 0.25 of four.
    ``above the whole vector``: the fit is more than 0.3 above swapping all of the activation.
    """
    needed = [IIA, PROBE_ACCURACY, RANDOM_MODEL + IIA, RANDOM_MODEL + PROBE_ACCURACY, MAJORITY_ACCURACY, EXAMPLES, RANK]
    needed += [FALSE_VARIABLE + IIA, FALSE_VARIABLE + KEPT, MAJORITY_LABEL]
    needed += [AUROC, RANDOM_MODEL + AUROC, POSITIVES, NEGATIVES]
    table = frame.reindex(columns=list(dict.fromkeys([*frame.columns, *needed])))
    place = [LAYER, COMPONENT, POSITION, SEED]
    genuine = without_void(table)
    control: Any = genuine[genuine[METHOD] == RANDOM_SUBSPACE].groupby([*place, RANK], dropna=False)[IIA].first()
    table = table.assign(**{FULL_RANK: is_full_rank(table)})
    ceiling = table[table[METHOD] == FULL_VECTOR].groupby(place)[IIA].first()

    def flag(row: Any) -> str:
        if row.get(DIVERGED) == 1:
            return DIVERGED
        if row[FULL_RANK]:
            return FULL_RANK
        if row[METHOD] in CONTROLS:
            return ""
        here = tuple(row[key] for key in place)
        if row[PROBE_ACCURACY] == row[PROBE_ACCURACY]:
            low, _ = over_pairs(row[PROBE_ACCURACY], row[EXAMPLES])
            return RANDOM_MODEL_PASSES if row[RANDOM_MODEL + PROBE_ACCURACY] >= low > row[MAJORITY_ACCURACY] else ""
        if row[AUROC] == row[AUROC]:
            counts = [0 if row[each] != row[each] else int(row[each]) for each in (POSITIVES, NEGATIVES)]
            low, _ = auroc_interval(row[AUROC], *counts)
            return RANDOM_MODEL_PASSES if row[RANDOM_MODEL + AUROC] >= low > AREA_BY_CHANCE else ""
        if row[IIA] == row[IIA] and control.get((*here, row[RANK]), 0.0) >= SHOWN:
            return CONTROL_PASSES
        changed, kept = row[FALSE_VARIABLE + IIA], row[FALSE_VARIABLE + KEPT]
        if (changed + (kept if kept == kept else changed)) / 2 >= SHOWN_FALSE:
            return FALSE_PASSES
        if row[RANDOM_MODEL + IIA] >= shown_untrained(row[MAJORITY_LABEL]):
            return RANDOM_MODEL_PASSES
        return ABOVE_VECTOR if row[IIA] > ceiling.get(here, 1.0) + ABOVE else ""

    return frame.assign(**{FLAG: table.apply(flag, axis=1)})
