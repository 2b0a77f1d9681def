"""The summary of interchange interventions: accuracy on held-out pairs, beside the controls."""

from __future__ import annotations

from itrain.metrics import RULES
from itrain.results.columns import (
    ATTRIBUTES,
    BEFORE,
    CONTROLS,
    KNOWN,
    PAIRS_CHANGING,
    PAIRS_PRESERVING,
    ROW_SHARE,
    SUBSPACE_PARTS,
    TEST,
    spoken,
)
from itrain.results.divergence import OF_DIVERGENCE
from itrain.results.intervals import of_run
from itrain.results.parts import INTERVALS, Bars, Kind, Results, Table, at_place, decimals
from itrain.results.picks import OF_PICKS, PICK_CONTROLS, mode_places
from itrain.results.reading import ATTRIBUTES_READ, PAIRS_READ, RULES_READ
from itrain.results.shifts import OF_SHIFTS
from itrain.results.vacuity import places as control_places

PAIRS_TITLE = "interchange intervention accuracy on held-out pairs"
AVERAGED_TITLE = "IIA on held-out pairs, averaged over prompts, then attributes"
OF_PAIRS = frozenset(key for key in KNOWN if key.endswith(RULES)) | {PAIRS_CHANGING, PAIRS_PRESERVING}
OF_PAIRS |= OF_SHIFTS | OF_DIVERGENCE | OF_PICKS | {ROW_SHARE}


def _fits(results: Results) -> bool:
    figures = [f"{figure}_{rule}" for figure in ("iia_changing", "iia_preserving", "iia") for rule in RULES]
    return all(f"{TEST}/{figure}" in results for figure in (*figures, PAIRS_CHANGING, PAIRS_PRESERVING))


def _table(results: Results) -> Table:
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
        name: [decimals(results.get(f"{place}/{figure}_{rule}")) for figure in columns for rule in RULES]
        for place, name in pair_places(results).items()
    }
    heads = [(title if rule == RULES[0] else "", rule) for title in columns.values() for rule in RULES]
    return Table(title=title, heads=heads, rows=rows, note=note)


def pair_places(results: Results) -> dict[str, str]:
    """The names of the rows, by the beginnings of their figures' names."""
    places = {key.rpartition("/")[0] for key in results if key.endswith("/iia_argmax")}
    named = {place: _row_name(place) for place in sorted(filter(_is_shown, places), key=_order)}
    return named | control_places(results)


def _bars(results: Results) -> Bars:
    places = {name: place for place, name in reversed(control_places(results).items())}
    places |= {spoken(control): f"{TEST}/{control}" for control in reversed((*CONTROLS, *PICK_CONTROLS))}
    places |= mode_places(results) | {"trained": TEST}
    places = {name: place for name, place in places.items() if f"{place}/iia_changing_pairwise" in results}
    names = {rule: f"iia_changing_{rule}" for rule in reversed(RULES)}
    found = [at_place(results, place) for place in places.values()]
    pairs = int(results[f"{TEST}/{PAIRS_CHANGING}"])
    return Bars(
        axis=f"interchange intervention accuracy, {pairs} label-changing pairs\n{INTERVALS}",
        names=list(places),
        series={rule: [figures[name] for figures in found] for rule, name in names.items()},
        intervals={rule: [of_run(figures, name) for figures in found] for rule, name in names.items()},
        note=f"It is the share of pairs that get the causal model's answer. {RULES_READ}",
    )


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


PAIRS = Kind(fits=_fits, known=OF_PAIRS, table=_table, bars=_bars)
