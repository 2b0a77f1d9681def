"""What the controls of a map say of its alignment: whether it aligns as well where there is nothing to find."""

from __future__ import annotations

from collections.abc import Mapping

from itrain.results.columns import PAIRS_CHANGING, PAIRS_PRESERVING, TEST
from itrain.results.intervals import over_pairs

VACUITY = "vacuity"
"""What the names of the controls' figures begin with."""
FALSE_VARIABLE, LABELS, MODEL = "false_variable", "arbitrary_labels", "random_model"
LABELS_BY_HEART, LINEAR = "labels_by_heart", "linear_map"
CHECKED, VACUOUS = f"{VACUITY}/checked", f"{VACUITY}/vacuous"
ANSWERS = f"{VACUITY}/answers"
"""How many different answers the task has."""
OF_VACUITY = frozenset({CHECKED, VACUOUS, ANSWERS})
SPEAKING = (FALSE_VARIABLE, LABELS, MODEL)
"""The controls that speak against an alignment if they align too; a linear map does if it does not. Lower capacities
and training pairs only tell how free the map is."""
PASSES = 0.5
"""The share of the map's own way from chance to 1 from which a control aligns about as well: halfway."""
_IIA = "iia_argmax"
_COUNTS = (PAIRS_CHANGING, PAIRS_PRESERVING)


def above_chance(results: Mapping[str, float], place: str) -> float | None:
    """IIA at a place as a share of the way from chance to 1; None where it is not known.

    Chance is what a map that looks at no value can have: it leaves all answers, or changes all to others, each of which
    is right in one case out of as many as there are others.
    """
    iia = results.get(f"{place}/{_IIA}")
    changing, preserving = (results.get(f"{place}/{kind}", 0.0) for kind in _COUNTS)
    right = max(preserving, changing / max(results.get(ANSWERS, 2.0) - 1, 1.0))
    if iia is None or not 0 < right < changing + preserving:
        return None
    chance = right / (changing + preserving)
    return (iia - chance) / (1 - chance)


def aligns(results: Mapping[str, float]) -> bool:
    """Whether the run's own IIA is above chance by more than the sampling of its pairs explains."""
    own, pairs = above_chance(results, TEST), sum(results.get(f"{TEST}/{kind}", 0.0) for kind in _COUNTS)
    if own is None:
        return False
    low, _ = over_pairs(results[f"{TEST}/{_IIA}"], pairs)
    return (above_chance({**results, f"{TEST}/{_IIA}": low}, TEST) or 0.0) > 0


def passing(results: Mapping[str, float]) -> list[str]:
    """The controls that align about as well as the run's own map, where that aligns at all."""
    own = above_chance(results, TEST) if aligns(results) else None
    found = {name: above_chance(results, f"{VACUITY}/{name}") for name in (*SPEAKING, LINEAR)}
    return [name for name, each in found.items() if own is not None and each is not None and each >= PASSES * own]


def is_vacuous(results: Mapping[str, float]) -> bool:
    """Whether the alignment says nothing about the model.

    A control without anything to find aligns about as well, or only the freer map aligns and a linear one does not: the
    activations hold the information, as those of an input do too.
    """
    return bool(_reasons(results))


def _reasons(results: Mapping[str, float]) -> list[str]:
    passed = passing(results)
    against = [name for name in passed if name != LINEAR]
    found = [f"{' and '.join(map(_spoken, against))} align about as well"] if against else []
    if f"{VACUITY}/{LINEAR}/{_IIA}" in results and LINEAR not in passed and aligns(results):
        found.append("a linear map does not align")
    return found


def vacuity_lines(results: Mapping[str, float]) -> list[str]:
    """Lines that say what the controls have found, or that there were none."""
    if CHECKED not in results:
        return []
    if not results[CHECKED]:
        return ["vacuity not checked: a map that is not linear may align with anything; the controls of a fit tell"]
    known = [name for name in (*SPEAKING, LINEAR) if f"{VACUITY}/{name}/{_IIA}" in results]
    told = ", ".join(f"{_spoken(name)} {results[f'{VACUITY}/{name}/{_IIA}']:.3f}" for name in known)
    own = f"IIA (argmax) of this fit {results[f'{TEST}/{_IIA}']:.3f}, of controls: {told}"
    more = [] if MODEL in known else ["vacuity not checked on a random model: there is none"]
    if reasons := _reasons(results):
        return [f"vacuous: {', and '.join(reasons)} ({own})", *more]
    if not aligns(results):
        return [f"no alignment, so that controls say nothing ({own})", *more]
    return [f"not vacuous by these controls ({own})", *more]


def places(results: Mapping[str, float]) -> dict[str, str]:
    """The names of the controls' rows, by the beginnings of their figures' names."""
    found = [key.split("/")[1] for key in results if key.startswith(f"{VACUITY}/") and key.endswith(f"/{_IIA}")]
    return {f"{VACUITY}/{name}": _spoken(name) for name in found}


def _spoken(name: str) -> str:
    return name.replace("_", " ")
