"""The summary of a steered model: how often it mentions the concept, and how fluent it is, over strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from itrain.results.columns import (
    CONCEPT_RATE,
    EXAMPLES,
    JUDGED,
    PERPLEXITY_RATIO,
    RANDOM_HEADS,
    RANDOM_VECTOR,
    STEERING_SCORE,
    STRENGTH,
    TEST,
    TEST_STRENGTH,
    UNSTEERED,
    WIN_RATES,
)
from itrain.results.curves import Line, Plot, Point
from itrain.results.intervals import Ends, of_run
from itrain.results.parts import Bars, Kind, Results, Table
from itrain.results.reading import JUDGED_READ, STEERED_READ

TICK = 0.12
"""The room of a label on the axis of strengths, as a share of it."""
HIGHEST = 2.0
"""The highest score that a judge gives."""
TOP = 3.0
"""The highest perplexity ratio that is drawn: far above 1 there is no text left to tell apart."""


def _control(results: Results) -> str | None:
    """The name of what the steered model is compared with, beside the unsteered one; None: an export had none."""
    there = [each for each in (RANDOM_HEADS, RANDOM_VECTOR) if any(n.startswith(f"{TEST}/{each}/") for n in results)]
    return there[0] if there else None


def _sides(results: Results) -> dict[str, str]:
    """The lines of a plot, and where their figures are."""
    control = _control(results)
    return {"steered": TEST} | ({control.replace("_", " "): f"{TEST}/{control}"} if control else {})


def _is_of_steering(results: Results) -> bool:
    return f"{TEST}/{UNSTEERED}/{CONCEPT_RATE}" in results


def _strengths(results: Results) -> dict[float, str]:
    """The strengths above 0 from the lowest, with their names."""
    first, last = f"{TEST}/{STRENGTH}", f"/{CONCEPT_RATE}"
    names = [key[len(first) : -len(last)] for key in results if key.startswith(first) and key.endswith(last)]
    return {float(name): f"{STRENGTH}{name}" for name in sorted(names, key=float)}


def _interval(results: Results, place: str) -> Ends | None:
    counted = {CONCEPT_RATE: results[f"{place}/{CONCEPT_RATE}"], EXAMPLES: results[f"{TEST}/{EXAMPLES}"]}
    return of_run(counted, CONCEPT_RATE)


def is_judged(results: Results) -> bool:
    """Whether a judge has scored the continuations."""
    return f"{TEST}/{UNSTEERED}/{STEERING_SCORE}" in results


def judged_lines(results: Results) -> list[str]:
    """The scores at the chosen strength, and the win rates."""
    if not is_judged(results) or TEST_STRENGTH not in results:
        return []
    score, *beside = (f"{name}: {results[f'{at}/{STEERING_SCORE}']:.3f}" for name, at in _sides(results).items())
    compared = f" ({', '.join(beside)})" if beside else ""
    lines = [f"steering score at the chosen strength: {score.removeprefix('steered: ')}{compared}"]
    if all(f"{TEST}/{name}" in results for name in WIN_RATES):
        win, loss, tie = (results[f"{TEST}/{name}"] for name in WIN_RATES)
        lines.append(f"against the reference: {win:.3f} won, {tie:.3f} tied, {loss:.3f} lost")
    return lines


def _table(results: Results) -> Table:
    """The mentions over strength; a judge's scores in place of their intervals, where there are some."""
    if is_judged(results):
        return _judged_table(results)
    start, control = f"{TEST}/{UNSTEERED}", _control(results)
    rows = {UNSTEERED: [*_cells(results, start), "", ""]}
    for name in _strengths(results).values():
        random = _cells(results, f"{TEST}/{control}/{name}") if control else ["", "", ""]
        rows[name.replace("_", " ")] = [*_cells(results, f"{TEST}/{name}"), random[0], random[2]]
    uppers = ["steered", "", "", (control or "no control").replace("_", " "), ""]
    lowers = ["concept", "95%", "perplexity", "concept", "perplexity"]
    return Table(
        title=f"mentions of the concept and perplexity ratio, {results[f'{TEST}/{EXAMPLES}']:.0f} held-out prompts",
        heads=list(zip(uppers, lowers, strict=True)),
        rows=rows,
        note=STEERED_READ,
    )


