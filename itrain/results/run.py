"""The summary of a single run: its table, its lines, its bars and its curve, worked out once from its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from itrain.metrics import RULES
from itrain.results.columns import (
    ANSWER_PROBABILITY,
    ANSWER_SPREAD,
    ATTRIBUTES,
    BASES_DISTINCT,
    BASES_TRAINED_ON,
    BEFORE,
    CONTROL_ACCURACY,
    CONTROL_EXAMPLES,
    CONTROLS,
    DATA,
    EXACT_MATCH,
    EXAMPLES,
    FULL_VECTOR,
    IIA,
    KNOWN,
    L2,
    MAJORITY_ACCURACY,
    MODEL_ACCURACY,
    PAIRS_CHANGING,
    PAIRS_DISTINCT,
    PAIRS_PRESERVING,
    PROBE_ACCURACY,
    RANDOM_SUBSPACE,
    ROW_SHARE,
    RUNS,
    SELECTIVITY,
    STRICT_ACCURACY,
    SUBSPACE_PARTS,
    TASK_ACCURACY,
    TEST,
    TEST_RANK,
    TEST_STRENGTH,
    is_known,
    spoken,
)
from itrain.results.curves import Plot
from itrain.results.detection import DETECTION
from itrain.results.divergence import OF_DIVERGENCE, divergence_lines
from itrain.results.history import Curve, read_curve
from itrain.results.intervals import of_run
from itrain.results.parts import Bars, Kind, Results, Table
from itrain.results.picks import OF_PICKS, PICK_CONTROLS, mode_places, pick_lines
from itrain.results.reading import (
    ATTRIBUTES_READ,
    BARS_READ,
    CURVE_READ,
    LINES_READ,
    PAIRS_READ,
    PROBES_READ,
    RULES_READ,
    TEXTS_READ,
    TRACE_READ,
    VALIDATION_READ,
)
from itrain.results.shifts import OF_SHIFTS, shifts_table
from itrain.results.steering import STEERING, judged_lines
from itrain.results.vacuity import OF_VACUITY, vacuity_lines
from itrain.results.vacuity import places as control_places

INTERVALS = "95% intervals"
PAIRS_TITLE = "interchange intervention accuracy on held-out pairs"
AVERAGED_TITLE = "IIA on held-out pairs, averaged over prompts, then attributes"
OF_PAIRS = frozenset(key for key in KNOWN if key.endswith(RULES)) | {PAIRS_CHANGING, PAIRS_PRESERVING}
OF_PAIRS |= OF_SHIFTS | OF_DIVERGENCE | OF_PICKS | {ROW_SHARE}
PROBED = frozenset({PROBE_ACCURACY, CONTROL_ACCURACY, SELECTIVITY, MAJORITY_ACCURACY, EXAMPLES, CONTROL_EXAMPLES, L2})
OF_TRACES = frozenset({ANSWER_PROBABILITY, ANSWER_SPREAD, EXAMPLES, *(f"answer_{rule}" for rule in RULES)})
OF_DATA = {
    DATA + PAIRS_DISTINCT: "distinct test pairs",
    DATA + BASES_DISTINCT: "distinct test bases",
    DATA + BASES_TRAINED_ON: "test bases that training pairs use too",
}
OF_ANSWERS = (TASK_ACCURACY, STRICT_ACCURACY)
IN_LINES = frozenset(
    {MODEL_ACCURACY, TEST_RANK, TEST_STRENGTH, *OF_DATA, *OF_VACUITY}
    | {f"{place}/{figure}" for place in (TEST, BEFORE) for figure in OF_ANSWERS}
)
"""The figures that have lines of their own."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run found."""

    tables: Sequence[Table]
    lines: Sequence[str]
    bars: Bars | None
    """None where there is no figure to draw."""
    curve: Curve | None
    """None where nothing was trained step by step."""
    results: Results
    """The final figures themselves."""
    plots: Sequence[Plot] = ()
    """Lines that are drawn in place of the bars, where there are some."""

    @property
    def caption(self) -> str:
        """How to read the picture of the run."""
        found = [LINES_READ] if self.plots else [] if self.bars is None else [BARS_READ]
        if self.bars is not None and not self.plots:
            found += [self.bars.note] if self.bars.note else []
            found += [f"Dotted: {self.bars.mark}."] if self.bars.marks else []
        if self.curve is not None:
            found += [CURVE_READ] + ([VALIDATION_READ] if self.curve.validation else [])
        return " ".join(found)

    @property
    def named_tables(self) -> dict[str, Table]:
        """The tables under short names, which are the same for all runs."""
        return {table.name: table for table in self.tables}


