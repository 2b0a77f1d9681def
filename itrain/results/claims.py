"""What the figures of a run say, in a sentence: the claim, with what it is to be compared with."""

from __future__ import annotations

from collections.abc import Mapping

from itrain.results.columns import (
    BEFORE,
    CONTROL_ACCURACY,
    CONTROLS,
    EXACT_MATCH,
    IIA,
    MAJORITY_ACCURACY,
    PAIRS_CHANGING,
    PROBE_ACCURACY,
    TEST,
    spoken,
)


def claim(results: Mapping[str, float | None]) -> str | None:
    """The claim that the final figures of a run make; None where they are of no kind that is known."""
    known = {key: value for key, value in results.items() if value is not None}
    probes = [key.removeprefix(f"{TEST}/{PROBE_ACCURACY}/") for key in known if f"{TEST}/{PROBE_ACCURACY}/" in key]
    if f"{TEST}/{IIA}" in known:
        return _of_pairs(known)
    if probes:
        best = max(probes, key=lambda name: known[f"{TEST}/{PROBE_ACCURACY}/{name}"])
        named = {PROBE_ACCURACY: "accuracy", CONTROL_ACCURACY: "control", MAJORITY_ACCURACY: "most frequent class"}
        figures = {title: known.get(f"{TEST}/{figure}/{best}") for figure, title in named.items()}
        return f"the most accurate probe, of {best}, has on held-out examples: {_listed(figures)}"
    if f"{TEST}/{EXACT_MATCH}" in known:
        figures = {"after": known[f"{TEST}/{EXACT_MATCH}"], "before": known.get(f"{BEFORE}/{EXACT_MATCH}")}
        return f"the share of held-out prompts whose greedy generation is the right response is {_listed(figures)}"
    return None


def _of_pairs(known: Mapping[str, float]) -> str:
    controls = {spoken(name): known.get(f"{TEST}/{name}/{IIA}") for name in CONTROLS}
    count = known.get(f"{TEST}/{PAIRS_CHANGING}")
    beside = f" ({_listed(controls)})" if any(value is not None for value in controls.values()) else " (no control)"
    return (
        "the counterfactual label of the causal model is the likeliest of all outputs (argmax) on a share of "
        f"{known[f'{TEST}/{IIA}']:.3f} of {'the' if count is None else f'{count:.0f}'} held-out pairs whose label "
        f"changes{beside}"
    )


def _listed(figures: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if value is not None)
