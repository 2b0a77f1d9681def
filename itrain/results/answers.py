"""The summaries of traces and finetunings: how probable, or how often right, the edited model's answers are."""

from __future__ import annotations

from itrain.metrics import RULES
from itrain.results.columns import (
    ANSWER_PROBABILITY,
    ANSWER_SPREAD,
    BEFORE,
    EXACT_MATCH,
    EXAMPLES,
    KNOWN,
    RUNS,
    TEST,
    is_known,
)
from itrain.results.intervals import of_run
from itrain.results.parts import Kind, Results, Table, at_place, bars_of_places, count, decimals, plain_table
from itrain.results.reading import TEXTS_READ, TRACE_READ

OF_TRACES = frozenset({ANSWER_PROBABILITY, ANSWER_SPREAD, EXAMPLES, *(f"answer_{rule}" for rule in RULES)})


def _known_table(results: Results) -> Table:
    known = {key: value for key, value in results.items() if key.startswith((f"{TEST}/", f"{BEFORE}/"))}
    return plain_table(
        {key: value for key, value in known.items() if is_known(key)}, title="held-out examples", note=TEXTS_READ
    )


TRACED = {"restored": TEST} | {run: f"{TEST}/{run}" for run in RUNS}


def _trace_table(results: Results) -> Table:
    rows = {}
    for name, place in TRACED.items():
        figures = at_place(results, place)
        if ANSWER_PROBABILITY in figures:
            ends = of_run(figures, ANSWER_PROBABILITY)
            interval = "" if ends is None else f"{ends[0]:.3f}-{ends[1]:.3f}"
            shares = [decimals(figures.get(f"answer_{rule}")) for rule in RULES]
            rows[name] = [decimals(figures[ANSWER_PROBABILITY]), interval, *shares]
    heads = [("", head) for head in ("probability", "95%", *RULES)]
    title = f"the clean answer on {count(at_place(results, TEST))}held-out examples"
    return Table(title=title, heads=heads, rows=rows, note=TRACE_READ)


TRACES = Kind(
    fits=lambda results: f"{TEST}/{ANSWER_PROBABILITY}" in results,
    known=OF_TRACES,
    table=_trace_table,
    bars=bars_of_places(ANSWER_PROBABILITY, TRACED, "probability of the clean answer"),
)
FINETUNINGS = Kind(
    fits=lambda results: f"{TEST}/{EXACT_MATCH}" in results,
    known=KNOWN,
    table=_known_table,
    bars=bars_of_places(
        EXACT_MATCH, {"after": TEST, "before": BEFORE}, "exact match of greedy generations, held-out prompts"
    ),
)