def summarise_run(results: Results, metrics: Path | None = None) -> RunSummary:
    """The summary of a run.

    Args:
        results: the final figures. Those that no training of itrain's reports are the user's own, and are shown as they
            are.
        metrics: the run's ``metrics.csv``; a run without training has none.
    """
    kind = next((kind for kind in KINDS if kind.fits(results)), None)
    if kind is None:
        shown = {key: value for key, value in results.items() if key not in {MODEL_ACCURACY, *OF_DATA}}
        tables, bars, plots = [_plain_table(shown, title="test figures")], _plain_bars(shown), ()
    else:
        tables, bars, plots = [kind.table(results)], kind.bars(results), kind.plots(results)
        shifts = shifts_table(results, _places(results))
        tables += [] if shifts is None else [shifts]
        own = {key: value for key, value in results.items() if not kind.shows(key) and key not in IN_LINES}
        tables += [_plain_table(own, title="other test figures", name="other_results")] if own else []
    return RunSummary(
        tables=tables,
        lines=_lines(results),
        bars=bars,
        curve=None if metrics is None else read_curve(metrics),
        results=results,
        plots=plots,
    )


# --- interchange interventions


def _is_of_pairs(results: Results) -> bool:
    figures = [f"{figure}_{rule}" for figure in ("iia_changing", "iia_preserving", "iia") for rule in RULES]
    return all(f"{TEST}/{figure}" in results for figure in (*figures, PAIRS_CHANGING, PAIRS_PRESERVING))


def _pairs_table(results: Results) -> Table:
    changing, preserving = (int(results[f"{TEST}/{kind}"]) for kind in (PAIRS_CHANGING, PAIRS_PRESERVING))
    note = PAIRS_READ
    columns = {
        "iia_changing": f"changing {changing}",
        "iia_preserving": f"preserving {preserving}",
        "iia": f"all {changing + preserving}",
    }
    title = PAIRS_TITLE
    for how, titled in (("", PAIRS_TITLE), ("_averaged", AVERAGED_TITLE)):
        if f"{TEST}/disentangle{how}_argmax" in results:
            columns, title = {f"{figure}{how}": figure for figure in ATTRIBUTES}, titled
            note = ATTRIBUTES_READ
    rows = {
        name: [_decimals(results.get(f"{place}/{figure}_{rule}")) for figure in columns for rule in RULES]
        for place, name in _places(results).items()
    }
    heads = [(title if rule == RULES[0] else "", rule) for title in columns.values() for rule in RULES]
    return Table(title=title, heads=heads, rows=rows, note=note)


def _places(results: Results) -> dict[str, str]:
    """The names of the rows, by the beginnings of their figures' names."""
    places = {key.rpartition("/")[0] for key in results if key.endswith("/iia_argmax")}
    named = {place: _row_name(place) for place in sorted(filter(_is_shown, places), key=_order)}
    return named | control_places(results)


def _pairs_bars(results: Results) -> Bars:
    places = {name: place for place, name in reversed(control_places(results).items())}
    places |= {spoken(control): f"{TEST}/{control}" for control in reversed((*CONTROLS, *PICK_CONTROLS))}
    places |= mode_places(results) | {"trained": TEST}
    places = {name: place for name, place in places.items() if f"{place}/iia_changing_pairwise" in results}
    names = {rule: f"iia_changing_{rule}" for rule in RULES}
    found = [_at(results, place) for place in places.values()]
    pairs = int(results[f"{TEST}/{PAIRS_CHANGING}"])
    return Bars(
        axis=f"interchange intervention accuracy, {pairs} label-changing pairs\n{INTERVALS}",
        names=list(places),
        series={rule: [figures[name] for figures in found] for rule, name in names.items()},
        intervals={rule: [of_run(figures, name) for figures in found] for rule, name in names.items()},
        note=f"It is the share of pairs that get the causal model's answer. {RULES_READ}",
    )