def _judged_table(results: Results) -> Table:
    control = _control(results)
    rows = {UNSTEERED: [*_judged_cells(results, f"{TEST}/{UNSTEERED}"), ""]}
    for name in _strengths(results).values():
        random = _judged_cells(results, f"{TEST}/{control}/{name}")[2] if control else ""
        rows[name.replace("_", " ")] = [*_judged_cells(results, f"{TEST}/{name}"), random]
    uppers = ["steered", *[""] * 5, "random" if control else "no control"]
    lowers = ["rate", "ratio", "score", *(name.removesuffix("_score") for name in JUDGED[1:]), "score"]
    return Table(
        title=f"steering scores (0 to {HIGHEST:g}) on {results[f'{TEST}/{EXAMPLES}']:.0f} held-out prompts",
        heads=list(zip(uppers, lowers, strict=True)),
        rows=rows,
        note=JUDGED_READ,
    )


def _cells(results: Results, place: str) -> list[str]:
    low, high = _interval(results, place) or (0.0, 1.0)
    return [f"{results[f'{place}/{CONCEPT_RATE}']:.3f}", f"{low:.2f}-{high:.2f}", _ratio(results, place)]


def _judged_cells(results: Results, place: str) -> list[str]:
    scores = [f"{results[f'{place}/{name}']:.3f}" for name in JUDGED]
    return [f"{results[f'{place}/{CONCEPT_RATE}']:.3f}", _ratio(results, place), *scores]


def _ratio(results: Results, place: str) -> str:
    return f"{results[f'{place}/{PERPLEXITY_RATIO}']:.3g}"


def _bars(results: Results) -> Bars:
    places = {UNSTEERED: f"{TEST}/{UNSTEERED}"}
    if TEST_STRENGTH in results:
        (steered, at), *beside = _sides(results).items()
        places = {**dict(beside), **places, steered: at}
    names = list(places)
    return Bars(
        axis=f"concept rate, {results[f'{TEST}/{EXAMPLES}']:.0f} held-out prompts",
        names=names,
        series={CONCEPT_RATE: [results[f"{places[name]}/{CONCEPT_RATE}"] for name in names]},
        intervals={CONCEPT_RATE: [_interval(results, places[name]) for name in names]},
    )


def _plots(results: Results) -> Sequence[Plot]:
    """The concept rate over strength, and the perplexity ratio."""
    strengths = _strengths(results)
    chosen = f" (chosen: {results[TEST_STRENGTH]:g})" if TEST_STRENGTH in results else ""
    count = f"{results[f'{TEST}/{EXAMPLES}']:.0f}"
    drawn = {
        CONCEPT_RATE: (f"concept rate, {count} held-out prompts", 1.0),
        PERPLEXITY_RATIO: ("perplexity ratio, by the untouched model", TOP),
    }
    if is_judged(results):  # of which three stand side by side
        drawn = {
            CONCEPT_RATE: ("concept rate", 1.0),
            PERPLEXITY_RATIO: ("perplexity ratio", TOP),
            STEERING_SCORE: (f"steering score, {count} prompts", HIGHEST),
        }
    return [
        Plot(
            title=title,
            axis=f"strength{chosen}",
            ticks={strength: f"{strength:g}" for strength in _apart([0.0, *strengths])},
            ends=(-0.05 * max(strengths), 1.05 * max(strengths)),
            top=top,
            lines=[
                Line(name=name, stroke=stroke, points=_points(results, side, figure, strengths))
                for stroke, (name, side) in enumerate(_sides(results).items())
            ],
        )
        for figure, (title, top) in drawn.items()
    ]


def _apart(strengths: Sequence[float]) -> list[float]:
    """Those of ascending strengths that have room for a label."""
    kept = [strengths[0]]
    for strength in strengths[1:]:
        if strength - kept[-1] >= TICK * strengths[-1]:
            kept.append(strength)
    return kept


def _points(results: Results, side: str, figure: str, strengths: Mapping[float, str]) -> list[Point]:
    places = {0.0: f"{TEST}/{UNSTEERED}"} | {x: f"{side}/{name}" for x, name in strengths.items()}
    return [
        Point(
            x=x,
            y=results[f"{place}/{figure}"],
            says=f"strength {x:g}: {results[f'{place}/{figure}']:.3g}",
            interval=_interval(results, place) if figure == CONCEPT_RATE else None,
        )
        for x, place in places.items()
    ]


STEERING = Kind(
    fits=_is_of_steering,
    known=frozenset({CONCEPT_RATE, PERPLEXITY_RATIO, EXAMPLES, "perplexity", *JUDGED, *WIN_RATES}),
    table=_table,
    bars=_bars,
    plots=_plots,
)
"""A run that measures a steered model over strength."""