def _at(results: Results, place: str) -> dict[str, float]:
    """The figures of a place, by their names there, and those of the data."""
    return {
        key.removeprefix(f"{place}/"): value for key, value in results.items() if key.startswith((f"{place}/", DATA))
    }


def _count(figures: Mapping[str, float]) -> str:
    """The number of examples, followed by a space, where it is known."""
    return f"{figures[EXAMPLES]:.0f} " if EXAMPLES in figures else ""


def _is_control(place: str) -> bool:
    return place.split("/")[1:2] in [[control] for control in (*CONTROLS, *PICK_CONTROLS)]


def _is_part(place: str) -> bool:
    return place.split("/")[1:2] in [[part] for part in SUBSPACE_PARTS]


def _is_shown(place: str) -> bool:
    """Whether a place has a row: all but groups of pairs under controls and parts, and these at the start."""
    start, aside = place.split("/")[0], _is_control(place) or _is_part(place)
    return start in (TEST, BEFORE) and (not aside or (start == TEST and place.count("/") == 1))


def _order(place: str) -> tuple[bool, int, bool, int, str]:
    """The trained intervention first, then the start, its subspace's parts and the controls, each before its groups."""
    part = SUBSPACE_PARTS.index(place.split("/")[1]) + 1 if _is_part(place) else 0
    return _is_control(place), part, place.startswith(BEFORE), place.count("/"), place


def _row_name(place: str) -> str:
    when, _, what = place.partition("/")
    names = {TEST: "trained", BEFORE: "before training"}
    return spoken(what) if _is_control(place) or _is_part(place) else " ".join(filter(None, (names[when], what)))


# --- probes


def _probes(results: Results) -> list[str]:
    first = f"{TEST}/{PROBE_ACCURACY}/"
    return [key.removeprefix(first) for key in results if key.startswith(first)]


def _probe_figures(results: Results, figures: Mapping[str, str]) -> dict[str, str]:
    """Those of the figures that each probe has."""
    names = _probes(results)
    return {
        figure: title
        for figure, title in figures.items()
        if all(f"{TEST}/{figure}/{name}" in results for name in names)
    }


def _probes_table(results: Results) -> Table:
    titles = {PROBE_ACCURACY: "probe", CONTROL_ACCURACY: "control", SELECTIVITY: SELECTIVITY}
    titles = _probe_figures(results, titles | {MAJORITY_ACCURACY: "majority", L2: L2})
    rows = {}
    for name in _probes(results):
        values = {figure: results[f"{TEST}/{figure}/{name}"] for figure in titles}
        rows[name] = [f"{value:g}" if figure == L2 else _decimals(value) for figure, value in values.items()]
    heads = [("", title) for title in titles.values()]
    return Table(title="accuracy of probes on held-out examples", heads=heads, rows=rows, note=PROBES_READ)


def _probes_bars(results: Results) -> Bars:
    names = _probes(results)[::-1]
    titles = {SELECTIVITY: SELECTIVITY, CONTROL_ACCURACY: "control", PROBE_ACCURACY: "probe"}
    series = {
        title: [results[f"{TEST}/{figure}/{name}"] for name in names]
        for figure, title in _probe_figures(results, titles).items()
    }
    found = [
        {figure: results[f"{TEST}/{figure}/{name}"] for figure in PROBED if f"{TEST}/{figure}/{name}" in results}
        for name in names
    ]
    shown = _probe_figures(results, titles)
    majority = [figures.get(MAJORITY_ACCURACY) for figures in found]
    marks = [each for each in majority if each is not None]
    return Bars(
        axis=f"accuracy on {_count(found[0])}held-out examples\n{INTERVALS}",
        names=[name.replace(" ", "\n") for name in names],
        series=series,
        intervals={title: [of_run(figures, figure) for figures in found] for figure, title in shown.items()},
        marks=marks if len(marks) == len(names) else (),
    )


# --- traces and finetunings


def _known_table(results: Results) -> Table:
    known = {key: value for key, value in results.items() if key.startswith((f"{TEST}/", f"{BEFORE}/"))}
    return _plain_table(
        {key: value for key, value in known.items() if is_known(key)}, title="held-out examples", note=TEXTS_READ
    )


TRACED = {"restored": TEST} | {run: f"{TEST}/{run}" for run in RUNS}


def _trace_table(results: Results) -> Table:
    rows = {}
    for name, place in TRACED.items():
        figures = _at(results, place)
        if ANSWER_PROBABILITY in figures:
            ends = of_run(figures, ANSWER_PROBABILITY)
            interval = "" if ends is None else f"{ends[0]:.3f}-{ends[1]:.3f}"
            shares = [_decimals(figures.get(f"answer_{rule}")) for rule in RULES]
            rows[name] = [_decimals(figures[ANSWER_PROBABILITY]), interval, *shares]
    heads = [("", head) for head in ("probability", "95%", *RULES)]
    title = f"the clean answer on {_count(_at(results, TEST))}held-out examples"
    return Table(title=title, heads=heads, rows=rows, note=TRACE_READ)


def _places_bars(figure: str, places: Mapping[str, str], axis: str) -> Callable[[Results], Bars]:
    def bars(results: Results) -> Bars:
        found = {name: _at(results, place) for name, place in places.items() if f"{place}/{figure}" in results}
        intervals = [of_run(figures, figure) for figures in found.values()]
        return Bars(
            axis=f"{axis}, {_count(_at(results, TEST))}held-out examples\n{INTERVALS}" if any(intervals) else axis,
            names=list(found),
            series={figure: [figures[figure] for figures in found.values()]},
            intervals={figure: intervals},
        )

    return bars


KINDS = (
    Kind(fits=_is_of_pairs, known=OF_PAIRS, table=_pairs_table, bars=_pairs_bars),
    Kind(fits=lambda results: bool(_probes(results)), known=PROBED, table=_probes_table, bars=_probes_bars),
    Kind(
        fits=lambda results: f"{TEST}/{ANSWER_PROBABILITY}" in results,
        known=OF_TRACES,
        table=_trace_table,
        bars=_places_bars(ANSWER_PROBABILITY, TRACED, "probability of the clean answer"),
    ),
    STEERING,
    DETECTION,
    Kind(
        fits=lambda results: f"{TEST}/{EXACT_MATCH}" in results,
        known=KNOWN,
        table=_known_table,
        bars=_places_bars(
            EXACT_MATCH, {"after": TEST, "before": BEFORE}, "exact match of greedy generations, held-out prompts"
        ),
    ),
)


# --- figures of any run


def _plain_table(figures: Results, *, title: str, name: str = "results", note: str = "") -> Table:
    rows = {
        spoken(key.removeprefix(f"{TEST}/")): [_decimals(value) if is_known(key) else f"{value:.5g}"]
        for key, value in figures.items()
    }
    return Table(title=title, heads=[("", "value")], rows=rows, name=name, note=note)


def _plain_bars(figures: Results) -> Bars | None:
    finite = {key.removeprefix(f"{TEST}/"): value for key, value in reversed(list(figures.items())) if isfinite(value)}
    if not finite:
        return None
    return Bars(axis="test figures", names=list(finite), series={"": list(finite.values())}, shares=False)


def _lines(results: Results) -> list[str]:
    lines = [f"rank found: {results[TEST_RANK]:g}"] if TEST_RANK in results else []
    if TEST_STRENGTH in results:
        lines.append(f"strength chosen on validation prompts: {results[TEST_STRENGTH]:g}")
    lines += judged_lines(results)
    full, random = (f"{TEST}/{control}/{IIA}" in results for control in (FULL_VECTOR, RANDOM_SUBSPACE))
    if full and not random:
        lines.append("random subspace: none; one of full rank swaps the whole activation and is no control")
    for figure in (figure for figure in OF_ANSWERS if f"{TEST}/{figure}" in results):
        start = results.get(f"{BEFORE}/{figure}")
        before = "" if start is None else f" (before training: {start:.3f})"
        lines.append(f"{spoken(figure)}: {results[f'{TEST}/{figure}']:.3f}{before}")
    if (share := results.get(f"{TEST}/{ROW_SHARE}")) is not None:
        lines.append(
            f"share of the subspace's squared norm in the next linear map's row space: {share:.3f} (null space: "
            f"{1 - share:.3f})"
        )
    lines += pick_lines(results) + vacuity_lines(results) + divergence_lines(results)
    if MODEL_ACCURACY in results:
        lines.append(f"base model accuracy on test inputs, before filtering: {results[MODEL_ACCURACY]:.3f}")
    return lines + [f"{title}: {results[figure]:.0f}" for figure, title in OF_DATA.items() if figure in results]


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
